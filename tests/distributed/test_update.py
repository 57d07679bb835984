# SPDX-License-Identifier: Apache-2.0
"""verl's own update, measured while it runs: what rows contribute is the oracle's, and the update is what it was."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.distributed.comparison import case_of
from tests.distributed.conftest import RunGroup
from tests.distributed.setups import neutral_setups, reference_model
from tests.distributed.update_rows import OFF_POLICY, SHUFFLE_SEED, UPDATES, Update, expected_update, update_setups

pytestmark = pytest.mark.dist

RTOL_FLOAT64 = 1e-10  # of the largest contribution; measured 1e-15 to 1e-13
MAX_SUM_ERROR = {"fp32": 1e-5, "bf16": 5e-2}  # measured 1e-7 and 5e-3
NUM_ROWS = 16
EXACT = [(size, name) for size in (1, 2) for name in update_setups(size)]
NEUTRAL = [(size, name) for size in (1, 2) for name in neutral_setups(size)]


def order_of(update: Update, world_size: int) -> list[list[int]]:
    """Return the rows of each mini-batch: every rank cuts its own share, dealt by turns, as verl does."""
    share = NUM_ROWS // world_size
    loaders = [
        DataLoader(
            torch.arange(share),
            share // update.num_mini_batches,
            update.shuffles,
            collate_fn=lambda rows: [int(row) for row in rows],
            generator=torch.Generator().manual_seed(SHUFFLE_SEED + rank),
        )
        for rank in range(world_size)
    ]
    by_rank = [[batch for _ in range(update.epochs) for batch in loader] for loader in loaders]
    return [
        [row * world_size + rank for rank, rows in enumerate(batches) for row in rows]
        for batches in zip(*by_rank, strict=True)
    ]


@pytest.fixture(scope="module")
def expected(root: Path) -> Any:
    @cache
    def of(model: str, has_adapters: bool, update: str, world_size: int, clips: bool) -> dict[str, torch.Tensor]:
        order = order_of(UPDATES[update], world_size)
        found = expected_update(reference_model(root, model, has_adapters), UPDATES[update], order, clips)
        return {key: torch.tensor(values, dtype=torch.float64) for key, values in found.items()}

    return of


@pytest.mark.parametrize(("size", "name"), EXACT, ids=[f"{size}-{name}" for size, name in EXACT])
def test_contributions_are_each_rows_own_gradient_along_the_direction(
    run_group: RunGroup, expected: Any, size: int, name: str
) -> None:
    case, (setup, update) = case_of(run_group(size), f"update-exact-{name}"), update_setups(size)[name]
    clips = setup.strategy.startswith("fsdp2")
    wanted = expected(setup.model, setup.has_adapters, update, size, clips)
    for key in ("contribution", "derivative"):
        found_R = torch.tensor(case[key], dtype=torch.float64)
        assert torch.equal(found_R.isnan(), wanted[key].isnan()), key
        error = (found_R - wanted[key]).abs().nan_to_num().max() / wanted[key].abs().nan_to_num().max().clamp(
            min=1e-300
        )
        assert error <= RTOL_FLOAT64, (key, error)
    assert case["contribution"][0] != 0
    assert case["exact_sum_error"] <= RTOL_FLOAT64
    assert case["left"] == []


def test_derivatives_are_known_of_rows_whose_tokens_have_one_coefficient(run_group: RunGroup) -> None:
    known = [value == value for value in case_of(run_group(2), "update-exact-fsdp2-packed-adapters")["derivative"]]
    # A row of the off-policy ones has one token; so it has one coefficient.
    assert sum(known) >= NUM_ROWS - len(OFF_POLICY) - 1
    assert not all(known)


@pytest.mark.parametrize(("size", "name"), NEUTRAL, ids=[f"{size}-{name}" for size, name in NEUTRAL])
def test_a_measured_update_is_bit_for_bit_the_update_without_taps(run_group: RunGroup, size: int, name: str) -> None:
    case, dtype = case_of(run_group(size), f"update-neutral-{name}"), "bf16" if "bf16" in name else "fp32"
    for reading in ("whole", "cut", "both"):
        assert case[reading]["differs"] == [], reading
        assert any(value for value in case[reading]["contribution"])
    assert case["whole"]["exact_sum_error"] <= MAX_SUM_ERROR[dtype]
    assert case["both"]["exact_sum_error"] <= MAX_SUM_ERROR[dtype]
    assert case["cut"]["exact_sum_error"] is None
    diagnostics = case["both"]["diagnostics"]
    assert 0.5 < diagnostics["update/fidelity"] <= 1 and 0.2 < diagnostics["update/energy_kept"] < 1
    # What the cut leaves out shows in the sum.
    assert diagnostics["update/sum_error"] > case["both"]["exact_sum_error"]


@pytest.mark.parametrize(("size", "name"), NEUTRAL, ids=[f"{size}-{name}" for size, name in NEUTRAL])
def test_an_update_that_fails_leaves_no_tap_and_no_hook(run_group: RunGroup, size: int, name: str) -> None:
    failed = case_of(run_group(size), f"update-neutral-{name}")["failed"]
    assert failed == {"has_failed": True, "left": [], "has_own_loss": True, "optimizer_hooks": 0}
