# SPDX-License-Identifier: Apache-2.0
"""Scores as configured, and some of them checked against `backward` in the same call.

An exact estimator is watched by a canary: the largest error of a few problems, as a share of their gradients' norms.
An approximate one reports its fidelity: the rank correlation with the exact dot products of a few problems.

    scores = audited_scores(engine, problems, direction, estimator, audited=(3, 17))
    scores.diagnostics["canary/relative_error"]

Shape legend: P problems.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.backward import BackwardEstimator
from verl_gradalign.probe.estimators.score_estimator import ScoreEstimator
from verl_gradalign.rank_correlation import MIN_RANKED, spearman
from verl_gradalign.types import ProblemRows, ProblemScores


def audited_scores(
    engine: GradientEngine,
    problems: Sequence[ProblemRows],
    direction: Direction,
    estimator: ScoreEstimator,
    audited: Sequence[int] = (),
    oversized: str = "stop",
) -> ProblemScores:
    """Return the estimator's scores of `problems`, with diagnostics of the audited ones. Collective.

    Problems larger than the engine's budget go to `backward` if `goes_to_backward`; their rows may be spread over
    ranks, and they are not audited, nor are those whose norms are estimated. Diagnostics: `oversized`, how many are
    larger than the budget; `canary/relative_error` (exact estimators) or `fidelity/spearman` (approximate ones) where
    problems were audited.

    Raises: ValueError if a problem is larger than the budget and `oversized` is `stop`.
    """
    exact = BackwardEstimator()
    too_large: set[int] = set()
    if estimator.needs_whole_problems:
        if oversized == "stop":
            remedy = "raise gradalign.probe.max_tokens_per_rank, or set gradalign.probe.oversized=accumulate"
            engine.budget.require_room(problems, remedy)
        # By the whole problem's size, which all ranks know: each takes the same decision without asking.
        too_large = {i for i, problem in enumerate(problems) if not engine.budget.holds([problem])}
    left = too_large if goes_to_backward(type(estimator), oversized) else set()
    fitting = [i for i in range(len(problems)) if i not in left]
    place_of = {index: place for place, index in enumerate(fitting)}
    scores = estimator.score(engine, [problems[i] for i in fitting], direction)
    diagnostics = {**scores.diagnostics, "oversized": float(len(too_large))}
    is_estimated = estimator.gives_norm and oversized == "sketch"
    checked = [i for i in audited if i in place_of and not (is_estimated and i in too_large)]
    if checked:
        reference = exact.score(engine, [problems[i] for i in checked], direction)
        places = torch.tensor([place_of[i] for i in checked])
        if estimator.is_exact:
            diagnostics["canary/relative_error"] = relative_error(scores, reference, places)
        elif len(checked) >= MIN_RANKED:
            diagnostics["fidelity/spearman"] = spearman(scores.dot_P[places], reference.dot_P)
    if left:
        scores = _merged(problems, scores, exact.score(engine, [problems[i] for i in sorted(left)], direction))
    return replace(scores, diagnostics=diagnostics)


def goes_to_backward(estimator: type[ScoreEstimator], oversized: str) -> bool:
    """Return whether problems that no micro-batch holds are not this estimator's, by `probe.oversized`.

    Without a norm nothing is to be added up: they run in several micro-batches in any case.
    """
    return estimator.needs_whole_problems and estimator.gives_norm and oversized == "backward"


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
    norm_P = reference.norm_P.clamp(min=torch.finfo(torch.float64).tiny)
    if scores.norm_P is not None:
        errors_P = errors_P.maximum((scores.norm_P[places] - reference.norm_P).abs())
        norm_P = norm_P.maximum(scores.norm_P.nanmedian())
    return (errors_P / norm_P)[is_known_P].nan_to_num(nan=torch.inf).max().item()


def _merged(problems: Sequence[ProblemRows], scores: ProblemScores, rest: ProblemScores) -> ProblemScores:
    """Return the scores of both in the order of `problems`; the rest has no response derivatives."""
    place_of = {uid: place for place, uid in enumerate([*scores.uid, *rest.uid])}
    order_P = torch.tensor([place_of[problem.uid] for problem in problems])
    if scores.response_derivative_PR is not None:
        shape = (len(rest.uid), scores.response_derivative_PR.shape[1])
        rest = replace(rest, response_derivative_PR=scores.response_derivative_PR.new_full(shape, torch.nan))
    columns: dict[str, Any] = {}
    for name in ("dot_P", "norm_P", "num_tokens_P", "response_derivative_PR", "half_dot_P2"):
        first, second = getattr(scores, name), getattr(rest, name)
        columns[name] = None if first is None or second is None else torch.cat([first, second])[order_P]
    return replace(scores, uid=tuple(problem.uid for problem in problems), **columns)
