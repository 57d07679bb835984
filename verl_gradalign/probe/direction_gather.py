# SPDX-License-Identifier: Apache-2.0
"""The whole of a parameter's direction, put together from the shards of all ranks.

gather = DirectionGather(engine.module, direction, engine.device)
direction_OI = gather(trainable_placements(engine.module)[0])  # collective

gather = gathered_where_it_fits(engine, direction, placements)  # for passes that ask for all, again and again
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from verl_gradalign.probe.direction import Direction, require_same_shards
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.fsdp import (
    Placement,
    flat_handles,
    gather_flat,
    gather_together,
    gather_whole,
    start_gathering,
    unit_of_modules,
)
from verl_gradalign.probe.gradient import trainable_parameters
from verl_gradalign.probe.ranks import largest

SHARE_OF_FREE = 0.25
"""Of a GPU's memory that the whole direction may take beside a pass, whose activations need most of it."""
FULL_BYTES = 4
"""Of a number of the direction."""


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
        together: dict[tuple[int, int], Placement] = {}
        for placement in placements:
            if placement.handle is not None:
                # A copy: of a flat parameter this is a view, which would keep all of it.
                wholes[placement.identity] = self(placement).clone()
            elif self._shards[placement.parameter] is None:
                wholes[placement.identity] = self(placement)
            else:
                together[placement.identity] = placement
        found = gather_together(*self._of(together.values()))
        return wholes | dict(zip(together, found, strict=True))

    def start(self, placements: Sequence[Placement]) -> Callable[[], dict[tuple[int, int], Tensor]]:
        """Start one exchange of what FSDP2 cuts; return a function that waits, and gives all by identity. Collective.

        All ranks call that function in the same order.
        """
        sharded = [use for use in placements if use.handle is None and self._shards[use.parameter] is not None]
        finish = start_gathering(*self._of(sharded))

        def wait() -> dict[tuple[int, int], Tensor]:
            wholes = dict(zip((use.identity for use in sharded), finish(), strict=True))
            return wholes | {use.identity: self(use) for use in placements if use.identity not in wholes}

        return wait

    def _of(self, placements: Iterable[Placement]) -> tuple[list[nn.Parameter], list[Tensor]]:
        """Return the parameters of placements that have shards, and these on the device."""
        parameters, shards = [], []
        for placement in placements:
            shard = self._shards[placement.parameter]
            assert shard is not None, "asked by the caller"
            parameters.append(self._parameters[placement.parameter])
            shards.append(shard.to(self._like.device, non_blocking=True))
        return parameters, shards


class UnitGather:
    """Gathers v of an FSDP2 unit in one exchange when a pass reaches its first layer, the next unit's meanwhile.

    Every pass asks for each use of a parameter once, and all in the same order, which the first pass shows. v of two
    units is held at most. What FSDP1 flattens lies together anyway.
    """

    def __init__(self, gather: DirectionGather, root: nn.Module, placements: Sequence[Placement]) -> None:
        self._gather = gather
        self._unit_of = unit_of_modules(root)
        self._members: dict[nn.Module, dict[tuple[int, int], Placement]] = {}
        """Of each unit."""
        for use in placements:
            self._members.setdefault(self._unit_of[use.module], {})[use.identity] = use
        self._num_uses = len(placements)
        self._order: list[nn.Module] = []
        """The unit of each use, in the order of the first pass."""
        self._num_asked = 0
        self._held: tuple[nn.Module | None, dict[tuple[int, int], Tensor]] = (None, {})
        self._ahead: tuple[nn.Module | None, Callable[[], dict[tuple[int, int], Tensor]]] = (None, dict)

    def __call__(self, placement: Placement) -> Tensor:
        """Return v of the placement's whole parameter. Collective: every rank asks for the same."""
        unit = self._unit_of[placement.module]
        place, self._num_asked = self._num_asked % self._num_uses, self._num_asked + 1
        if len(self._order) < self._num_uses:
            self._order.append(unit)
        if self._held[0] is not unit:
            ahead, wait = self._ahead
            self._held = (None, {})  # freed before another one is taken apart
            self._ahead = (None, dict)
            found = wait()  # also of one that is not wanted: an exchange that was begun must end
            self._held = unit, found if ahead is unit else self._start(unit)()
            if (following := self._following(place)) is not None:
                self._ahead = following, self._start(following)
        return self._held[1][placement.identity]

    def _start(self, unit: nn.Module) -> Callable[[], dict[tuple[int, int], Tensor]]:
        return self._gather.start(list(self._members[unit].values()))

    def _following(self, place: int) -> nn.Module | None:
        """Return the unit that the pass asks for next, None in the first pass and after the last unit."""
        known = self._order if len(self._order) == self._num_uses else []
        return next((unit for unit in known[place + 1 :] if unit is not self._order[place]), None)


def gathered_where_it_fits(
    engine: GradientEngine, direction: Direction, placements: Iterable[Placement]
) -> Callable[[Placement], Tensor]:
    """Return a function that gives a parameter's v: gathered once for all passes of a call, or by FSDP unit in each.

    On a GPU the whole v may take `SHARE_OF_FREE` of the free memory, on the rank that has the least. Collective.
    """
    gather = DirectionGather(engine.module, direction, engine.device)
    placements = list(placements)
    distinct = {use.identity: use for use in placements}
    size = FULL_BYTES * sum(use.shape.numel() for use in distinct.values())
    is_too_large = size > SHARE_OF_FREE * _free_bytes(engine.device)
    if largest(int(is_too_large), engine.data_group, engine.device):
        # FSDP1's flat parameters are units already, and without units there is nothing to gather.
        is_flat = any(use.handle is not None for use in placements)
        return gather if is_flat else UnitGather(gather, engine.module, placements)
    parts = gather.all(distinct.values())
    return lambda placement: parts[placement.identity]


def _free_bytes(device: torch.device) -> float:
    """Return what may still be allocated on a GPU, what torch keeps of freed tensors included; elsewhere no limit."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
