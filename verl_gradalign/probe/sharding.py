# SPDX-License-Identifier: Apache-2.0
"""Which module holds which trainable parameter, and how a layer's part of the direction is put together from shards.

Works on plain modules, FSDP1 (with and without original parameters) and FSDP2. `Placement` is read once, while the
module is sharded; during a pass the modules show temporary parameters.

    placements = trainable_placements(module)
    gather = DirectionGather(module, direction, device)
    direction_OI = gather(placements[0])        # collective
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from verl_gradalign.probe.direction import Direction, require_same_shards
from verl_gradalign.probe.fsdp import flat_handles, flat_shard, flat_uses, gather_flat, gather_whole, held_part
from verl_gradalign.probe.gradient import trainable_parameters

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True)
class Placement:
    """One use of a trainable parameter by a module. A tied parameter has one for each module that uses it."""

    name: str
    """As in the unwrapped model, e.g. model.layers.0.mlp.up_proj.weight."""
    module: nn.Module
    attribute: str
    shape: torch.Size
    """Of the whole parameter."""
    parameter: int
    """Index in `trainable_parameters(root)`, which is also the index of its shard in a direction."""
    view: int | None
    """Index among the parameters flattened into it (FSDP1), else None."""
    handle: Any
    """FSDP1's handle of the flat parameter it was flattened into, else None."""

    @property
    def identity(self) -> tuple[int, int]:
        """Equal for the uses of one tied parameter."""
        return (self.parameter, -1) if self.view is None else (id(self.handle), self.view)


def trainable_placements(root: nn.Module) -> list[Placement]:
    """Return every use of a trainable parameter in `root`, in the order of its modules. Call it while sharded."""
    index_of = {id(parameter): index for index, (_, parameter) in enumerate(trainable_parameters(root))}
    names = {id(module): name for name, module in root.named_modules()}
    of_flat = {(id(use.module), use.attribute): use for use in flat_uses(root)}
    flat = {id(handle.flat_param) for handle in flat_handles(root)}
    placements = []
    for module in root.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in index_of or id(parameter) in flat:
                continue
            if (id(module), attribute) not in of_flat:
                name, index = _join(names[id(module)], attribute), index_of[id(parameter)]
                placements.append(Placement(name, module, attribute, parameter.shape, index, view=None, handle=None))
    # Without original parameters the modules hold none of their own: only FSDP1 knows what is theirs.
    for use in of_flat.values():
        if id(use.parameter) in index_of:
            name, index = _join(names[id(use.module)], use.attribute), index_of[id(use.parameter)]
            placements.append(Placement(name, use.module, use.attribute, use.shape, index, use.view, use.handle))
    return placements


def shard_layout(root: nn.Module) -> dict[str, str]:
    """Return, in words, which part of each trainable parameter this rank holds. Equal words mean equal parts.

    Call it while sharded. The number of ranks is in it as far as it decides a part.
    """
    parameters = [parameter for _, parameter in trainable_parameters(root)]
    uses: dict[tuple[int, int], list[Placement]] = {}
    for placement in trainable_placements(root):
        uses.setdefault(placement.identity, []).append(placement)
    # One name of a tied parameter, whatever the order of its uses: untied, it has two.
    return {
        min(use.name for use in of_one): held_part(parameters[first.parameter], first.handle, first.view, first.shape)
        for of_one in uses.values()
        for first in of_one[:1]
    }


class DirectionGather:
    """Puts together the whole of a parameter's direction from the shards of all ranks, one layer at a time.

    FSDP1 flattens a layer's parameters into one tensor; the tensor gathered last is kept, because a layer's parameters
    are asked for one after another.
    """

    def __init__(self, root: nn.Module, direction: Direction, device: torch.device) -> None:
        self._parameters = [parameter for _, parameter in trainable_parameters(root)]
        require_same_shards(root, direction)
        self._shards = direction.shards
        # During a pass a flat parameter is unsharded; what it measures now is its shard.
        self._flat_shapes = {id(handle): handle.flat_param.shape for handle in flat_handles(root)}
        self._device = device
        self._shard_of = {id(p): shard for p, shard in zip(self._parameters, self._shards, strict=True)}
        # A rank without any shard of a flat parameter still gathers it, in the dtype of the others.
        self._like = torch.zeros(0, dtype=_dtype(self._shards), device=device)
        self._last: tuple[Any, list[Tensor]] | None = None

    def __call__(self, placement: Placement) -> Tensor:
        """Return v of the placement's whole parameter on the device. Collective: every rank asks for the same."""
        if placement.handle is not None:
            return self._views(placement.handle)[placement.view or 0]
        parameter, shard = self._parameters[placement.parameter], self._shards[placement.parameter]
        # The parameter was unused, so no rank has a gradient of it, and none gathers.
        if shard is None:
            return torch.zeros(placement.shape, device=self._device)
        return gather_whole(parameter, shard.to(self._device, non_blocking=True))

    def _views(self, handle: Any) -> list[Tensor]:
        if self._last is None or self._last[0] is not handle:
            self._last = None  # freed before the next one is gathered
            shard = flat_shard(handle, self._flat_shapes[id(handle)], self._shard_of, self._like)
            self._last = (handle, gather_flat(handle, shard))
        return self._last[1]


def _dtype(shards: tuple[Tensor | None, ...]) -> torch.dtype:
    return next((shard.dtype for shard in shards if shard is not None), torch.float32)


def _join(prefix: str, attribute: str) -> str:
    return _unwrapped(f"{prefix}.{attribute}" if prefix else attribute)


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
