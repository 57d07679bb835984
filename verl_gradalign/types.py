# SPDX-License-Identifier: Apache-2.0
"""The nouns that the parts of the package exchange: problems in, scores and a selection out.

Shape legend: P problems, R responses of a problem, T response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

RESPONSES, TOKENS, SECONDS = UNITS = ("responses", "tokens", "seconds")
"""What may be counted of a run, tests excluded: all responses that it generates, trusted ones and candidates included;
the tokens of these; the time of its training."""


@dataclass(frozen=True)
class TokenRow:
    """One response with its prompt, unpadded, on the CPU."""

    prompt: Tensor
    """Token ids, int64, at least one."""
    response: Tensor
    """Token ids, int64, possibly none."""
    coefficient: Tensor
    """c_t of each response token (`objective.token_coefficients`); zero where it does not count."""

    @property
    def num_tokens(self) -> int:
        return self.prompt.numel() + self.response.numel()


@dataclass(frozen=True)
class ProblemRows:
    """One problem's share of rows on one rank.

    A row is one response with its prompt. All ranks hold the same problems in the same order; how many rows of a
    problem a rank holds may differ, down to none.
    """

    uid: str
    """Identifies the problem within one scoring call; the same on every rank."""
    rows: tuple[int, ...]
    """Positions of this rank's rows in the engine's row table."""
    num_rows: int
    """Rows of the whole problem, over all ranks."""
    num_tokens: int
    """Tokens of the whole problem over all ranks, prompts included."""
    longest_row: int
    """Tokens of the problem's longest row, over all ranks, prompt included."""
    is_split: bool = False
    """Whether the problem's halves are distinguished, to measure reliability; the same on every rank."""
    halves: tuple[int, ...] = ()
    """If split: 0 or 1 for each row on this rank, rows of half 0 first."""
    scale: float = 1.0
    """Factor of the problem's gradient in `GradientEngine.backward`; scores are of the gradient without it."""

    def half(self, which: int) -> ProblemRows:
        """Return the problem with this rank's rows of one half alone."""
        return replace(
            self,
            rows=tuple(row for row, half in zip(self.rows, self.halves, strict=True) if half == which),
            halves=tuple(half for half in self.halves if half == which),
        )


@dataclass(frozen=True)
class ProblemScores:
    """What an estimator says of each problem: one entry per problem, on the CPU, identical on all ranks."""

    uid: tuple[str, ...]
    dot_P: Tensor
    """<g_i, v / |v|>, float64."""
    norm_P: Tensor | None
    """|g_i|, float64; None if the estimator cannot give it."""
    num_tokens_P: Tensor
    """Tokens scored, prompts included, int64."""
    response_derivative_PR: Tensor | None
    """d_ij = v / |v| . grad log pi(y_ij), free of any advantage, float64, one column per row of the problem, nan beyond
    its last row and where the estimator could not measure it; None if the estimator cannot give it at all."""
    direction_norm: float
    """|v| before it was normalised."""
    half_dot_P2: Tensor | None = None
    """<g_ih, v / |v|> of the two halves h of each problem's rows, float64; they add up to dot_P. nan for problems that
    were not split; None if the estimator cannot tell halves apart."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """What the estimator reports about itself, by metric name."""
    contribution_PR: Tensor | None = None
    """Each row's part of dot_P, float64, as response_derivative_PR; None where it follows from the derivative and the
    row's coefficient."""

    @property
    def cosine_P(self) -> Tensor:
        """<g_i, v> / (|g_i| |v|), float64; 0 where the gradient is exactly zero.

        Raises: ValueError if the estimator gave no norms.
        """
        if self.norm_P is None:
            raise ValueError("these scores have no norms, so no cosine; use an estimator that gives norms, e.g. ghost")
        return ratio(self.dot_P, self.norm_P)


@dataclass(frozen=True)
class Measurements:
    """What a score may look at: the live candidates, their responses, and what the probe measured of them.

    Tensors are float64 on the CPU; columns beyond a problem's responses are nan. The gradients are those of a loss, so
    a positive `dot` is good, and d_ij, the derivative of a log-probability along the loss gradient v, is *negative*
    where v's descent makes the response more likely.
    """

    problem_id_P: Tensor
    """Row in the train files, int64."""
    success_PR: Tensor
    """1 where the response's reward is above success_threshold, else 0."""
    advantage_PR: Tensor
    """A_ij; nan where a response's tokens have different advantages."""
    half_PR: Tensor
    """0 or 1: the half of the group that a response counts to when reliability is measured; -1 beyond."""
    num_candidates: int
    """All candidates of the selection, dead and failed ones included."""
    dot_P: Tensor
    """<g_i, v / |v|>; nan if nothing was measured (scores of rewards alone)."""
    norm_P: Tensor
    """|g_i|; nan if it was not measured."""
    derivative_PR: Tensor
    """d_ij = v / |v| . grad log pi(y_ij); nan if it was not measured."""
    contribution_PR: Tensor
    """The response's part of dot_P, c_ij d_ij; nan if it was not measured."""
    half_dot_P2: Tensor
    """The halves' parts of dot_P; nan if they were not measured."""
    direction_norm: float
    """|v| before it was normalised; nan without a direction."""

    @property
    def success_rate_P(self) -> Tensor:
        """Return p_i, the share of successes."""
        return self.success_PR.nanmean(dim=1)

    @property
    def dot_error_P(self) -> Tensor:
        """Return the standard error of dot: how much it varies with the responses that were drawn.

        Of n contributions x that add up to dot, sqrt(n / (n - 1) sum (x - mean)^2); where they were not measured, of
        the two halves |h_0 - h_1|, which has one degree of freedom only. nan where neither is known.
        """
        count_P = self.contribution_PR.isfinite().sum(dim=1).double()
        deviation_PR = self.contribution_PR - self.contribution_PR.nanmean(dim=1, keepdim=True)
        variance_P = deviation_PR.square().nansum(dim=1) * count_P / (count_P - 1)
        by_half_P = (self.half_dot_P2[:, 0] - self.half_dot_P2[:, 1]).abs()
        return torch.where(count_P > 1, variance_P.sqrt(), by_half_P)

    @property
    def error_freedom_P(self) -> Tensor:
        """Return the degrees of freedom that dot_error is estimated with, float64; 0 where it is not known."""
        count_P = self.contribution_PR.isfinite().sum(dim=1).double()
        return torch.where(count_P > 1, count_P - 1, self.half_dot_P2.isfinite().all(dim=1).double())

    @property
    def cosine_P(self) -> Tensor:
        """Return <g_i, v> / (|g_i| |v|), 0 where the gradient is exactly zero."""
        return ratio(self.dot_P, self.norm_P)


def ratio(numerator_P: Tensor, denominator_P: Tensor) -> Tensor:
    """Return the elementwise ratio, 0 where the denominator is exactly 0 (and nan where anything is)."""
    is_zero_P = denominator_P == 0
    return torch.where(is_zero_P, torch.zeros_like(numerator_P), numerator_P / denominator_P.masked_fill(is_zero_P, 1))


@dataclass(frozen=True)
class Selection:
    """Which candidates are trained on, and why the others are not. Candidates are known by their position."""

    kept: np.ndarray
    """Positions, int64, best first."""
    reason_P: np.ndarray
    """Index into `selection.select.REASONS` of every candidate, int8."""


@dataclass(frozen=True)
class Picks:
    """The problems that a forecast chose for a step, one entry each, and what was forecast of them at that time."""

    problem_id_P: np.ndarray
    """Rows in the train files, int64, none twice, in the order in which they are rolled out."""
    mean_P: np.ndarray
    """Forecast score, float64."""
    deviation_P: np.ndarray
    """Standard deviation of the forecast, float64."""
    is_uniform_P: np.ndarray
    """Whether the problem was drawn uniformly, whatever its forecast: a random sample of what may be drawn."""


@dataclass(frozen=True)
class Observations:
    """What a step measured of the problems that it rolled out, for the forecast; one entry per problem."""

    problem_id_P: np.ndarray
    """Rows in the train files, int64."""
    value_P: np.ndarray
    """The score, float64; 0 for a dead group; nan where nothing was learnt of the problem: its group failed, or the
    measurement is not finite."""
    error_P: np.ndarray
    """Standard error of the score, from the spread of the responses, float64; nan where it is not known, as for a dead
    group."""
    response_tokens_P: np.ndarray
    """Mean length of the responses, float64; nan where there are none."""
