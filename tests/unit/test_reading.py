# SPDX-License-Identifier: Apache-2.0
"""How rows are read: in parts, ahead of the selection, and without copies of their tokens."""

import gc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from tests.unit.shelf import BATCH, KEYS, PROBLEMS, nested, shelved, verl_config
from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration import reading
from verl_gradalign.integration.engine import COEFFICIENTS, VerlEngine
from verl_gradalign.integration.read_ahead import ReadAhead
from verl_gradalign.integration.reading import collector_at_rest, read_groups
from verl_gradalign.integration.row_content import RowContent
from verl_gradalign.probe.engine import TokenBudget

CONFIG = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
TAGS = dict(zip(BATCH.keys, BATCH.tags, strict=True))
NO_LIMIT = 60.0


@pytest.fixture
def stored(monkeypatch):
    return shelved(monkeypatch)


def config_of(estimator="grpo", is_colocated=False):
    verl = verl_config(estimator)
    verl.reward = {"reward_model": {"enable": is_colocated, "enable_resource_pool": False}}
    return verl


def test_groups_that_were_read_ahead_are_not_read_again_and_are_the_same(stored):
    verl = config_of()
    whole = read_groups(PROBLEMS, BATCH, set(), CONFIG, verl)
    ahead = ReadAhead(CONFIG, verl)
    ahead.read(PROBLEMS[:1], TAGS, is_scored=True, seconds=NO_LIMIT)
    stored.num_read, stored.columns["input_ids"] = 0, {key: stored.columns["input_ids"][key] for key in KEYS[2:]}
    known = ahead.take(["a", "b"], is_scored=True)
    assert list(known) == ["a"] and read_groups(PROBLEMS, BATCH, set(), CONFIG, verl, ahead=known) == whole
    assert stored.num_read == 1
    assert not ahead.take(["a"], is_scored=True)  # of one selection


def test_finished_groups_are_read_once_and_in_parts_until_the_time_is_over(stored, monkeypatch):
    monkeypatch.setattr("verl_gradalign.integration.read_ahead.ROWS_AT_ONCE", 1)
    ahead = ReadAhead(CONFIG, config_of())
    for num_read in (1, 2, 2):
        ahead.read(PROBLEMS, TAGS, is_scored=True, seconds=0.0)
        assert stored.num_read == num_read


def test_trusted_groups_are_read_apart_from_candidates(stored):
    config = GradAlignConfig.from_mapping(
        {"validation": {"files": ["trusted"]}, "schedule": "forecast", "measure": "update", "score": "dot"}
    )
    problems = [PROBLEMS[0], replace(PROBLEMS[1], trusted_set="trusted")]
    ahead = ReadAhead(config, config_of())
    ahead.read(problems, TAGS, is_scored=True, seconds=NO_LIMIT)
    assert stored.num_read == 2 and set(ahead.take("ab", is_scored=True)) == {"a", "b"}


@pytest.mark.parametrize(
    "verl",
    [config_of("reinforce_plus_plus"), config_of("gae"), config_of(is_colocated=True)],
    ids=["over all rows", "critic", "reward model"],
)
def test_what_waits_for_other_groups_or_for_more_columns_is_not_read_ahead(stored, verl):
    ahead = ReadAhead(CONFIG, verl)
    ahead.read(PROBLEMS, TAGS, is_scored=True, seconds=NO_LIMIT)
    assert not stored.num_read and not ahead.take(["a", "b"], is_scored=True)


def test_a_step_that_measures_does_not_take_what_was_read_for_one_that_does_not(stored):
    ahead = ReadAhead(CONFIG, config_of())
    ahead.read(PROBLEMS, TAGS, is_scored=False, seconds=NO_LIMIT)
    assert not ahead.take(["a", "b"], is_scored=True)
    ahead.read(PROBLEMS, TAGS, is_scored=True, seconds=NO_LIMIT)
    assert all(group.coefficients for group in ahead.take(["a", "b"], is_scored=True).values())


def test_evicted_groups_are_forgotten(stored):
    ahead = ReadAhead(CONFIG, config_of())
    ahead.read(PROBLEMS, TAGS, is_scored=True, seconds=NO_LIMIT)
    ahead.retain({"b"})
    assert list(ahead.take(["a", "b"], is_scored=True)) == ["b"]


def test_the_next_part_comes_while_one_is_worked_on_and_no_further_one(stored, monkeypatch):
    monkeypatch.setattr(reading, "ROWS_AT_ONCE", 1)
    seen: list[int] = []
    read_together = reading._read_together

    def work(*args):
        seen.append(stored.num_read)
        return read_together(*args)

    monkeypatch.setattr(reading, "_read_together", work)
    assert len(read_groups(PROBLEMS, BATCH, set(), CONFIG, config_of())) == 2
    assert seen[0] in (1, 2) and seen[1] == 2


def test_the_garbage_collector_is_left_as_it_was():
    assert gc.isenabled()
    with pytest.raises(ValueError), collector_at_rest():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_at_rest():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=12), st.data())
def test_rows_have_the_same_place_if_and_only_if_they_are_equal(rows: list[list[int]], data: st.DataObject):
    content = RowContent(nested([torch.tensor(row, dtype=torch.int64) for row in rows]))
    start = data.draw(st.integers(0, len(rows) - 1))
    places = content.places(start, len(rows))
    for i, first in enumerate(rows[start:]):
        assert bytes(content.of_row(start + i)) == np.array(first, dtype=np.int64).tobytes()
        for j, second in enumerate(rows[start:]):
            assert (places[i] == places[j]) == (first == second)


def test_rows_of_one_length_may_come_as_a_plain_table():
    content = RowContent(torch.tensor([[1, 2], [3, 4], [1, 2]]))
    assert content.places(0, 3) == [0, 1, 0] and bytes(content.of_row(1)) == np.array([3, 4]).tobytes()


@pytest.mark.parametrize("has_column", [False, True])
def test_a_worker_spreads_a_rows_coefficient_over_the_tokens_that_count(has_column):
    masks = [[1, 0, 1], [1, 1]]
    rows = {"input_ids": nested([[5, 6, 7, 8], [5, 6, 7]]), "response_mask": nested(masks)}
    if has_column:  # of tokens: where one estimator gives them different ones
        rows[COEFFICIENTS] = nested([[0.25, 0.0, 0.75], [0.5, 1.0]])
    engine = VerlEngine(None, TensorDict(rows, batch_size=2), 1.0, TokenBudget(9, is_padded=False), [0.1, -0.5])
    found: Sequence[list[float]] = [engine.coefficients(row)[0].tolist() for row in range(2)]
    tenth = torch.tensor(0.1).item()
    expected = [[0.25, 0.0, 0.75], [0.5, 1.0]] if has_column else [[tenth, 0.0, tenth], [-0.5, -0.5]]
    assert found == expected
