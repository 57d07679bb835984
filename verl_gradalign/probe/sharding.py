# SPDX-License-Identifier: Apache-2.0
"""Which module holds which trainable parameter, and how a layer's part of the direction is put together from shards.

Works on plain modules, FSDP1 (with and without original parameters) and FSDP2. `Placement` is read once, while the
module is sharded; during a pass the modules show temporary parameters.

    placements = trainable_placements(module)
    gather = DirectionGather(module, direction, device)
    direction_OI = gather(placements[0])        # collective
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from verl_gradalign.probe.direction import Direction, require_same_shards
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
    flat_uses = {use[:2]: use for use in _flat_uses(root)}
    flat = {id(handle.flat_param) for handle in _handles(root)}
    placements = []
    for module in root.modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) not in index_of or id(parameter) in flat or (id(module), attribute) in flat_uses:
                continue
            placements.append(
                Placement(
                    name=_join(names[id(module)], attribute),
                    module=module,
                    attribute=attribute,
                    shape=parameter.shape,  # type: ignore[union-attr]  # index_of holds parameters only
                    parameter=index_of[id(parameter)],
                    view=None,
                    handle=None,
                )
            )
    for module_id, attribute, module, handle, view, parameter in flat_uses.values():
        if id(parameter) in index_of:
            placements.append(
                Placement(
                    name=_join(names[module_id], attribute),
                    module=module,
                    attribute=attribute,
                    shape=handle.flat_param._shapes[view],
                    parameter=index_of[id(parameter)],
                    view=view,
                    handle=handle,
                )
            )
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
        min(use.name for use in of_one): _part(of_one[0], parameters[of_one[0].parameter]) for of_one in uses.values()
    }


def _part(placement: Placement, parameter: nn.Parameter) -> str:
    shape = tuple(placement.shape)
    if placement.handle is not None:
        where = placement.handle.flat_param._shard_param_infos[placement.view]
        if not where.in_shard:
            return f"nothing of shape {shape}"
        first, last = where.intra_param_start_idx, where.intra_param_end_idx
        # Original parameters are shards of their own; else it matters where in the flat one they begin.
        place = "" if placement.handle._use_orig_params else f", from {where.offset_in_shard} of the flat parameter"
        return f"elements {first} to {last} of shape {shape}{place}"
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, ", ".join(str(axis) for axis in parameter.placements)
        return f"place {mesh.get_coordinate()} of mesh {tuple(mesh.shape)} cut by {placements} of shape {shape}"
    return f"all of shape {shape}"


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
        self._flat_shapes = {id(handle): handle.flat_param.shape for handle in _handles(root)}
        self._device = device
        self._last: tuple[Any, list[Tensor]] | None = None

    def __call__(self, placement: Placement) -> Tensor:
        """Return v of the placement's whole parameter on the device. Collective: every rank asks for the same."""
        if placement.handle is not None:
            return self._views(placement.handle)[placement.view or 0]
        parameter, shard = self._parameters[placement.parameter], self._shards[placement.parameter]
        if shard is None:
            return torch.zeros(placement.shape, device=self._device)
        shard = shard.to(self._device, non_blocking=True)
        if not isinstance(parameter, DTensor):
            return shard
        whole: Tensor = DTensor.from_local(
            shard,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).full_tensor()
        return whole

    def _views(self, handle: Any) -> list[Tensor]:
        if self._last is None or self._last[0] is not handle:
            self._last = None  # freed before the next one is gathered
            self._last = (handle, list(handle._get_unflat_views(self._gather_flat(handle))))
        return self._last[1]

    def _gather_flat(self, handle: Any) -> Tensor:
        flat_param = handle.flat_param
        shard = self._flat_shard(handle)
        if not handle.uses_sharded_strategy:
            return shard
        whole = shard.new_empty(shard.numel() * handle.process_group.size())
        torch.distributed.all_gather_into_tensor(whole, shard, group=handle.process_group)
        return whole[: flat_param._unpadded_unsharded_size.numel()]

    def _flat_shard(self, handle: Any) -> Tensor:
        """Return this rank's shard of the flat parameter's direction, also where the original parameters are kept."""
        flat_param, shape = handle.flat_param, self._flat_shapes[id(handle)]
        index_of = {id(parameter): index for index, parameter in enumerate(self._parameters)}
        if not handle._use_orig_params:
            shard = self._shards[index_of[id(flat_param)]]
            whole = torch.zeros(shape, dtype=_dtype(self._shards)) if shard is None else shard
            return whole.to(self._device, non_blocking=True)
        flat = torch.zeros(shape, dtype=_dtype(self._shards), device=self._device)
        for parameter, where in zip(flat_param._params, flat_param._shard_param_infos, strict=True):
            shard = self._shards[index_of[id(parameter)]] if id(parameter) in index_of else None
            if shard is None or not where.in_shard:
                continue
            flat[where.offset_in_shard : where.offset_in_shard + where.numel_in_shard] = shard.flatten()
        return flat


def _handles(root: nn.Module) -> list[Any]:
    return [unit._handle for unit in FSDP.fsdp_modules(root) if unit._handle is not None]


def _flat_uses(root: nn.Module) -> Iterator[tuple[int, str, nn.Module, Any, int, nn.Parameter]]:
    """Yield (module id, attribute, module, handle, view, trainable parameter) of everything FSDP1 has flattened."""
    for handle in _handles(root):
        flat_param = handle.flat_param
        places = {}
        for view, (attribute, module, _) in enumerate(flat_param._param_infos):
            parameter = flat_param._params[view] if handle._use_orig_params else flat_param
            places[id(module), attribute] = (view, parameter)
            yield id(module), attribute, module, handle, view, parameter
        for shared in flat_param._shared_param_infos:
            view, parameter = places[id(shared.prim_module), shared.prim_param_name]
            yield id(shared.module), shared.param_name, shared.module, handle, view, parameter


def _dtype(shards: tuple[Tensor | None, ...]) -> torch.dtype:
    return next((shard.dtype for shard in shards if shard is not None), torch.float32)


def _join(prefix: str, attribute: str) -> str:
    return _unwrapped(f"{prefix}.{attribute}" if prefix else attribute)


def _unwrapped(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
