# SPDX-License-Identifier: Apache-2.0
"""How much of a ranking would come out again with fresh responses: each problem scored on two halves of its group.

The halves' dot products add up to the whole's, and the norm is the whole group's for both, so the two half scores are
parallel estimates whose mean is the score itself: what Spearman-Brown's correction asks for. Responses are independent
draws and their log-probability gradients have mean zero, so noise alone correlates the halves by nothing, although
advantages are centred over the whole group (tests/unit/test_reliability.py).

    reliability = score_reliability(measurements, score_of("cosine"), options)
    reliability.corrected      # of the ranking that was used

Shape legend: P problems, R responses.
"""

from dataclasses import dataclass, replace

import torch

from verl_gradalign.config import ScoreOptions
from verl_gradalign.rank_correlation import MIN_RANKED, spearman, spearman_brown
from verl_gradalign.selection.scores import Score
from verl_gradalign.types import Measurements


@dataclass(frozen=True)
class Reliability:
    """Agreement of two half-group rankings."""

    spearman: float
    """Of the halves; nan where it cannot be measured."""
    num_problems: int
    """Problems that both halves gave a finite score."""

    @property
    def corrected(self) -> float:
        """The whole groups' reliability, by Spearman-Brown; nan where it cannot be measured."""
        return spearman_brown(self.spearman)


def score_reliability(m: Measurements, score: Score, options: ScoreOptions) -> Reliability:
    """Return the rank correlation of the problems' scores on two halves of their groups."""
    if score.rank is None or not score.is_split or not len(m.problem_id_P):
        return Reliability(float("nan"), 0)
    first_P, second_P = (score.rank(half_of(m, which), options) for which in (0, 1))
    is_known_P = first_P.isfinite() & second_P.isfinite()
    num_problems = int(is_known_P.sum())
    if num_problems < MIN_RANKED:
        return Reliability(float("nan"), num_problems)
    return Reliability(spearman(first_P[is_known_P], second_P[is_known_P]), num_problems)


def half_of(m: Measurements, which: int) -> Measurements:
    """Return the measurements as one half of every group gives them, as an estimate of the whole's.

    Sums over responses are doubled; the norm stays the whole group's. A group without a response in the half is nan.
    """
    is_mine_PR = m.half_PR == which
    return replace(
        m,
        success_PR=m.success_PR.masked_fill(~is_mine_PR, torch.nan),
        advantage_PR=m.advantage_PR.masked_fill(~is_mine_PR, torch.nan),
        half_PR=m.half_PR.masked_fill(~is_mine_PR, -1),
        dot_P=torch.where(is_mine_PR.any(1), 2 * m.half_dot_P2[:, which], torch.nan),
        derivative_PR=m.derivative_PR.masked_fill(~is_mine_PR, torch.nan),
        contribution_PR=2 * m.contribution_PR.masked_fill(~is_mine_PR, torch.nan),
    )
