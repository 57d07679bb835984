# SPDX-License-Identifier: Apache-2.0
"""Choose the problems to train on, with a reason for each that is not chosen.

    selection = select_top(candidates, num_kept=128, dead_groups="drop", seed=(0, step))

Shape legend: P candidates.
"""

from collections.abc import Sequence

import numpy as np

from verl_gradalign.selection.candidates import Candidates
from verl_gradalign.selection.groups import FAILED, NON_FINITE, REWARD_NOT_FINITE
from verl_gradalign.types import Selection

# Why a candidate was kept ...
TOP = "top"
FILLER = "filler"
RANDOM = "random"
SCHEDULED = "scheduled"
FORECAST = "forecast"
UNIFORM = "uniform"
# ... or rejected.
LOW_SCORE = "low_score"
DEAD = "dead"
NOT_DRAWN = "not_drawn"
# ... or, with FAILED and REWARD_NOT_FINITE, failed. NON_FINITE: a score, or what the score is made of.

KEPT_REASONS = (TOP, FILLER, RANDOM, SCHEDULED, FORECAST, UNIFORM)
REJECTED_REASONS = (LOW_SCORE, DEAD, FAILED, REWARD_NOT_FINITE, NON_FINITE, NOT_DRAWN)
REASONS = KEPT_REASONS + REJECTED_REASONS


def select_top(candidates: Candidates, num_kept: int, dead_groups: str, seed: Sequence[int]) -> Selection:
    """Return the `num_kept` best candidates by score.

    Ties are broken by a shuffle seeded with `seed`. Failed groups and scores that are not finite are never kept.
    With dead_groups="drop" dead groups only fill places that live ones leave empty; with "rank" they score 0.
    """
    order, is_failed_P = _shuffled(candidates, seed), candidates.is_failed_P
    is_dead_P = ~candidates.is_live_P & ~is_failed_P
    score_P = np.where(is_dead_P, 0.0, candidates.score_P)
    is_unknown_P = ~is_failed_P & ~np.isfinite(score_P)
    is_dropped_P = is_dead_P & (dead_groups == "drop")
    ranked = order[~(is_failed_P | is_unknown_P | is_dropped_P)[order]]
    ranked = ranked[np.argsort(-score_P[ranked], kind="stable")]  # the shuffle decides between equal scores
    top = ranked[:num_kept]
    filler = order[is_dropped_P[order]][: max(0, num_kept - len(top))]
    reason_P = _failures(candidates, LOW_SCORE)
    of_reason = {NON_FINITE: is_unknown_P, DEAD: is_dropped_P, TOP: top, FILLER: filler}
    for reason, which in of_reason.items():
        reason_P[which] = REASONS.index(reason)
    return Selection(np.concatenate([top, filler]), reason_P)


def select_random(candidates: Candidates, num_kept: int, seed: Sequence[int]) -> Selection:
    """Return `num_kept` candidates drawn uniformly, seeded, from those that did not fail."""
    reason_P = _failures(candidates, NOT_DRAWN)
    order = _shuffled(candidates, seed)
    kept = order[~candidates.is_failed_P[order]][:num_kept]
    reason_P[kept] = REASONS.index(RANDOM)
    return Selection(kept, reason_P)


def select_all(candidates: Candidates, reason: str) -> Selection:
    """Return every candidate that did not fail, in the order given, kept for `reason`."""
    return Selection(np.flatnonzero(~candidates.is_failed_P), _failures(candidates, reason))


def select_picks(candidates: Candidates, is_uniform_P: np.ndarray) -> Selection:
    """Return every candidate that did not fail, in the order given, kept because a forecast chose it or because it was
    drawn uniformly: they were chosen before anything was generated."""
    reason_P = _failures(candidates, FORECAST)
    reason_P[~candidates.is_failed_P & is_uniform_P] = REASONS.index(UNIFORM)
    return Selection(np.flatnonzero(~candidates.is_failed_P), reason_P)


def _failures(candidates: Candidates, otherwise: str) -> np.ndarray:
    """Return the reason of each candidate that failed, and `otherwise` of all others."""
    failed = zip(candidates.failure_P, candidates.is_failed_P, strict=True)
    return np.array([REASONS.index(failure if is_failed else otherwise) for failure, is_failed in failed], np.int8)


def _shuffled(candidates: Candidates, seed: Sequence[int]) -> np.ndarray:
    """Return the positions in an order that depends on the problem ids and the seed only."""
    by_identity = np.argsort(candidates.problem_id_P, kind="stable")
    return by_identity[np.random.default_rng(list(seed)).permutation(len(candidates))]
