# SPDX-License-Identifier: Apache-2.0
"""How much of a ranking would come out again with fresh responses: each problem scored on parts of its group.

Halves tell of the ranking as a whole, and groups without one response of each score's standard error.

The halves' dot products add up to the whole's, and the norm is the whole group's for both, so the two half scores are
parallel estimates whose mean is the score itself: what Spearman-Brown's correction asks for. Responses are independent
draws and their log-probability gradients have mean zero, so noise alone correlates the halves by nothing, although
advantages are centred over the whole group (tests/unit/test_reliability.py).

    reliability = score_reliability(measurements, score_of("cosine"), options)
    reliability.corrected      # of the ranking that was used
    error_P = score_errors(measurements, score_of("cosine"), options)

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


def score_errors(m: Measurements, score: Score, options: ScoreOptions) -> torch.Tensor:
    """Return the standard error of each problem's score: how much it varies with the responses that were drawn.

    The jackknife: with s_(j) the score of the group without response j, sqrt((n - 1) / n sum_j (s_(j) - mean)^2). Of
    `dot` that is `Measurements.dot_error_P`. Where what responses contribute is not known, half the difference of the
    two halves' scores; nan where neither is, and for scores of which no part of a group is an estimate.

    Shapes: (problems,), float64.
    Source: Tukey (1958); Efron and Stein (1981): biased upwards for what is no mean, not downwards.
    """
    num_P, width = (m.half_PR >= 0).sum(1).double(), m.half_PR.shape[1]
    if score.rank is None or not score.is_split or not len(num_P):
        return torch.full((len(num_P),), torch.nan, dtype=torch.float64)
    first_P, second_P = (score.rank(half_of(m, which), options) for which in (0, 1))
    are_both_there_P = torch.stack([(m.half_PR == which).any(1) for which in (0, 1)]).all(0)
    by_half_P = torch.where(are_both_there_P, (first_P - second_P).abs().double() / 2, torch.nan)
    scores_PR = torch.full((len(num_P), width), torch.nan, dtype=torch.float64)
    for j in range(width):
        is_there_P = m.half_PR[:, j] >= 0
        scores_PR[is_there_P, j] = score.rank(without_response(m, j), options)[is_there_P].double()
    deviation_PR = scores_PR - scores_PR.nanmean(1, keepdim=True)
    variance_P = deviation_PR.square().nansum(1) * (num_P - 1) / num_P
    is_known_P = (scores_PR.isfinite().sum(1) == num_P) & (num_P > 1)
    return torch.where(is_known_P, variance_P.sqrt(), by_half_P)


def without_response(m: Measurements, j: int) -> Measurements:
    """Return the measurements as the groups without their j-th response give them, as an estimate of the whole's.

    Sums over responses are scaled to n responses; the norm stays the whole group's. A group of no more than one
    response, or whose response's contribution is not known, is left without a dot product.
    """
    is_left_PR = m.half_PR >= 0
    num_P = is_left_PR.sum(1).double()
    is_left_PR[:, j] = False
    scale_P = (num_P / (num_P - 1)).masked_fill(num_P < 2, torch.nan)
    return replace(
        m,
        success_PR=m.success_PR.masked_fill(~is_left_PR, torch.nan),
        advantage_PR=m.advantage_PR.masked_fill(~is_left_PR, torch.nan),
        half_PR=m.half_PR.masked_fill(~is_left_PR, -1),
        dot_P=(m.dot_P - m.contribution_PR[:, j]) * scale_P,
        derivative_PR=m.derivative_PR.masked_fill(~is_left_PR, torch.nan),
        contribution_PR=m.contribution_PR.masked_fill(~is_left_PR, torch.nan) * scale_P[:, None],
        half_dot_P2=torch.full_like(m.half_dot_P2, torch.nan),
    )
