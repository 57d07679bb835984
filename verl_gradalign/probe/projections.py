# SPDX-License-Identifier: Apache-2.0
"""Random projections of layers' gradients, taken from what the layers' rules see, without forming a gradient.

A matrix's gradient G (O x I) becomes S = P_O^T G P_I = sum_t (delta_t P_O)^T (input_t P_I), K x K numbers, with normal
entries of variance 1 / K in P_O and P_I: E |S|^2 = |G|^2. The projections depend on a seed and the parameter's name
only, so that all ranks and passes have the same, and a tied weight's two uses add up.

Source: the two-sided projection is LoGra's (arXiv 2405.13954).

Shape legend: N flattened positions, O output features (or tokens of the vocabulary V), I input features, H hidden
features, F features, K the rank.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from verl_gradalign.probe import expert_rules, layer_rules
from verl_gradalign.probe.layer_rules import LayerCall, LayerRule, embedding_delta
from verl_gradalign.probe.layout import Layout


def normal_matrix(seed: int, name: str, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return normal numbers of variance 1 / columns, the same for the same seed, name and kind of device."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32) / math.sqrt(shape[1])


def normal_sides(seed: int, name: str, shape: torch.Size, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the projections of a matrix's outputs, (O, K), and of its inputs, (I, K)."""
    num_outputs, num_inputs = shape[-2:]
    left_OK = normal_matrix(seed, f"{name} left", (num_outputs, rank), device)
    return left_OK, normal_matrix(seed, f"{name} right", (num_inputs, rank), device)


def linear_factors(call: LayerCall, left_OK: Tensor, right_IK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the projected output gradients and inputs of a linear layer."""
    return _project(call.delta, left_OK[call.outputs], call.dtype), _project(call.input, right_IK, call.dtype)


def embedding_factors(call: LayerCall, left_VK: Tensor, right_HK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the projected tokens, one-hot vectors in effect, and the projected output gradients of an embedding."""
    return left_VK[call.input].to(call.dtype), _project(embedding_delta(call), right_HK, call.dtype)


Factors = Callable[[LayerCall, Tensor, Tensor], tuple[Tensor, Tensor]]
FACTORS: dict[LayerRule, Factors] = {layer_rules.linear: linear_factors, layer_rules.embedding: embedding_factors}
"""By the rule of the layer, how its matrix's gradient is projected on both sides, (N, K) twice."""
VECTOR_RULES = (layer_rules.rms_norm, layer_rules.layer_norm)
"""Rules of layers that have vectors only."""


def projected_parts(
    rule: LayerRule, call: LayerCall, attribute: str, left_OK: Tensor, right_IK: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Layout]]:
    """Yield, of each matrix in a parameter, its place, its factors as `FACTORS` has them, and where their rows lie.

    A parameter is one matrix, or one for each expert.
    """
    if rule is not expert_rules.experts:
        yield 0, *FACTORS[rule](call, left_OK, right_IK), call.layout
        return
    for part in expert_rules.expert_parts(replace(call, direction={attribute: call.direction[attribute]})):
        for _, delta_MO, input_MI in part.products:
            left_MK, right_MK = _project(delta_MO, left_OK, call.dtype), _project(input_MI, right_IK, call.dtype)
            yield part.expert, left_MK, right_MK, part.layout


def _project(values_NF: Tensor, projection_FK: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product, computed in the layer's dtype."""
    return (values_NF @ projection_FK.to(values_NF.dtype)).to(dtype)
