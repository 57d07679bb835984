# SPDX-License-Identifier: Apache-2.0
"""TransferQueue has room for every answer that a selection waits for, or the run is refused with the numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transfer_queue.storage.simple_storage import StorageUnitData

from tests.unit.test_config import CONFIGS
from verl_gradalign.config import CurriculumConfig, DirectionConfig, GradAlignConfig, ValidationConfig
from verl_gradalign.integration.storage import KEY, check_storage, trusted_rows

TRUSTED = ValidationConfig(files=("trusted.parquet",))


def run(limit, batch_size=8, n=4, backend="SimpleStorage"):
    storage = {"storage_backend": backend, "SimpleStorage": {"total_storage_size": limit}}
    values = {"data": {"train_batch_size": batch_size}, "actor_rollout_ref": {"rollout": {"n": n}}}
    return OmegaConf.create({**values, "transfer_queue": {"backend": storage}})


def of(schedule="step", score="cosine", **plan):
    return GradAlignConfig(score, schedule, curriculum=CurriculumConfig(**plan), validation=TRUSTED)


def fits(config, verl_config, num_problems, num_trusted=0):
    try:
        check_storage(config, verl_config, num_problems, num_trusted)
    except ValueError as error:
        assert str(error).startswith(f"{KEY}=") and f"set {KEY}=null" in str(error)
        return False
    return True


CASES = {
    "a step": (of(), 32 * 4),
    "a step that scores nothing": (of(score="random"), 8 * 4),
    "a round of its own size": (of("round", num_candidates=50, n=6, keep=0.5), 50 * 6),
    "a round by the factor": (of("round", steps_per_round=3), 4 * 8 * 3 * 4),
    "the whole pool": (of("once", keep=0.25), 500 * 4),
    "the whole pool, with more responses": (of("staged", keep=0.1, stages=(1, 5), n=8), 500 * 8),
}


@pytest.mark.parametrize(("config", "num_rows"), CASES.values(), ids=CASES.keys())
def test_the_limit_must_hold_what_a_scored_step_rolls_out(config, num_rows):
    for num_trusted in (0, 37):
        assert fits(config, run(num_rows + num_trusted), 500, num_trusted)
        assert not fits(config, run(num_rows + num_trusted - 1), 500, num_trusted)


def test_a_refusal_names_the_numbers_and_a_size_that_is_accepted():
    with pytest.raises(ValueError, match=r"schedule once needs 272037 rows at once .17000 candidates x 16 ") as refusal:
        check_storage(of("once", keep=0.25), run(100_000, n=16), 17_000, 37)
    assert f"{KEY}=100000" in str(refusal.value) and "37 trusted ones" in str(refusal.value)
    assert fits(of("once", keep=0.25), run(272_037, n=16), 17_000, 37)


@pytest.mark.parametrize(
    ("direction", "num_rows"),
    [
        (DirectionConfig(), 50),
        (DirectionConfig(refresh_interval=10, replay=3), 3 * 50 + 2 * 50),
        (DirectionConfig(refresh_interval=10, replay=3, rolling=True), 3 * 50 + 2 * 5),
        (DirectionConfig(refresh_interval=10, rolling=True), 50 + 2 * 5),
    ],
)
def test_trusted_responses_that_are_kept_need_room_too(direction, num_rows):
    assert trusted_rows(GradAlignConfig(direction=direction), 50) == num_rows


@given(num_problems=st.integers(8, 10**7), n=st.integers(1, 256))
def test_without_a_limit_or_with_another_storage_everything_fits(num_problems, n):
    assert fits(of("once", keep=0.25), run(None, n=n), num_problems)
    assert fits(of("once", keep=0.25), run(1, n=n, backend="MooncakeStore"), num_problems)


def test_the_word_lifts_the_limit_that_transfer_queue_would_keep():
    base = OmegaConf.load(CONFIGS / "base.yaml")
    limit = OmegaConf.select(base, KEY)
    assert limit is None
    for size, is_refused in ((200, True), (limit, False)):
        storage, rows = StorageUnitData(size), list(range(300))
        if is_refused:
            with pytest.raises(ValueError, match="capacity exceeded"):
                storage.put_data({"answers": rows}, rows)
        else:
            storage.put_data({"answers": rows}, rows)
            assert storage.get_data(["answers"], rows) == {"answers": rows}
