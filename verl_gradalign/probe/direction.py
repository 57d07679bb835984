# SPDX-License-Identifier: Apache-2.0
"""The direction v that problems are compared with: the trusted set's policy gradient, kept as this rank's shards.

It does not decide which problems are trusted, nor when the direction is refreshed.

    with leave_no_trace(engine.module):
        direction = compute_direction(engine, trusted)
        gather = DirectionGather(engine.module, direction, engine.device)
        direction_OI = gather(trainable_placements(engine.module)[0])        # collective
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.fsdp import (
    Placement,
    flat_handles,
    gather_flat,
    gather_together,
    gather_whole,
    local_part,
)
from verl_gradalign.probe.gradient import clear_gradients, require_no_gradients, trainable_parameters
from verl_gradalign.probe.ranks import largest, summed
from verl_gradalign.types import ProblemRows

SHARE_OF_FREE = 0.25
"""Of a GPU's memory that the whole direction may take beside a pass, whose activations need most of it."""
FULL_BYTES = 4
"""Of a number of the direction."""
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


class DirectionGather:
    """Puts together the whole of a parameter's direction from the shards of all ranks, one layer at a time.

    FSDP1 flattens a layer's parameters into one tensor; the tensor gathered last is kept, because a layer's parameters
    are asked for one after another.
    """

    def __init__(self, root: nn.Module, direction: Direction, device: torch.device) -> None:
        require_same_shards(root, direction)
        self._parameters = [parameter for _, parameter in trainable_parameters(root)]
        self._shards = direction.shards
        self._shard_of = {id(p): shard for p, shard in zip(self._parameters, self._shards, strict=True)}
        # During a pass a flat parameter is unsharded; what it measures now is its shard.
        self._flat_shapes = {id(handle): handle.flat_param.shape for handle in flat_handles(root)}
        # A rank without any shard of a flat parameter still gathers it, in the dtype of the others.
        dtype = next((shard.dtype for shard in self._shards if shard is not None), torch.float32)
        self._like = torch.zeros(0, dtype=dtype, device=device)
        self._last: tuple[Any, tuple[Tensor, ...]] = (None, ())

    def __call__(self, placement: Placement) -> Tensor:
        """Return v of the placement's whole parameter on the device. Collective: every rank asks for the same."""
        handle = placement.handle
        if handle is not None:
            if self._last[0] is not handle:
                self._last = (None, ())  # freed before the next one is gathered
                self._last = (handle, gather_flat(handle, self._flat_shapes[id(handle)], self._shard_of, self._like))
            return self._last[1][placement.view or 0]
        parameter, shard = self._parameters[placement.parameter], self._shards[placement.parameter]
        # The parameter was unused, so no rank has a gradient of it, and none gathers.
        if shard is None:
            return self._like.new_zeros(()).expand(placement.shape)
        return gather_whole(parameter, shard.to(self._like.device, non_blocking=True))

    def all(self, placements: Iterable[Placement]) -> dict[tuple[int, int], Tensor]:
        """Return v of the whole parameters, by identity, in few exchanges. Collective; asked for alike on all ranks."""
        wholes: dict[tuple[int, int], Tensor] = {}
        together: dict[tuple[int, int], tuple[nn.Parameter, Tensor]] = {}
        for placement in placements:
            parameter, shard = self._parameters[placement.parameter], self._shards[placement.parameter]
            if placement.handle is not None:
                # A copy: of a flat parameter this is a view, which would keep all of it.
                wholes[placement.identity] = self(placement).clone()
            elif shard is None:
                wholes[placement.identity] = self(placement)
            else:
                together[placement.identity] = parameter, shard.to(self._like.device, non_blocking=True)
        parameters, shards = [parameter for parameter, _ in together.values()], [s for _, s in together.values()]
        return wholes | dict(zip(together, gather_together(parameters, shards), strict=True))


def gathered_where_it_fits(
    engine: GradientEngine, direction: Direction, placements: Iterable[Placement]
) -> Callable[[Placement], Tensor]:
    """Return a function that gives a parameter's v: gathered once for all passes of a call, or by layer in each.

    On a GPU the whole v may take `SHARE_OF_FREE` of the free memory, on the rank that has the least. Collective.
    """
    gather = DirectionGather(engine.module, direction, engine.device)
    distinct = {use.identity: use for use in placements}
    size = FULL_BYTES * sum(use.shape.numel() for use in distinct.values())
    is_too_large = size > SHARE_OF_FREE * _free_bytes(engine.device)
    if largest(int(is_too_large), engine.data_group, engine.device):
        return gather
    parts = gather.all(distinct.values())
    return lambda placement: parts[placement.identity]


def _free_bytes(device: torch.device) -> float:
    """Return what may still be allocated on a GPU, what torch keeps of freed tensors included; elsewhere no limit."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
