# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on gradients as this rank's shards: one tensor per trainable parameter, None where the rank has nothing.

first = take_gradient(engine.module)
second = take_gradient(engine.module)
whole = combined([(1.0, first), (1.0, second)])
squared_norm = inner(engine, whole, whole)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed
from torch import Tensor, nn

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.gradient import clear_gradients, local_grad, trainable_parameters

Shards = tuple[Tensor | None, ...]
"""In the order of `trainable_parameters`, each of its parameter's local shape."""


def take_gradient(module: nn.Module) -> Shards:
    """Return the module's gradient, detached from it: every `.grad` is None afterwards."""
    shards = tuple(
        None if (grad := local_grad(parameter)) is None else grad.detach()
        for _, parameter in trainable_parameters(module)
    )
    clear_gradients(module)
    return shards


def combined(terms: Sequence[tuple[float, Shards]]) -> Shards:
    """Return the sum of factor times shards, in new tensors."""
    total: list[Tensor | None] = [None] * len(terms[0][1])
    for factor, shards in terms:
        for index, shard in enumerate(shards):
            if shard is not None:
                before = total[index]
                total[index] = shard * factor if before is None else before.add_(shard.to(before), alpha=factor)
    return tuple(total)


def mapped(function: Callable[[Tensor], Tensor], shards: Shards) -> Shards:
    """Return the function of every shard there is."""
    return tuple(None if shard is None else function(shard) for shard in shards)


def inner(engine: GradientEngine, first: Shards, second: Shards) -> float:
    """Return the inner product over all shards of all ranks, summed in float64. Collective."""
    device = next(engine.module.parameters()).device
    # A rank may hold no shard at all; it still takes part in the reduction.
    total = torch.zeros((), dtype=torch.float64, device=device)
    for a, b in zip(first, second, strict=True):
        if a is not None and b is not None:
            total += torch.sum(a * b.to(a.device, non_blocking=True), dtype=torch.float64).to(device)
    if engine.shard_group is not None:
        torch.distributed.all_reduce(total, group=engine.shard_group)
    return total.item()
