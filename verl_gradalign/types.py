# SPDX-License-Identifier: Apache-2.0
"""The nouns that the parts of the package exchange: problems in, scores and a selection out.

Shape legend: P problems, R responses of a problem, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    """d_ij = v / |v| . grad log pi(y_ij), free of any advantage; None if the estimator cannot give it."""
    direction_norm: float
    """|v| before it was normalised."""


@dataclass(frozen=True)
class Selection:
    """Which candidates are trained on, and why the others are not."""

    kept: tuple[str, ...]
    """uids, best first."""
    reasons: dict[str, str]
    """uid of every candidate -> why it was kept or rejected; one of `selection.select.REASONS`."""
