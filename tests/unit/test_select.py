# SPDX-License-Identifier: Apache-2.0
"""The choice of problems: properties that hold for every set of candidates, whatever the score."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit import tables
from verl_gradalign.selection.select import (
    DEAD,
    FAILED,
    FORECAST,
    KEPT_REASONS,
    LOW_SCORE,
    NON_FINITE,
    REASONS,
    REJECTED_REASONS,
    SCHEDULED,
    UNIFORM,
    select_all,
    select_picks,
    select_random,
    select_top,
)

# Few distinct values, so that ties are common.
SCORE_VALUES = st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.5, 1.0, math.nan, math.inf, -math.inf])
SEEDS = st.tuples(st.integers(0, 5), st.integers(0, 1000))
NUM_KEPT = st.integers(0, 12)
untimed = settings(deadline=None)  # a busy machine is no failure
DEAD_GROUPS = st.sampled_from(["drop", "rank"])


def candidates_of(rows):
    """Rows of (problem id, is failed, is live, score)."""
    return tables.candidates_of(*([row[i] for row in rows] for i in range(4)))


@st.composite
def candidate_lists(draw):
    num = draw(st.integers(0, 12))
    ids = draw(st.lists(st.integers(0, 99), min_size=num, max_size=num, unique=True))
    return [(i, draw(st.booleans()), draw(st.booleans()), draw(SCORE_VALUES)) for i in ids]


def live(scores, dead=()):
    """Live candidates with these scores, and dead ones at these positions."""
    return candidates_of([(i, False, i not in dead, score) for i, score in enumerate(scores)])


def ids_kept(candidates, selection):
    return candidates.problem_id_P[selection.kept].tolist()


def reasons(candidates, selection):
    codes = selection.reason_P.tolist()
    return {i: REASONS[code] for i, code in zip(candidates.problem_id_P.tolist(), codes, strict=True)}


def is_eligible(row):
    return not row[1] and (not row[2] or math.isfinite(row[3]))


def check_reasons(candidates, selection):
    why = reasons(candidates, selection)
    assert set(ids_kept(candidates, selection)) == {i for i, reason in why.items() if reason in KEPT_REASONS}
    assert len(set(selection.kept.tolist())) == len(selection.kept)


@untimed
@given(candidate_lists(), NUM_KEPT, DEAD_GROUPS, SEEDS, st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_arrival(rows, num_kept, dead_groups, seed, rng):
    first, second = candidates_of(rows), candidates_of(rng.sample(rows, len(rows)))
    for choose in (lambda c: select_top(c, num_kept, dead_groups, seed), lambda c: select_random(c, num_kept, seed)):
        one, other = choose(first), choose(second)
        assert ids_kept(first, one) == ids_kept(second, other)
        assert reasons(first, one) == reasons(second, other)


@untimed
@given(candidate_lists(), NUM_KEPT, DEAD_GROUPS, SEEDS)
def test_as_many_are_kept_as_asked_for_or_eligible(rows, num_kept, dead_groups, seed):
    candidates = candidates_of(rows)
    assert len(select_top(candidates, num_kept, dead_groups, seed).kept) == min(num_kept, sum(map(is_eligible, rows)))
    assert len(select_random(candidates, num_kept, seed).kept) == min(num_kept, sum(not row[1] for row in rows))


@untimed
@given(candidate_lists(), NUM_KEPT, DEAD_GROUPS, SEEDS)
def test_failed_groups_and_non_finite_scores_are_never_kept(rows, num_kept, dead_groups, seed):
    candidates = candidates_of(rows)
    top = reasons(candidates, select_top(candidates, num_kept, dead_groups, seed))
    drawn = reasons(candidates, select_random(candidates, num_kept, seed))
    for problem_id, is_failed, is_live, score in rows:
        if is_failed:
            assert top[problem_id] == drawn[problem_id] == FAILED
        elif is_live and not math.isfinite(score):
            assert top[problem_id] == NON_FINITE


@untimed
@given(candidate_lists(), NUM_KEPT, DEAD_GROUPS, SEEDS)
def test_every_candidate_has_one_reason_and_kept_means_a_reason_for_keeping(rows, num_kept, dead_groups, seed):
    candidates = candidates_of(rows)
    check_reasons(candidates, select_top(candidates, num_kept, dead_groups, seed))
    check_reasons(candidates, select_random(candidates, num_kept, seed))
    check_reasons(candidates, select_all(candidates, SCHEDULED))


@untimed
@given(candidate_lists(), st.randoms(use_true_random=False))
def test_of_picks_all_that_did_not_fail_are_kept_in_their_order_by_how_they_were_picked(rows, rng):
    candidates, is_uniform = candidates_of(rows), [rng.random() < 0.5 for _ in rows]
    selection = select_picks(candidates, np.array(is_uniform, dtype=bool))
    assert ids_kept(candidates, selection) == [row[0] for row in rows if not row[1]]
    expected = [
        FAILED if row[1] else UNIFORM if drawn else FORECAST for row, drawn in zip(rows, is_uniform, strict=True)
    ]
    assert list(reasons(candidates, selection).values()) == expected
    check_reasons(candidates, selection)


def test_no_reason_is_both_for_keeping_and_for_rejecting():
    assert not set(KEPT_REASONS) & set(REJECTED_REASONS)
    assert len(set(REASONS)) == len(REASONS)


@untimed
@given(candidate_lists(), NUM_KEPT, SEEDS)
def test_drop_keeps_no_dead_group_while_a_live_one_is_rejected(rows, num_kept, seed):
    candidates = candidates_of(rows)
    why = reasons(candidates, select_top(candidates, num_kept, "drop", seed))
    is_dead_kept = any(why[row[0]] in KEPT_REASONS and not row[2] for row in rows)
    assert not (is_dead_kept and LOW_SCORE in why.values())
    for row in rows:
        if not row[1] and not row[2] and why[row[0]] not in KEPT_REASONS:
            assert why[row[0]] == DEAD


@untimed
@given(candidate_lists(), NUM_KEPT, SEEDS)
def test_rank_keeps_the_best_with_dead_groups_at_zero_best_first(rows, num_kept, seed):
    candidates = candidates_of(rows)
    score_of = {row[0]: row[3] if row[2] else 0.0 for row in rows if is_eligible(row)}
    kept = [score_of[i] for i in ids_kept(candidates, select_top(candidates, num_kept, "rank", seed))]
    assert kept == sorted(score_of.values(), reverse=True)[:num_kept]


@untimed
@given(candidate_lists(), NUM_KEPT, SEEDS)
def test_drop_keeps_the_best_live_ones_best_first(rows, num_kept, seed):
    candidates = candidates_of(rows)
    score_of = {row[0]: row[3] for row in rows if row[2] and is_eligible(row)}
    kept = ids_kept(candidates, select_top(candidates, num_kept, "drop", seed))
    assert [score_of[i] for i in kept if i in score_of] == sorted(score_of.values(), reverse=True)[:num_kept]


def test_a_dead_group_beats_a_negative_score_under_rank_only():
    candidates = live([-0.3, math.nan], dead={1})
    assert select_top(candidates, 1, "rank", (0, 0)).kept.tolist() == [1]
    assert select_top(candidates, 1, "drop", (0, 0)).kept.tolist() == [0]


def test_ties_are_broken_by_the_seed_and_repeat_with_it():
    candidates = live([0.5] * 8)
    choices = [tuple(select_top(candidates, 4, "drop", (0, step)).kept.tolist()) for step in range(20)]
    assert choices == [tuple(select_top(candidates, 4, "drop", (0, step)).kept.tolist()) for step in range(20)]
    assert len(set(choices)) > 10
    assert {i for kept in choices for i in kept} == set(range(8))


def test_the_random_choice_is_uniform():
    candidates = live([float(i) for i in range(6)])
    counts = np.zeros(6, dtype=int)
    for step in range(1200):
        counts[select_random(candidates, 2, (0, step)).kept] += 1
    # 400 expected, standard deviation 16; the seeds are fixed, so this does not flicker.
    assert ((counts > 320) & (counts < 480)).all(), counts


@pytest.mark.parametrize("dead_groups", ["drop", "rank"])
def test_the_callers_candidates_are_left_as_they_were(dead_groups):
    candidates = live([0.3, 0.1, math.nan, 0.2], dead={1})
    before = candidates.score_P.copy()
    select_top(candidates, 2, dead_groups, (0, 1))
    np.testing.assert_array_equal(candidates.score_P, before)
