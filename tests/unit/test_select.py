# SPDX-License-Identifier: Apache-2.0
"""The choice of problems: properties that hold for every set of candidates; and the scores they are ranked by."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.selection.scores import SCORES, cosine, dot
from verl_gradalign.selection.select import (
    DEAD,
    FAILED,
    KEPT_REASONS,
    NON_FINITE,
    REASONS,
    REJECTED_REASONS,
    Candidate,
    select_random,
    select_top,
)
from verl_gradalign.types import ProblemScores

# Few distinct values, so that ties are common.
SCORE_VALUES = st.sampled_from([None, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, math.nan, math.inf, -math.inf])
SEEDS = st.tuples(st.integers(0, 5), st.integers(0, 1000))
NUM_KEPT = st.integers(0, 12)
untimed = settings(deadline=None)  # a busy machine is no failure
DEAD_GROUPS = st.sampled_from(["drop", "rank"])


@st.composite
def candidate_lists(draw):
    """Candidates with distinct uids; problem ids may repeat (a problem can be drawn twice in a step)."""
    return [
        Candidate(f"u{i}", draw(st.integers(0, 9)), draw(st.booleans()), draw(st.booleans()), draw(SCORE_VALUES))
        for i in range(draw(st.integers(0, 12)))
    ]


def is_finite(candidate):
    return candidate.score is not None and math.isfinite(candidate.score)


def is_eligible(candidate):
    return not candidate.is_failed and (not candidate.is_live or is_finite(candidate))


def ranked_score(candidate):
    return candidate.score if candidate.is_live else 0.0


def live(uid, score, problem_id=0):
    return Candidate(uid, problem_id, is_failed=False, is_live=True, score=score)


def check_reasons(candidates, selection):
    assert set(selection.reasons) == {c.uid for c in candidates}
    assert set(selection.reasons.values()) <= set(REASONS)
    assert set(selection.kept) == {uid for uid, reason in selection.reasons.items() if reason in KEPT_REASONS}
    assert len(set(selection.kept)) == len(selection.kept)


@untimed
@given(candidate_lists(), NUM_KEPT, DEAD_GROUPS, SEEDS, st.randoms(use_true_random=False))
def test_the_choice_of_the_best_does_not_depend_on_the_order_of_arrival(candidates, num_kept, dead_groups, seed, rng):
    shuffled = rng.sample(candidates, len(candidates))
    assert select_top(candidates, num_kept, dead_groups, seed) == select_top(shuffled, num_kept, dead_groups, seed)


@untimed
@given(candidate_lists(), NUM_KEPT, SEEDS, st.randoms(use_true_random=False))
def test_the_random_choice_does_not_depend_on_the_order_of_arrival(candidates, num_kept, seed, rng):
    shuffled = rng.sample(candidates, len(candidates))
    assert select_random(candidates, num_kept, seed) == select_random(shuffled, num_kept, seed)


@untimed
@given(candidate_lists(), NUM_KEPT, DEAD_GROUPS, SEEDS)
def test_as_many_are_kept_as_asked_for_or_eligible(candidates, num_kept, dead_groups, seed):
    top = select_top(candidates, num_kept, dead_groups, seed)
    assert len(top.kept) == min(num_kept, sum(map(is_eligible, candidates)))
    drawn = select_random(candidates, num_kept, seed)
    assert len(drawn.kept) == min(num_kept, sum(not c.is_failed for c in candidates))


@untimed
@given(candidate_lists(), NUM_KEPT, DEAD_GROUPS, SEEDS)
def test_failed_groups_and_non_finite_scores_are_never_kept(candidates, num_kept, dead_groups, seed):
    top = select_top(candidates, num_kept, dead_groups, seed)
    drawn = select_random(candidates, num_kept, seed)
    for candidate in candidates:
        if candidate.is_failed:
            assert top.reasons[candidate.uid] == drawn.reasons[candidate.uid] == FAILED
        elif candidate.is_live and not is_finite(candidate):
            assert top.reasons[candidate.uid] == NON_FINITE


@untimed
@given(candidate_lists(), NUM_KEPT, DEAD_GROUPS, SEEDS)
def test_every_candidate_has_one_reason_and_kept_means_a_reason_for_keeping(candidates, num_kept, dead_groups, seed):
    check_reasons(candidates, select_top(candidates, num_kept, dead_groups, seed))
    check_reasons(candidates, select_random(candidates, num_kept, seed))


def test_no_reason_is_both_for_keeping_and_for_rejecting():
    assert not set(KEPT_REASONS) & set(REJECTED_REASONS)
    assert len(set(REASONS)) == len(REASONS)


@untimed
@given(candidate_lists(), NUM_KEPT, SEEDS)
def test_drop_keeps_no_dead_group_while_a_live_one_is_rejected(candidates, num_kept, seed):
    selection = select_top(candidates, num_kept, "drop", seed)
    kept = [c for c in candidates if c.uid in selection.kept]
    rejected_live = [
        c for c in candidates if c.uid not in selection.kept and not c.is_failed and c.is_live and is_finite(c)
    ]
    assert not rejected_live or all(c.is_live for c in kept)
    for candidate in candidates:
        if not candidate.is_failed and not candidate.is_live and candidate.uid not in selection.kept:
            assert selection.reasons[candidate.uid] == DEAD


@untimed
@given(candidate_lists(), NUM_KEPT, SEEDS)
def test_rank_keeps_the_best_with_dead_groups_at_zero(candidates, num_kept, seed):
    selection = select_top(candidates, num_kept, "rank", seed)
    eligible = {c.uid: ranked_score(c) for c in candidates if is_eligible(c)}
    kept = [eligible[uid] for uid in selection.kept]
    assert kept == sorted(eligible.values(), reverse=True)[:num_kept]


@untimed
@given(candidate_lists(), NUM_KEPT, SEEDS)
def test_drop_keeps_the_best_live_ones_best_first(candidates, num_kept, seed):
    scores = {c.uid: c.score for c in candidates if not c.is_failed and c.is_live and is_finite(c)}
    kept = [scores[uid] for uid in select_top(candidates, num_kept, "drop", seed).kept if uid in scores]
    assert kept == sorted(scores.values(), reverse=True)[:num_kept]


def test_a_dead_group_beats_a_negative_score_under_rank_only():
    candidates = [live("bad", -0.3), Candidate("dead", 1, is_failed=False, is_live=False, score=None)]
    assert select_top(candidates, 1, "rank", (0, 0)).kept == ("dead",)
    assert select_top(candidates, 1, "drop", (0, 0)).kept == ("bad",)


def test_ties_are_broken_by_the_seed():
    candidates = [live(f"u{i}", 0.5, problem_id=i) for i in range(8)]
    choices = {select_top(candidates, 4, "drop", (0, step)).kept for step in range(20)}
    assert len(choices) > 10
    assert {uid for kept in choices for uid in kept} == {c.uid for c in candidates}


def test_ties_are_broken_by_problem_and_not_by_the_uid_of_the_run():
    first = [live(f"u{i}", 0.5, problem_id=i) for i in range(8)]
    renamed = [dataclasses.replace(c, uid=f"w{7 - c.problem_id}") for c in first]
    problem_of = {c.uid: c.problem_id for c in (*first, *renamed)}
    for step in range(10):
        one, other = (select_top(c, 3, "drop", (0, step)).kept for c in (first, renamed))
        assert [problem_of[uid] for uid in one] == [problem_of[uid] for uid in other]


def test_the_random_choice_is_uniform():
    candidates = [live(f"u{i}", float(i), problem_id=i) for i in range(6)]
    counts = dict.fromkeys((c.uid for c in candidates), 0)
    for step in range(1200):
        for uid in select_random(candidates, 2, (0, step)).kept:
            counts[uid] += 1
    # 400 expected, standard deviation 16; the seeds are fixed, so this does not flicker.
    assert all(320 < count < 480 for count in counts.values()), counts


def problem_scores(dots, norms):
    return ProblemScores(
        uid=tuple(f"u{i}" for i in range(len(dots))),
        dot_P=torch.tensor(dots, dtype=torch.float64),
        norm_P=None if norms is None else torch.tensor(norms, dtype=torch.float64),
        num_tokens_P=torch.ones(len(dots), dtype=torch.int64),
        response_derivative_PR=None,
        direction_norm=1.0,
    )


@untimed
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(1e-3, 1e3)), min_size=1, max_size=6), st.floats(1e-6, 1e6))
def test_cosine_does_not_depend_on_the_length_of_the_gradients(pairs, scale):
    cosines, norms = map(list, zip(*pairs, strict=True))
    dots = [c * n for c, n in pairs]
    scaled = problem_scores([scale * d for d in dots], [scale * n for n in norms])
    for scores in (problem_scores(dots, norms), scaled):
        torch.testing.assert_close(cosine(scores), torch.tensor(cosines, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_cosine_is_zero_for_a_zero_gradient_and_nan_stays_nan():
    scores = cosine(problem_scores([0.0, math.nan, 1.0, 1.0], [0.0, 2.0, math.nan, 2.0])).tolist()
    assert scores[0] == 0.0 and math.isnan(scores[1]) and math.isnan(scores[2]) and scores[3] == 0.5


def test_dot_is_the_projection_on_the_unit_direction_and_needs_no_norm():
    scores = dot(problem_scores([3.0, -2.0, math.nan], None)).tolist()
    assert scores[:2] == [3.0, -2.0] and math.isnan(scores[2])


def test_only_scores_that_rank_need_gradients():
    for name, score in SCORES.items():
        assert (score.rank is None) == (name == "random") == (not score.needs_direction)
    assert SCORES["cosine"].needs_norm and not SCORES["dot"].needs_norm


@pytest.mark.parametrize("dead_groups", ["drop", "rank"])
def test_the_callers_candidates_are_left_as_they_were(dead_groups):
    candidates = [live(f"u{i}", random.Random(i).random(), problem_id=i) for i in range(5)]
    before = list(candidates)
    select_top(candidates, 2, dead_groups, (0, 1))
    assert candidates == before
