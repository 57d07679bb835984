# SPDX-License-Identifier: Apache-2.0
"""What candidates are ranked by. A score is a pure function of `ProblemScores`; higher is better.

Shape legend: P problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from verl_gradalign.types import ProblemScores


@dataclass(frozen=True)
class Score:
    """A named ranking.

    `rank` is None for a score that needs no gradients: then no candidates beyond the batch are rolled out, and
    nothing is measured.
    """

    rank: Callable[[ProblemScores], Tensor] | None
    needs_direction: bool
    needs_norm: bool
    needs_response_derivatives: bool = False


def cosine(scores: ProblemScores) -> Tensor:
    """Return <g_i, v> / (|g_i| |v|) of each problem, 0 where the gradient is exactly zero.

    Source: GradAlign (arXiv 2602.21492), its default score.
    """
    return scores.cosine_P


def dot(scores: ProblemScores) -> Tensor:
    """Return <g_i, v / |v|> of each problem. Source: GradAlign's `dot` variant."""
    return scores.dot_P


SCORES: dict[str, Score] = {
    "cosine": Score(cosine, needs_direction=True, needs_norm=True),
    "dot": Score(dot, needs_direction=True, needs_norm=False),
    "random": Score(None, needs_direction=False, needs_norm=False),
}
