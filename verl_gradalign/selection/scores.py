# SPDX-License-Identifier: Apache-2.0
"""What candidates are ranked by. A score is a pure function of `ProblemScores`; higher is better.

Shape legend: P problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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


def cosine(scores: ProblemScores) -> Tensor:
    """Return <g_i, v> / (|g_i| |v|) of each problem, 0 where the gradient is exactly zero.

    Source: GradAlign (arXiv 2602.21492), its default score.
    """
    assert scores.norm_P is not None, "config.GradAlignConfig admits cosine only with an estimator that gives norms"
    is_zero_P = scores.norm_P == 0
    return torch.where(
        is_zero_P, torch.zeros_like(scores.dot_P), scores.dot_P / scores.norm_P.masked_fill(is_zero_P, 1.0)
    )


def dot(scores: ProblemScores) -> Tensor:
    """Return <g_i, v / |v|> of each problem. Source: GradAlign's `dot` variant."""
    return scores.dot_P


SCORES: dict[str, Score] = {
    "cosine": Score(cosine, needs_direction=True, needs_norm=True),
    "dot": Score(dot, needs_direction=True, needs_norm=False),
    "random": Score(None, needs_direction=False, needs_norm=False),
}
