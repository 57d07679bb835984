# SPDX-License-Identifier: Apache-2.0
"""The direction v that problems are compared with: the trusted set's policy gradient, kept as this rank's shards.

It does not decide which problems are trusted, nor when the direction is refreshed.

    with leave_no_trace(engine.module):
        direction = compute_direction(engine, trusted)
    if direction.is_degenerate: ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed
from torch import Tensor, nn

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.fsdp import local_part
from verl_gradalign.probe.gradient import clear_gradients, local_grad, require_no_gradients, trainable_parameters
from verl_gradalign.types import ProblemRows

__all__ = [
    "Direction",
    "compute_direction",
    "dot_with_gradient",
    "on_cpu",
    "require_same_shards",
    "no_direction",
    "squared_gradient_norm",
    "summed_gradient",
    "unit_direction",
]


@dataclass(frozen=True)
class Direction:
    """v / |v|, sharded as the gradient is."""

    shards: Shards
    """One per trainable parameter, in the module's order, with the shape and dtype of the parameter's local gradient
    shard; None where this rank had no gradient. All zeros if the direction is degenerate."""
    norm: float
    """|v| before it was normalised, over all shards, in units of the gradient (gradient scale removed)."""
    num_refreshes: int = 1
    """Directions that were averaged into this one."""

    @property
    def is_degenerate(self) -> bool:
        """True if there is no direction: |v| is zero (every trusted group all right or all wrong) or not finite."""
        return not (math.isfinite(self.norm) and self.norm > 0.0)


def compute_direction(engine: GradientEngine, problems: Sequence[ProblemRows]) -> Direction:
    """Return the unit direction of the summed gradient of `problems`. Collective: every rank calls it alike.

    One accumulated backward pass over all rows; the gradients are None afterwards.

    Raises: ValueError without problems; RuntimeError if gradients are present on entry.
    """
    return unit_direction(engine, summed_gradient(engine, problems), engine.gradient_scale)


def summed_gradient(engine: GradientEngine, problems: Sequence[ProblemRows]) -> Shards:
    """Return the summed gradient of `problems`, in units of `.grad`; the gradients are None afterwards. Collective.

    Raises: ValueError without problems; RuntimeError if gradients are present on entry.
    """
    if not problems:
        raise ValueError("the trusted set is empty; give at least one problem to take the direction from")
    require_no_gradients(engine.module)
    engine.backward(problems)
    return take_gradient(engine.module)


def unit_direction(engine: GradientEngine, gradient: Shards, scale: float = 1.0) -> Direction:
    """Return the direction of a gradient; its norm is in units of the gradient times `scale`. Collective.

    The gradient's tensors become the direction's: a copy would be one more shard of the size of the model.
    """
    squared_norm = inner(engine, gradient, gradient)
    raw_norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
    usable = math.isfinite(raw_norm) and raw_norm > 0.0
    shards = mapped(lambda shard: shard.div_(raw_norm) if usable else shard.zero_(), gradient)
    return Direction(shards=shards, norm=raw_norm * scale)


def no_direction(module: nn.Module) -> Direction:
    """Return a degenerate direction, along which estimators give dot products of zero and the true norms."""
    return Direction(shards=(None,) * len(trainable_parameters(module)), norm=0.0)


def dot_with_gradient(engine: GradientEngine, direction: Direction) -> Tensor:
    """Return <.grad, v / |v|> over this rank's shards, a float64 scalar on the parameters' device.

    Units: those of `.grad`; multiply by `engine.gradient_scale` after summing over `engine.shard_group`.
    Raises: RuntimeError if the direction was made for other parameters or shards.
    """
    require_same_shards(engine.module, direction)
    products = []
    for (_, parameter), shard in zip(trainable_parameters(engine.module), direction.shards, strict=True):
        grad = local_grad(parameter)
        if grad is not None and shard is not None:
            products.append(torch.sum(grad * shard.to(grad.device, non_blocking=True), dtype=torch.float64))
    return _total(products, engine)


def require_same_shards(root: nn.Module, direction: Direction) -> None:
    """Raise RuntimeError if the direction was made for other parameters, or for other shards of them.

    Call it while the module is sharded.
    """
    parameters = trainable_parameters(root)
    if len(parameters) != len(direction.shards):
        raise RuntimeError(_count_mismatch([name for name, _ in parameters], len(direction.shards)))
    for (name, parameter), shard in zip(parameters, direction.shards, strict=True):
        local = local_part(parameter)
        if shard is not None and shard.shape != local.shape:
            raise RuntimeError(
                f"{name}: this rank's shard has shape {tuple(local.shape)} but the direction's has "
                f"{tuple(shard.shape)}; it was made for another model or another sharding: recompute the direction "
                "(compute_direction)"
            )


def on_cpu(direction: Direction) -> Direction:
    """Return the direction with its shards in CPU memory; they are brought back where they are used."""
    return replace(direction, shards=mapped(lambda shard: shard.cpu(), direction.shards))


def squared_gradient_norm(engine: GradientEngine, besides: Shards | None = None) -> Tensor:
    """Return |.grad + besides|^2 over this rank's shards, a float64 scalar on the parameters' device.

    Units: those of `.grad` squared; multiply by `engine.gradient_scale` squared after summing over the shard group.
    """
    terms = []
    for index, (_, parameter) in enumerate(trainable_parameters(engine.module)):
        grad, other = local_grad(parameter), None if besides is None else besides[index]
        if grad is not None or other is not None:
            whole = other if grad is None else grad if other is None else grad + other
            terms.append(torch.sum(whole * whole, dtype=torch.float64))  # type: ignore[operator]
    return _total(terms, engine)


def _total(terms: list[Tensor], engine: GradientEngine) -> Tensor:
    if terms:
        return torch.stack(terms).sum()
    # A rank may hold no shard at all; it still takes part in the reduction.
    device = next(engine.module.parameters()).device
    return torch.zeros((), dtype=torch.float64, device=device)


def _count_mismatch(names: list[str], num_shards: int) -> str:
    if len(names) > num_shards:
        culprit = f"{names[num_shards]} is trainable now but has no shard in the direction"
    else:
        culprit = f"the direction goes on after {names[-1] if names else 'nothing'}, the last trainable parameter"
    return (
        f"the direction has {num_shards} shards for {len(names)} trainable parameters: {culprit}; "
        "recompute the direction (compute_direction) after changing what is trained"
    )


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
            # Only the sum is in float64: copies of both in float64 would take four shards' memory.
            total += torch.sum(a * b.to(a.device, non_blocking=True), dtype=torch.float64).to(device)
    if engine.shard_group is not None:
        torch.distributed.all_reduce(total, group=engine.shard_group)
    return total.item()
