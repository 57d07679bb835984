# SPDX-License-Identifier: Apache-2.0
"""Exact scores of many problems from ordinary passes over all of them: taps cut the gradient at problem boundaries.

One forward and one activation-gradient backward for each micro-batch of whole problems. Each layer's gradient is
formed problem by problem where its backward passes, reduced to numbers, and dropped: no weight gradient is kept, none
is communicated. Costs about as much as an update over the same tokens.

    scores = GhostEstimator().score(engine, candidates, direction)

Shape legend: P problems, R rows, T response tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.direction_gather import gathered_where_it_fits
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.score_estimator import ScoreEstimator
from verl_gradalign.probe.fsdp import reshard
from verl_gradalign.probe.gradient import require_no_gradients
from verl_gradalign.probe.gradient_sum import GradientSum, WholeSum, gradient_sum
from verl_gradalign.probe.head import plain_head
from verl_gradalign.probe.passes import MicroBatch, ProblemSums, micro_batches, pass_weights, summed_over_ranks
from verl_gradalign.probe.tap_points import TapPoint, require_gradients, tap_points
from verl_gradalign.probe.taps import Gather, tapped
from verl_gradalign.types import ProblemRows, ProblemScores


class GhostEstimator(ScoreEstimator):
    """Taps on every layer with trainable parameters."""

    is_exact = True
    gives_norm = True

    def check(self, module: nn.Module) -> None:
        """Raise ValueError, naming the layers and the remedy, if the scores of this model would not be exact."""
        tap_points(module)

    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return the scores of `problems` along `direction`. Collective; see `tapped_scores`."""
        points = tap_points(engine.module)
        gather = gathered_where_it_fits(engine, direction, [use for point in points for use in point.placements])
        per_response, total = self._config.response_derivatives, gradient_sum(self._config)
        return tapped_scores(engine, problems, direction.norm, points, gather, per_response, gradient=total)


def tapped_scores(
    engine: GradientEngine,
    problems: Sequence[ProblemRows],
    direction_norm: float,
    points: Sequence[TapPoint],
    gather: Gather,
    per_response: bool,
    gives_norm: bool = True,
    after_pass: Callable[[MicroBatch], None] = lambda batch: None,
    gradient: GradientSum | None = None,
) -> ProblemScores:
    """Return the scores of `problems` over the parameters of the tapped layers. Collective.

    Each problem's rows lie on one rank, or on ranks that share them. Of a problem that no micro-batch holds, the
    gradient is added up over several for its norm, by default whole: as much memory as all tapped parameters in
    float32. Response derivatives are measured `per_response` only; a row whose tokens have different coefficients gets
    nan for its own. A degenerate direction gives dot products of zero and the true norms.

    Diagnostics: `oversized_norm_error` where `gradient` estimates norms, their standard errors as shares of them (root
    mean square), as far as the estimates can tell from themselves.

    Units: dot products and norms are of the gradient of sum_t c_t log pi(y_t).
    Raises: RuntimeError if gradients are present on entry, or if a layer is called twice or not at all; ValueError
        if a response alone exceeds the budget, or if a layer rule does not give what norms are made of here.
    """
    require_no_gradients(engine.module)
    if gives_norm:  # asked of what all ranks know: one alone that stopped would leave the others waiting
        if any(not engine.budget.holds([problem]) for problem in problems):
            why, remedy = "a problem is larger than a micro-batch", "set gradalign.probe.oversized=backward"
            require_gradients(points, why, remedy)
        if engine.sequence_group is not None:
            require_gradients(points, "ranks have slices of its rows", "set gradalign.estimator=backward")
    device = engine.device
    sums, gradient = ProblemSums(problems), gradient or WholeSum()
    variance_P = torch.zeros(len(problems), dtype=torch.float64)
    with tapped(engine.module, points, gather, gives_norm, head=plain_head(engine)) as taps:
        for batch in micro_batches(engine, problems):
            log_prob_RT, layout = taps.forward(engine, batch.rows, batch.rows_per_problem)
            width, dtype = log_prob_RT.shape[1], log_prob_RT.dtype
            weight_RT, scale_R, gives_R = pass_weights(engine, batch, width, dtype, per_response)
            parts, is_summed = None if per_response else batch.parts, gives_norm and not batch.is_whole
            taps.begin(layout, scale_R.to(device), parts, gradient if is_summed else None)
            # Of activations only: `tapped` has frozen every weight, and the taps drop what they form of one.
            (weight_RT.to(device) * log_prob_RT).sum().backward()  # type: ignore[no-untyped-call]
            measured = taps.end()
            # FSDP1 puts parameters back after a backward that gave them gradients, and these have none.
            reshard(engine.module)
            # In float64: a small scale times a small derivative would be rounded, or lost.
            derivative_R = measured.derivative_R.double().cpu()
            if per_response:
                sums.add_rows(batch, derivative_R * scale_R, derivative_R.masked_fill(~gives_R, torch.nan))
            else:
                sums.add_parts(batch, derivative_R * scale_R)
            if batch.is_whole:
                sums.add_norms(batch, measured.squared_norm_P)
            elif is_summed and batch.is_last:
                squared_norm, variance = gradient.finish(layout)
                sums.add_norms(batch, squared_norm)
                variance_P[list(batch.problems)] += variance.double().cpu()
            after_pass(batch)
    scores = sums.reduce(engine, direction_norm)
    return replace(
        scores,
        diagnostics={} if gradient.is_exact else _norm_error(scores, summed_over_ranks(engine, variance_P)),
        norm_P=scores.norm_P if gives_norm else None,
        response_derivative_PR=scores.response_derivative_PR if per_response else None,
    )


def _norm_error(scores: ProblemScores, variance_P: Tensor) -> dict[str, float]:
    """Return the diagnostic of estimated norms, by the variance of their squares; nothing where none was estimated."""
    assert scores.norm_P is not None
    is_estimated_P = (variance_P > 0) & (scores.norm_P > 0) & scores.norm_P.isfinite()
    if not is_estimated_P.any():
        return {}
    # Of a norm half the relative error of its square.
    squared_P = variance_P / (2 * scores.norm_P.square()).square()
    return {"oversized_norm_error": squared_P[is_estimated_P].mean().sqrt().item()}
