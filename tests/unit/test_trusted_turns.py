# SPDX-License-Identifier: Apache-2.0
"""Which trusted problems each step rolls out, and which are set aside."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_gradalign.config import DirectionConfig, GradAlignConfig
from verl_gradalign.selection.trusted_turns import TrustedTurns

SETS = {"first": range(7, 71), "second": range(5)}


def turns_of(sets=SETS, seed=0, **direction):
    return TrustedTurns(GradAlignConfig(seed=seed, direction=DirectionConfig(**direction)), sets)


@given(num=st.integers(1, 100), interval=st.integers(1, 20), first_turn=st.integers(0, 5))
def test_a_turn_rolls_out_each_problem_once_in_shares_that_differ_by_one_at_most(num, interval, first_turn):
    turns = turns_of({"only": range(100, 100 + num)}, refresh_interval=interval, rolling=True)
    steps = range(first_turn * interval + 1, (first_turn + 1) * interval + 1)
    shares = [turns.due(step, newest=step - 1).get("only", []) for step in steps]
    assert sorted(sum(shares, [])) == list(range(100, 100 + num))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_turns_differ_in_order_and_a_new_object_gives_the_same_ones():
    def turn(number, seed=0):
        turns = turns_of(seed=seed, refresh_interval=8, rolling=True)
        return [turns.due(step, newest=None).get("first", []) for step in range(8 * number + 1, 8 * number + 9)]

    assert turn(3) == turn(3)
    assert len({str(turn(number)) for number in range(4)} | {str(turn(0, seed=1))}) == 5


def test_a_step_without_problems_of_a_set_leaves_it_out():
    turns = turns_of(refresh_interval=10, rolling=True)
    dues = [turns.due(step, newest=step - 1) for step in range(1, 11)]
    assert sum("second" not in due for due in dues) == 5 and all("first" in due for due in dues)


def test_without_rolling_all_are_due_when_none_are_kept_and_every_interval_after_the_newest():
    turns = turns_of(refresh_interval=10, replay=3, rolling=False)
    everything = {name: list(ids) for name, ids in SETS.items()}
    assert turns.due(1, newest=None) == turns.due(4, newest=None) == everything
    assert [bool(turns.due(step, newest=4)) for step in (5, 13, 14, 15)] == [False, False, True, True]


def test_the_audit_is_a_seeded_share_of_every_set_and_only_there_where_trusted_responses_are_trained_on():
    assert turns_of(audit=0.5).audit == {"first": frozenset(), "second": frozenset()}
    audit = turns_of(audit=0.25, train_on_trusted=True).audit
    assert (len(audit["first"]), len(audit["second"])) == (16, 1)
    assert audit["first"] <= set(SETS["first"]) and audit["second"] <= set(SETS["second"])
    assert turns_of(audit=0.25, train_on_trusted=True).audit == audit
    assert turns_of(seed=1, audit=0.25, train_on_trusted=True).audit != audit


@pytest.mark.parametrize(("num", "share", "num_audited"), [(5, 0.1, 1), (2, 0.9, 1), (1, 0.9, 0), (64, 0.0, 0)])
def test_the_audit_leaves_a_problem_for_the_direction(num, share, num_audited):
    audit = turns_of({"only": range(num)}, audit=share, train_on_trusted=True).audit
    assert len(audit["only"]) == num_audited
