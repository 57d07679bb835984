# SPDX-License-Identifier: Apache-2.0
"""The direction v that problems are compared with: the trusted set's policy gradient, kept as this rank's shards.

It does not decide which problems are trusted, nor when the direction is refreshed.

    with leave_no_trace(engine.module):
        direction = compute_direction(engine, trusted)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.fsdp import local_part
from verl_gradalign.probe.gradient import clear_gradients, require_no_gradients, trainable_parameters
from verl_gradalign.probe.ranks import summed
from verl_gradalign.types import ProblemRows

Shards = tuple[Tensor | None, ...]
"""One per trainable parameter, in the module's order, with the shape and dtype of the parameter's local gradient
shard; None where this rank had no gradient."""


@dataclass(frozen=True)
class Direction:
    """v / |v|, sharded as the gradient is."""

    shards: Shards
    """All zeros if the direction is degenerate."""
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
    """Return the summed gradient of `problems`, in units of `.grad`. Collective; otherwise as `compute_direction`."""
    if not problems:
        raise ValueError("the trusted set is empty; give at least one problem to take the direction from")
    require_no_gradients(engine.module)
    engine.backward(problems)
    return take_gradient(engine.module)


def take_gradient(module: nn.Module) -> Shards:
    """Return the module's gradient, detached from it: every `.grad` is None afterwards."""
    grads = [parameter.grad for _, parameter in trainable_parameters(module)]
    clear_gradients(module)
    return tuple(None if grad is None else local_part(grad).detach() for grad in grads)


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


def on_cpu(direction: Direction) -> Direction:
    """Return the direction with its shards in CPU memory; `on_device` brings them back."""
    return replace(direction, shards=mapped(_to_host, direction.shards))


def _to_host(shard: Tensor) -> Tensor:
    if shard.device.type != "cuda":
        return shard.cpu()
    # Page-locked: a copy back runs at the bus's speed.
    return torch.empty(shard.shape, dtype=shard.dtype, pin_memory=True).copy_(shard)


def on_device(direction: Direction, device: torch.device) -> Direction:
    """Return the direction with its shards on the device, once for all passes of a call.

    It is where the gradients will lie: beside the parameters, which FSDP2's CPU offload keeps in CPU memory.
    """
    return replace(direction, shards=mapped(lambda shard: shard.to(device, non_blocking=True), direction.shards))


def is_away(direction: Direction, device: torch.device) -> bool:
    """Return whether the shards lie elsewhere than on the device."""
    return any(shard is not None and shard.device != device for shard in direction.shards)


def require_same_shards(root: nn.Module, direction: Direction) -> None:
    """Raise RuntimeError if the direction was made for other parameters, or for other shards of them.

    Call it while the module is sharded.
    """
    parameters, num_shards = trainable_parameters(root), len(direction.shards)
    names = [name for name, _ in parameters]
    if len(names) != num_shards:
        culprit = f"the direction goes on after {names[-1] if names else 'nothing'}, the last trainable parameter"
        if len(names) > num_shards:
            culprit = f"{names[num_shards]} is trainable now but has no shard in the direction"
        counts = f"the direction has {num_shards} shards for {len(names)} trainable parameters"
        remedy = "recompute the direction (compute_direction) after changing what is trained"
        raise RuntimeError(f"{counts}: {culprit}; {remedy}")
    for (name, parameter), shard in zip(parameters, direction.shards, strict=True):
        local = local_part(parameter)
        if shard is not None and shard.shape != local.shape:
            shapes = f"this rank's shard has shape {tuple(local.shape)} but the direction's has {tuple(shard.shape)}"
            remedy = "it was made for another model or another sharding: recompute the direction (compute_direction)"
            raise RuntimeError(f"{name}: {shapes}; {remedy}")


def mapped(function: Callable[[Tensor], Tensor], shards: Shards) -> Shards:
    """Return the function of every shard there is."""
    return tuple(None if shard is None else function(shard) for shard in shards)


def combined(terms: Sequence[tuple[float, Shards]]) -> Shards:
    """Return the sum of factor times shards, in new tensors, on the first term's devices."""
    total: list[Tensor | None] = [None] * len(terms[0][1])
    for factor, shards in terms:
        for index, shard in enumerate(shards):
            if shard is not None:
                before = total[index]
                total[index] = shard * factor if before is None else before.add_(shard.to(before), alpha=factor)
    return tuple(total)


def added(first: Shards, second: Shards) -> Shards:
    """Return the sum, in the first's tensors where it has them: a copy would be one more shard of the model's size."""
    pairs = zip(first, second, strict=True)
    return tuple(a if b is None else b if a is None else a.add_(b) for a, b in pairs)


def local_products(first: Shards, second: Shards) -> list[Tensor]:
    """Return the inner product of each of this rank's shards that both have, as float64 scalars."""
    return [
        # Only the sum is in float64: copies of both in float64 would take four shards' memory.
        # A copy to CPU memory that is not waited for may be read before it is there.
        torch.sum(a * b.to(a.device, non_blocking=a.is_cuda), dtype=torch.float64)
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    ]


def local_inner(first: Shards, second: Shards, device: torch.device) -> Tensor:
    """Return the inner product over this rank's shards, summed in float64; 0 if it holds none."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for product in local_products(first, second):
        total += product.to(device)
    return total


def inner(engine: GradientEngine, first: Shards, second: Shards) -> float:
    """Return the inner product over all shards of all ranks, summed in float64. Collective."""
    return summed(local_inner(first, second, engine.device), engine.shard_group).item()
