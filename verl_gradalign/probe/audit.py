# SPDX-License-Identifier: Apache-2.0
"""Scores as configured, and some of them checked against `backward` in the same call.

An exact estimator is watched by a canary: the largest error of a few problems, as a share of their gradients' norms.
An approximate one reports its fidelity: the rank correlation with the exact dot products of a few problems.

    scores = audited_scores(engine, problems, direction, estimator, audited=(3, 17))
    scores.diagnostics["canary/relative_error"]

Shape legend: P problems.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators import ScoreEstimator
from verl_gradalign.probe.estimators.backward import BackwardEstimator
from verl_gradalign.rank_correlation import MIN_RANKED, spearman
from verl_gradalign.types import ProblemRows, ProblemScores

logger = logging.getLogger(__name__)


def audited_scores(
    engine: GradientEngine,
    problems: Sequence[ProblemRows],
    direction: Direction,
    estimator: ScoreEstimator,
    audited: Sequence[int] = (),
    oversized: str = "stop",
) -> ProblemScores:
    """Return the estimator's scores of `problems`, with diagnostics of the audited ones. Collective.

    Problems larger than the engine's budget go to `backward` if `oversized` says so; their rows may be spread over
    ranks, and they are not audited. Diagnostics: `oversized`, and `canary/relative_error` (exact estimators) or
    `fidelity/spearman` (approximate ones) where problems were audited.

    Raises: ValueError if a problem is larger than the budget and `oversized` is `stop`.
    """
    exact = BackwardEstimator()
    # By the whole problem's size, which all ranks know: each takes the same decision without asking.
    too_large: list[int] = []
    if estimator.needs_whole_problems:
        too_large = [i for i, problem in enumerate(problems) if not engine.budget.holds([problem])]
    if too_large and oversized == "stop":
        first = problems[too_large[0]]
        raise ValueError(
            f"problem {first.uid} takes {engine.budget.positions([first])} positions, more than the "
            f"{engine.budget.max_tokens} of a micro-batch. Remedy: raise gradalign.probe.max_tokens_per_rank, or set "
            "gradalign.probe.oversized=backward"
        )
    fitting = [i for i in range(len(problems)) if i not in set(too_large)]
    scores = estimator.score(engine, [problems[i] for i in fitting], direction)
    diagnostics = {**scores.diagnostics, "oversized": float(len(too_large))}
    checked = [i for i in audited if i in set(fitting)]
    if checked:
        reference = exact.score(engine, [problems[i] for i in checked], direction)
        places = torch.tensor([fitting.index(i) for i in checked])
        if estimator.is_exact:
            diagnostics["canary/relative_error"] = relative_error(scores, reference, places)
        elif len(checked) >= MIN_RANKED:
            diagnostics["fidelity/spearman"] = spearman(scores.dot_P[places], reference.dot_P)
    if too_large:
        scores = _merged(problems, scores, exact.score(engine, [problems[i] for i in too_large], direction))
    return replace(scores, diagnostics=diagnostics)


def relative_error(scores: ProblemScores, reference: ProblemScores, places: Tensor) -> float:
    """Return the largest error of dot products and norms at `places`, as a share of the reference's norms.

    A dot product near zero has no relative error of its own; what is lost of a gradient shows against its norm. Nor
    has a gradient that cancels (equal responses with unequal rewards), of which rounding is all that is left: norms
    count as no less than the median of all problems' norms. Problems whose reference overflowed (fp16) are left out.
    """
    assert reference.norm_P is not None
    is_known_P = reference.norm_P.isfinite()
    if not is_known_P.any():
        return 0.0
    errors_P = (scores.dot_P[places] - reference.dot_P).abs()
    if scores.norm_P is not None:
        errors_P = errors_P.maximum((scores.norm_P[places] - reference.norm_P).abs())
    norm_P = reference.norm_P.clamp(min=torch.finfo(torch.float64).tiny)
    if scores.norm_P is not None:
        norm_P = norm_P.maximum(scores.norm_P.nanmedian())
    return (errors_P / norm_P)[is_known_P].nan_to_num(nan=torch.inf).max().item()


def _merged(problems: Sequence[ProblemRows], scores: ProblemScores, rest: ProblemScores) -> ProblemScores:
    """Return the scores of both in the order of `problems`; the rest has no response derivatives."""
    place_of = {uid: place for place, uid in enumerate([*scores.uid, *rest.uid])}
    order_P = torch.tensor([place_of[problem.uid] for problem in problems])
    norm_P = None
    if scores.norm_P is not None and rest.norm_P is not None:
        norm_P = torch.cat([scores.norm_P, rest.norm_P])[order_P]
    derivative_PR = scores.response_derivative_PR
    if derivative_PR is not None:
        unknown_PR = torch.full((len(rest.uid), derivative_PR.shape[1]), torch.nan, dtype=derivative_PR.dtype)
        derivative_PR = torch.cat([derivative_PR, unknown_PR])[order_P]
    half_dot_P2 = None
    if scores.half_dot_P2 is not None and rest.half_dot_P2 is not None:
        half_dot_P2 = torch.cat([scores.half_dot_P2, rest.half_dot_P2])[order_P]
    return replace(
        scores,
        uid=tuple(problem.uid for problem in problems),
        dot_P=torch.cat([scores.dot_P, rest.dot_P])[order_P],
        norm_P=norm_P,
        num_tokens_P=torch.cat([scores.num_tokens_P, rest.num_tokens_P])[order_P],
        response_derivative_PR=derivative_PR,
        half_dot_P2=half_dot_P2,
    )
