# SPDX-License-Identifier: Apache-2.0
"""Layer rules of mixtures of experts as transformers builds them: a router, and experts' matrices in two parameters.

Experts are given hidden states, and of each position the experts that it goes to and their weights. What an expert
makes of its positions is computed once more in the backward pass; each of its matrices is then a linear layer over
these positions. A router's logits are one linear product, whatever it makes of them, and tapped as a linear layer is.

Source: transformers' `integrations.moe.use_experts_implementation`, whose attributes say how experts are built.

Shape legend: N positions, K experts of each, E experts, M positions of one expert, H hidden features, G gate and up
features, I what comes of them, R rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from verl_gradalign.probe.layer_rules import (
    COVERED,
    NAMED_RULES,
    OUTPUTS,
    LayerCall,
    LayerScores,
    add,
    linear,
)
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.matrix_scores import matrix_scores


def is_experts(module: nn.Module) -> bool:
    """Return whether a layer holds gated experts without biases, each matrix (outputs, inputs)."""
    built: Any = module
    # What transformers notes of it; a sharded module may have none of its parameters.
    if not all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "has_bias", "is_transposed")):
        return False
    return bool(built.has_gate and not built.has_bias and not built.is_transposed)


def is_router(module: nn.Module) -> bool:
    """Return whether a layer is a router, and has no layers in it."""
    return type(module).__name__.endswith("Router") and not list(module.children())


@dataclass(frozen=True)
class ExpertPart:
    """What one expert has of a layer's call."""

    expert: int
    position_M: Tensor
    layout: Layout
    """Of these positions."""
    products: tuple[tuple[str, Tensor, Tensor], ...]
    """Of each of its matrices the parameter's name, the gradient by the product, and what is multiplied."""


def expert_parts(call: LayerCall) -> Iterator[ExpertPart]:
    """Yield the part of each expert that has positions."""
    module = cast(Any, call.module)
    for expert, position_M, factor_M1, layout in _by_expert(call):
        input_MH, delta_MH = call.input[position_M], call.delta[position_M] * factor_M1
        matrices = (weight[expert].to(delta_MH.dtype) for weight in (module.gate_up_proj, module.down_proj))
        gate_up_GH, down_HI = matrices
        with torch.enable_grad():
            value_MG = nn.functional.linear(input_MH.to(delta_MH.dtype), gate_up_GH).detach().requires_grad_()
            inner_MI = module._apply_gate(value_MG)
        (delta_MG,) = torch.autograd.grad(inner_MI, value_MG, delta_MH @ down_HI)
        products = ("down_proj", delta_MH, inner_MI.detach()), ("gate_up_proj", delta_MG, input_MH)
        trained = tuple(product for product in products if product[0] in call.direction)
        yield ExpertPart(expert, position_M, layout, trained)


def experts(call: LayerCall) -> LayerScores:
    """Experts: two linear layers for each, over the positions that it got."""
    nothing = call.scale_R.new_zeros
    total = LayerScores(nothing(len(call.scale_R)), nothing(call.layout.num_problems))
    for part in expert_parts(call):
        for name, delta, layer_input in part.products:
            wholes, direction = call.total(name), call.direction[name][part.expert]
            whole = None if wholes is None else wholes[part.expert]
            parts = matrix_scores(delta, layer_input, direction, part.layout, call.scale_R, whole)
            total = add(total, LayerScores(*parts))
    return total


def _by_expert(call: LayerCall) -> Iterator[tuple[int, Tensor, Tensor, Layout]]:
    """Yield each expert with its positions, their weights, and the layout of these positions."""
    expert_NK, weight_NK = call.further
    num_experts, num_rows, device = len(cast(Any, call.module).down_proj), call.layout.num_rows, call.delta.device
    expert_S, order_S = expert_NK.flatten().sort(stable=True)
    position_S = order_S // expert_NK.shape[1]
    row_S = call.layout.row_of_position(device)[position_S]
    # Of one more, to which transformers sends what no expert here is to get.
    counts = torch.bincount(expert_S * num_rows + row_S, minlength=(num_experts + 1) * num_rows)
    factor_S1 = weight_NK.flatten()[order_S].to(call.delta.dtype).unsqueeze(-1)
    start = 0
    # The one wait for the device: how the positions lie depends on them.
    for expert, lengths in enumerate(counts.view(num_experts + 1, num_rows).tolist()[:num_experts]):
        some = slice(start, start + sum(lengths))
        start = some.stop
        # Of slices all ranks ask for the same.
        if lengths and (some.stop > some.start or call.layout.group is not None):
            yield expert, position_S[some], factor_S1[some], call.layout.of_responses(lengths)


def output_of_experts(module: Any, hidden_NH: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return what the rule takes a layer of experts to put out, (positions, hidden), every expert asked of all."""
    output_NH = torch.zeros_like(hidden_NH)
    for expert in range(len(module.down_proj)):
        gate_up_GH, down_HI = (weight[expert].to(hidden_NH.dtype) for weight in (module.gate_up_proj, module.down_proj))
        inner_NI = module._apply_gate(nn.functional.linear(hidden_NH, gate_up_GH))
        factor_N1 = (weight_NK * (expert_NK == expert)).sum(dim=1, keepdim=True).to(hidden_NH.dtype)
        output_NH += nn.functional.linear(inner_NI, down_HI) * factor_N1
    return output_NH


COVERED[experts] = ("gate_up_proj", "down_proj")
NAMED_RULES.extend([(is_experts, experts), (is_router, linear)])
OUTPUTS[experts] = output_of_experts
