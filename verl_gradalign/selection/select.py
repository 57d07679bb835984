# SPDX-License-Identifier: Apache-2.0
"""Choose the problems to train on, with a reason for each that is not chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_gradalign.types import Selection

# Why a candidate was kept ...
TOP = "top"
FILLER = "filler"
RANDOM = "random"
# ... or rejected.
LOW_SCORE = "low_score"
DEAD = "dead"
FAILED = "failed"
NON_FINITE = "non_finite"
NOT_DRAWN = "not_drawn"

KEPT_REASONS = (TOP, FILLER, RANDOM)
REJECTED_REASONS = (LOW_SCORE, DEAD, FAILED, NON_FINITE, NOT_DRAWN)
REASONS = KEPT_REASONS + REJECTED_REASONS


@dataclass(frozen=True)
class Candidate:
    """What the choice depends on, for one problem."""

    uid: str
    problem_id: int
    """Row in the train files: the tie-break depends on it, never on the order of arrival."""
    is_failed: bool
    """At least one of its responses could not be generated."""
    is_live: bool
    """At least one of its responses has a non-zero advantage."""
    score: float | None
    """None: not scored (a dead or failed group, or a step without a direction)."""


def select_top(candidates: Sequence[Candidate], num_kept: int, dead_groups: str, seed: Sequence[int]) -> Selection:
    """Return the `num_kept` best candidates by score.

    Ties are broken by a shuffle seeded with `seed`. Failed groups and scores that are not finite are never kept.
    With dead_groups="drop" dead groups only fill places that live ones leave empty; with "rank" they score 0.
    """
    reasons: dict[str, str] = {}
    ranked: list[tuple[float, Candidate]] = []
    dead: list[Candidate] = []
    for candidate in _shuffled(candidates, seed):
        if candidate.is_failed:
            reasons[candidate.uid] = FAILED
        elif not candidate.is_live:
            if dead_groups == "rank":
                ranked.append((0.0, candidate))
            else:
                dead.append(candidate)
        elif candidate.score is None or not math.isfinite(candidate.score):
            reasons[candidate.uid] = NON_FINITE
        else:
            ranked.append((candidate.score, candidate))
    ranked.sort(key=lambda pair: -pair[0])  # stable: the shuffle decides between equal scores
    top = [candidate for _, candidate in ranked[:num_kept]]
    filler = dead[: max(0, num_kept - len(top))]
    reasons.update({candidate.uid: LOW_SCORE for _, candidate in ranked})
    reasons.update({candidate.uid: DEAD for candidate in dead})
    reasons.update({candidate.uid: TOP for candidate in top})
    reasons.update({candidate.uid: FILLER for candidate in filler})
    return Selection(kept=tuple(c.uid for c in (*top, *filler)), reasons=reasons)


def select_random(candidates: Sequence[Candidate], num_kept: int, seed: Sequence[int]) -> Selection:
    """Return `num_kept` candidates drawn uniformly, seeded, from those whose responses could be generated."""
    reasons = {c.uid: FAILED for c in candidates if c.is_failed}
    drawable = [c for c in _shuffled(candidates, seed) if not c.is_failed]
    reasons.update({c.uid: NOT_DRAWN for c in drawable})
    kept = drawable[:num_kept]
    reasons.update({c.uid: RANDOM for c in kept})
    return Selection(kept=tuple(c.uid for c in kept), reasons=reasons)


def _shuffled(candidates: Sequence[Candidate], seed: Sequence[int]) -> list[Candidate]:
    """Return the candidates in an order that depends on their problem ids and the seed only."""
    by_identity = sorted(candidates, key=lambda c: (c.problem_id, c.uid))
    return [by_identity[i] for i in np.random.default_rng(list(seed)).permutation(len(by_identity))]
