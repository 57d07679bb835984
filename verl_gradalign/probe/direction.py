# SPDX-License-Identifier: Apache-2.0
"""The direction v that problems are compared with: the trusted set's policy gradient, kept as this rank's shards.

It does not decide which problems are trusted, nor when the direction is refreshed.

    with leave_no_trace(engine.module):
        direction = compute_direction(engine, trusted)
    if direction.is_degenerate: ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.gradient import clear_gradients, local_grad, require_no_gradients, trainable_parameters
from verl_gradalign.types import ProblemRows

__all__ = ["Direction", "compute_direction", "dot_with_gradient", "squared_gradient_norm"]


@dataclass(frozen=True)
class Direction:
    """v / |v|, sharded as the gradient is."""

    shards: tuple[Tensor | None, ...]
    """One per trainable parameter, in the module's order, with the shape and dtype of the parameter's local gradient
    shard; None where this rank had no gradient. All zeros if the direction is degenerate."""
    norm: float
    """|v| before it was normalised, over all shards, in units of the gradient (gradient scale removed)."""

    @property
    def is_degenerate(self) -> bool:
        """True if there is no direction: |v| is zero (every trusted group all right or all wrong) or not finite."""
        return not (math.isfinite(self.norm) and self.norm > 0.0)


def compute_direction(engine: GradientEngine, problems: Sequence[ProblemRows]) -> Direction:
    """Return the unit direction of the summed gradient of `problems`. Collective: every rank calls it alike.

    One accumulated backward pass over all rows; the gradients are None afterwards.

    Raises: ValueError without problems; RuntimeError if gradients are present on entry.
    """
    if not problems:
        raise ValueError("the trusted set is empty; give at least one problem to take the direction from")
    require_no_gradients(engine.module)
    engine.backward(problems)
    parameters = trainable_parameters(engine.module)
    squared_norm = squared_gradient_norm(engine)
    if engine.shard_group is not None:
        torch.distributed.all_reduce(squared_norm, group=engine.shard_group)
    raw_norm = math.sqrt(squared_norm.item())
    norm = raw_norm * engine.gradient_scale
    usable = math.isfinite(raw_norm) and raw_norm > 0.0
    shards: list[Tensor | None] = []
    for _, parameter in parameters:
        shard = local_grad(parameter)
        if shard is not None:
            shard = shard.detach() / raw_norm if usable else torch.zeros_like(shard)
        shards.append(shard)
        parameter.grad = None
    clear_gradients(engine.module)
    return Direction(shards=tuple(shards), norm=norm)


def dot_with_gradient(engine: GradientEngine, direction: Direction) -> Tensor:
    """Return <.grad, v / |v|> over this rank's shards, a float64 scalar on the parameters' device.

    Units: those of `.grad`; multiply by `engine.gradient_scale` after summing over `engine.shard_group`.
    Raises: RuntimeError if the direction was made for other parameters or shards.
    """
    parameters = trainable_parameters(engine.module)
    if len(parameters) != len(direction.shards):
        raise RuntimeError(_count_mismatch([name for name, _ in parameters], len(direction.shards)))
    products = []
    for (name, parameter), shard in zip(parameters, direction.shards, strict=True):
        grad = local_grad(parameter)
        if grad is None or shard is None:
            continue
        if grad.shape != shard.shape:
            raise RuntimeError(
                f"{name}: the gradient shard has shape {tuple(grad.shape)} but the direction's has "
                f"{tuple(shard.shape)}, so the model was re-sharded since; recompute the direction (compute_direction)"
            )
        products.append(torch.sum(grad * shard, dtype=torch.float64))
    return _total(products, engine)


def squared_gradient_norm(engine: GradientEngine) -> Tensor:
    """Return |.grad|^2 over this rank's shards, a float64 scalar on the parameters' device.

    Units: those of `.grad` squared; multiply by `engine.gradient_scale` squared after summing over the shard group.
    """
    grads = (local_grad(parameter) for _, parameter in trainable_parameters(engine.module))
    return _total([torch.sum(grad * grad, dtype=torch.float64) for grad in grads if grad is not None], engine)


def _total(terms: list[Tensor], engine: GradientEngine) -> Tensor:
    if terms:
        return torch.stack(terms).sum()
    # A rank may hold no shard at all; it still takes part in the reduction.
    device = next(engine.module.parameters()).device
    return torch.zeros((), dtype=torch.float64, device=device)
