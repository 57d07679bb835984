# SPDX-License-Identifier: Apache-2.0
"""Layer rules for products alone: each row's gradient times the direction, position by position, without norms.

Nothing of a weight's size is formed, and rows need not be whole problems. With dW along v, a linear layer's product at
a position is delta . (V input + v_bias): the derivative of the layer's output along v, times the output's gradient.

    points = product_points(module)                     # rules that want whole matrices
    points = product_points(module, are_factored=True)  # rules that want them cut (estimators/low_rank.py)

Shape legend: N positions, I input features, O output features, D normalised features, H hidden features, R rows.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from verl_gradalign.probe import expert_rules, layer_rules
from verl_gradalign.probe.estimators import low_rank
from verl_gradalign.probe.layer_rules import LayerCall, LayerRule, LayerScores, embedding_delta
from verl_gradalign.probe.layout import row_sums
from verl_gradalign.probe.tap_points import TapPoint, tap_points


def product_points(root: nn.Module, are_factored: bool = False) -> list[TapPoint]:
    """Return the layers to tap, with rules for products; a rule of the user's stays, and its norms are not used.

    Raises: ValueError as `tap_points`, and as `low_rank_points` if they are to be factored. Call it while sharded.
    """
    points = low_rank.low_rank_points(root) if are_factored else tap_points(root)
    return [replace(point, rule=PRODUCTS.get(point.rule, point.rule)) for point in points]


def linear(call: LayerCall) -> LayerScores:
    """Linear layers, with and without bias: delta . (V input + v_bias), or (delta V) . input where that is narrower."""
    weight_OI, bias_O, delta_NO = call.direction.get("weight"), call.direction.get("bias"), call.delta
    if weight_OI is None:
        return scores(delta_NO.to(call.dtype) @ call.direction["bias"].to(call.dtype), call)
    weight_OI, input_NI = weight_OI.to(delta_NO.dtype), call.input.to(delta_NO.dtype)
    num_outputs, num_inputs = weight_OI.shape
    if bias_O is None and num_outputs > num_inputs:
        return scores(dots(delta_NO @ weight_OI, input_NI, call.dtype), call)
    bias_O = None if bias_O is None else bias_O.to(delta_NO.dtype)
    return scores(dots(nn.functional.linear(input_NI, weight_OI, bias_O), delta_NO, call.dtype), call)


def embedding(call: LayerCall) -> LayerScores:
    """Embeddings: delta . V[token], and nothing at the padding index."""
    layer_rules.require_plain_embedding(call.module)
    rows_NH = call.direction["weight"][call.input].to(call.delta.dtype)
    return scores(dots(embedding_delta(call), rows_NH, call.dtype), call)


def factored_linear(call: LayerCall) -> LayerScores:
    """Linear layers with a factored matrix: (delta L) . (input R), and delta . v_bias beside it."""
    stacked, bias_O, delta_NO = call.direction.get("weight"), call.direction.get("bias"), call.delta
    if stacked is None:
        return linear(call)
    left_OK, right_IK = torch.split(stacked.to(delta_NO.dtype), [delta_NO.shape[-1], call.input.shape[-1]])
    right_NK = call.input.to(delta_NO.dtype) @ right_IK
    if bias_O is not None:
        # One more column of each: one pass over delta gives the bias' part too.
        left_OK = torch.cat([left_OK, bias_O.to(delta_NO.dtype).unsqueeze(1)], dim=1)
        right_NK = torch.cat([right_NK, right_NK.new_ones(len(right_NK), 1)], dim=1)
    return scores(dots(delta_NO @ left_OK, right_NK, call.dtype), call)


def rms_norm(call: LayerCall) -> LayerScores:
    """RMSNorm, also where the weight is an offset from one: delta . (v * normalised input)."""
    input_ND = call.input.to(call.dtype)
    factor_N = layer_rules.inverse_rms(call.module, input_ND)
    product_N = (input_ND * call.delta) @ call.direction["weight"].to(call.dtype)
    return scores(product_N * factor_N, call)


def layer_norm(call: LayerCall) -> LayerScores:
    """LayerNorm over the last axis: delta . (v * normalised input + v_bias)."""
    input_ND, epsilon = call.input.to(call.dtype), layer_rules.epsilon_of(call.module)
    parts: dict[str, Any] = {name: value.to(call.dtype) for name, value in call.direction.items()}
    weight_D, bias_D = parts.get("weight"), parts.get("bias")
    if weight_D is None:
        return scores(call.delta.to(call.dtype) @ parts["bias"], call)
    change_ND = nn.functional.layer_norm(input_ND, input_ND.shape[-1:], weight_D, bias_D, cast(float, epsilon))
    return scores(dots(change_ND, call.delta, call.dtype), call)


def experts(call: LayerCall) -> LayerScores:
    """Experts: of each matrix (delta V) . input at the positions that the expert got."""
    product_N = call.scale_R.new_zeros(len(call.delta))
    for part in expert_rules.expert_parts(call):
        for name, delta_MO, input_MI in part.products:
            direction_OI = call.direction[name][part.expert].to(delta_MO.dtype)
            product_M = dots(delta_MO @ direction_OI, input_MI.to(delta_MO.dtype), call.dtype)
            product_N.index_add_(0, part.position_M, product_M)
    return scores(product_N, call)


def dots(first_NF: Tensor, second_NF: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the inner products of rows of two matrices, added up in `dtype`, (positions,)."""
    if first_NF.dtype == dtype == second_NF.dtype:
        return torch.linalg.vecdot(first_NF, second_NF)
    return (first_NF * second_NF).sum(-1, dtype=dtype)


def scores(product_N: Tensor, call: LayerCall) -> LayerScores:
    """Return products of positions as those of rows, and zeros for norms."""
    derivative_R = row_sums(product_N, call.layout, call.dtype)
    return LayerScores(derivative_R, call.scale_R.new_zeros(call.layout.num_problems))


PRODUCTS: dict[LayerRule, Callable[[LayerCall], LayerScores]] = {
    layer_rules.linear: linear,
    layer_rules.embedding: embedding,
    layer_rules.rms_norm: rms_norm,
    layer_rules.layer_norm: layer_norm,
    expert_rules.experts: experts,
    low_rank.linear: factored_linear,
}
"""The rules of other modules that give norms too, or that add them up row by row, and those for products alone."""
