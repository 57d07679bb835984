# SPDX-License-Identifier: Apache-2.0
"""Candidates compared with their own pool, exactly: the pool's gradient is a direction like any other.

LearnAlign scores problem i by the row mean of w_i w_j cos(g_i, g_j), self included. With u = sum_j w_j g_j / |g_j| that
is w_i <g_i, u> / (|g_i| n): one pass for the norms, one for u, one along u. The reference code's variant compares with
u = sum_j g_j, whose norms it does not need first. `sketch.sketched_scores` estimates the same in one pass.

    scores = pool_scores(engine, candidates, weights, score)
    learnalign_P = weight_P * scores.cosine_P * scores.direction_norm / len(candidates)

Shape legend: P problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from verl_gradalign.probe.direction import Direction, compute_direction, no_direction
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.types import ProblemRows, ProblemScores

Scorer = Callable[..., ProblemScores]
"""Scores (problems, direction, audited=()), e.g. around `audit.audited_scores`. Collective."""


def pool_scores(
    engine: GradientEngine,
    problems: Sequence[ProblemRows],
    weights: Sequence[float] | None,
    score: Scorer,
    audited: tuple[int, ...] = (),
) -> ProblemScores:
    """Return the scores of `problems` along u = sum_j w_j g_j / |g_j| of their own, or without weights sum_j g_j.
    Collective.

    With weights, problems whose norm is zero or not finite are left out of u. Where none is left, the direction's norm
    is 0 and so are the dot products. Only the pass along u is audited.

    Raises: ValueError if `score` gives no norms.
    Source: LearnAlign (arXiv 2506.11480) section 3; `align` of GradAlign's reference code (arXiv 2602.21492).
    """
    if not problems:
        direction = no_direction(engine.module)
    elif weights is None:
        direction = compute_direction(engine, problems)
    else:
        norm_P = _norms(score(problems, no_direction(engine.module)))
        direction = _unit_sum(engine, problems, weights, norm_P.tolist())
    scores = score(problems, direction, audited=audited)
    _norms(scores)
    return scores


def _unit_sum(
    engine: GradientEngine, problems: Sequence[ProblemRows], weights: Sequence[float], norms: Sequence[float]
) -> Direction:
    """Return the direction of sum_j w_j g_j / |g_j|. Collective; the norms are the same on all ranks."""
    weighted = zip(problems, weights, norms, strict=True)
    known = [(problem, w, norm) for problem, w, norm in weighted if w > 0 and 0 < norm < math.inf]
    if not known:
        return no_direction(engine.module)
    # An fp16 scaler is used to gradients of the candidates' size; those of size 1 may overflow under it.
    size = sum(norm for _, _, norm in known) / len(known)
    direction = compute_direction(engine, [replace(p, scale=size * w / norm) for p, w, norm in known])
    return replace(direction, norm=direction.norm / size)


def _norms(scores: ProblemScores) -> Tensor:
    if scores.norm_P is None:
        raise ValueError(
            "the estimator gives no gradient norms, which candidates are compared with their own pool by. Remedy: set "
            "gradalign.estimator=ghost."
        )
    return scores.norm_P
