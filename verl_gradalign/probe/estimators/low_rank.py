# SPDX-License-Identifier: Apache-2.0
"""Dot products with a direction cut to a few singular directions per matrix: one backward without weight gradients.

Each matrix of the direction becomes L R^T of rank r; vectors stay whole. The products cost r instead of a whole
matrix, and no gradient is formed, so there are no norms. |dot - dot_r| <= |g| |V - V_r|, and the energy kept,
|V_r|^2 / |V|^2, is known and reported.

    scores = LowRankEstimator(ProbeConfig(rank=16)).score(engine, candidates, direction)

Shape legend: O output features (or tokens of the vocabulary), I input features, K the rank, N positions, R rows, M
positions of one expert. Experts' matrices have one axis more in front.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from verl_gradalign.probe import expert_rules, layer_rules
from verl_gradalign.probe.cut_direction import cut_direction
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.direction_gather import DirectionGather
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.ghost import tapped_scores
from verl_gradalign.probe.estimators.score_estimator import ScoreEstimator
from verl_gradalign.probe.fsdp import Placement
from verl_gradalign.probe.layer_rules import LayerCall, LayerRule, LayerScores, embedding_delta, weight_and_bias
from verl_gradalign.probe.layout import row_sums
from verl_gradalign.probe.tap_points import TapPoint, distinct_uses, tap_points
from verl_gradalign.types import ProblemRows, ProblemScores

POWER_ITERATIONS = 4


class LowRankEstimator(ScoreEstimator):
    """Taps as in `ghost`, with a truncated direction and rules that never form a gradient."""

    def check(self, module: nn.Module) -> None:
        """Raise ValueError, naming the layers and the remedy, if a layer has no rule."""
        low_rank_points(module)

    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return the scores of `problems` along the truncated direction. Collective; see `ghost.tapped_scores`."""
        points = low_rank_points(engine.module)
        whole = DirectionGather(engine.module, direction, engine.device)
        uses, rank = distinct_uses(points), self._config.rank
        parts, energy_kept = cut_direction(whole, uses, rank, engine.data_group, POWER_ITERATIONS)

        def gather(placement: Placement) -> Tensor:
            return parts[placement.identity]

        scores = tapped_scores(engine, problems, direction.norm, points, gather, per_response=True, gives_norm=False)
        return replace(scores, diagnostics={"energy_kept": energy_kept})


def low_rank_points(root: nn.Module) -> list[TapPoint]:
    """Return the taps of `ghost` with the rules of matrices replaced. Raises ValueError as `tap_points`."""
    rules = {nn.Linear: linear, nn.Embedding: embedding}
    named: dict[LayerRule, LayerRule] = {expert_rules.experts: experts, layer_rules.linear: linear}
    points = []
    for point in tap_points(root):
        rule = next((rules[base] for base in type(point.module).__mro__ if base in rules), named.get(point.rule))
        if rule is None and point.has_matrix:
            trouble = f"{point.name} ({type(point.module).__name__}) has a matrix but no low-rank rule"
            raise ValueError(f"{trouble}. Remedy: set gradalign.estimator=ghost (exact) or finite_difference.")
        points.append(replace(point, rule=rule or point.rule))
    return points


def linear(call: LayerCall) -> LayerScores:
    """Return the products sum_t (delta_t L) . (input_t R), and zeros for norms of the weight."""

    def of_weight(stacked: Tensor) -> LayerScores:
        num_inputs = call.input.shape[-1]
        left_OK, right_IK = torch.split(stacked.to(call.delta.dtype), [len(stacked) - num_inputs, num_inputs])
        left_OK = left_OK[call.outputs]
        # Narrow products in the layer's dtype, their sum in the accumulation dtype.
        product_NK = (call.delta @ left_OK) * (call.input.to(call.delta.dtype) @ right_IK)
        return _products_only(product_NK.sum(-1, dtype=call.dtype), call)

    return weight_and_bias(call, of_weight)


def embedding(call: LayerCall) -> LayerScores:
    """Return the products sum_t (delta_t R) . L[token_t], and zeros for norms."""
    num_tokens: int = call.module.num_embeddings  # type: ignore[assignment]
    left_OK, right_IK = torch.split(call.direction["weight"].to(call.dtype), [num_tokens, call.delta.shape[-1]])
    product_NK = (embedding_delta(call).to(call.dtype) @ right_IK) * left_OK[call.input]
    return _products_only(product_NK.sum(-1), call)


def experts(call: LayerCall) -> LayerScores:
    """Return the products of each expert's matrices, and zeros for norms."""
    product_N = call.scale_R.new_zeros(len(call.delta))
    for part in expert_rules.expert_parts(call):
        for name, delta_MO, input_MI in part.products:
            stacked = call.direction[name][part.expert].to(delta_MO.dtype)
            left_OK, right_IK = torch.split(stacked, [delta_MO.shape[-1], input_MI.shape[-1]])
            product_MK = (delta_MO @ left_OK) * (input_MI.to(delta_MO.dtype) @ right_IK)
            product_N.index_add_(0, part.position_M, product_MK.sum(-1, dtype=call.dtype))
    return _products_only(product_N, call)


def _products_only(product_N: Tensor, call: LayerCall) -> LayerScores:
    derivative_R = row_sums(product_N, call.layout, call.dtype)
    return LayerScores(derivative_R, call.scale_R.new_zeros(call.layout.num_problems))
