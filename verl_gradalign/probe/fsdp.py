# SPDX-License-Identifier: Apache-2.0
"""Where the shards of a module lie, and how a pass is ended: plain modules, FSDP1, FSDP2 and DTensor.

Everything here that begins with an underscore in torch can change with its version; of the probe's other modules only
`abandoned_pass` uses such names. tests/distributed/test_fsdp.py says what must hold. Placements are read once, while
the module is sharded: during a pass the modules show temporary parameters.

    reshard(module)
    placements = trainable_placements(module)
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Shard

TOGETHER_BYTES = 2**28
"""Size of the whole tensors that one exchange gathers; as much again is held while they are taken apart."""
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat_handles(root: nn.Module) -> list[Any]:
    """Return FSDP1's handles, one per flat parameter."""
    return [unit._handle for unit in FSDP.fsdp_modules(root) if unit._handle is not None]


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
    index = {id(p): i for i, p in enumerate(p for p in root.parameters() if p.requires_grad)}
    # Without original parameters the modules hold none of their own: only FSDP1 knows what is theirs.
    flattened: dict[tuple[int, str], tuple[Any, ...]] = {}
    for handle in flat_handles(root):
        flat = handle.flat_param
        for view, (attribute, module, _) in enumerate(flat._param_infos):
            parameter = flat._params[view] if handle._use_orig_params else flat
            flattened[id(module), attribute] = (module, attribute, parameter, flat._shapes[view], view, handle)
        for shared in flat._shared_param_infos:
            first = flattened[id(shared.prim_module), shared.prim_param_name]
            flattened[id(shared.module), shared.param_name] = (shared.module, shared.param_name, *first[2:])
    flat_ids = {id(handle.flat_param) for handle in flat_handles(root)}
    plain = [
        (module, attribute, parameter, parameter.shape, None, None)
        for module in root.modules()
        for attribute, parameter in module._parameters.items()
        if parameter is not None and id(parameter) not in flat_ids and (id(module), attribute) not in flattened
    ]
    prefix = {id(module): f"{name}." if name else "" for name, module in root.named_modules()}
    return [
        Placement(WRAPPERS.sub("", prefix[id(module)] + attribute), module, attribute, shape, index[id(p)], *flat_place)
        for module, attribute, p, shape, *flat_place in (*plain, *flattened.values())
        if id(p) in index
    ]


def shard_layout(root: nn.Module) -> dict[str, str]:
    """Return, in words, which part of each trainable parameter this rank holds. Equal words mean equal parts.

    Call it while sharded. The number of ranks is in it as far as it decides a part.
    """
    parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
    uses: dict[tuple[int, int], list[Placement]] = {}
    for placement in trainable_placements(root):
        uses.setdefault(placement.identity, []).append(placement)
    # One name of a tied parameter, whatever the order of its uses: untied, it has two.
    return {min(use.name for use in same): _held_part(parameters[same[0].parameter], same[0]) for same in uses.values()}


def _held_part(parameter: nn.Parameter, placement: Placement) -> str:
    whole = f"of shape {tuple(placement.shape)}"
    if placement.handle is not None:
        where = placement.handle.flat_param._shard_param_infos[placement.view]
        if not where.in_shard:
            return f"nothing {whole}"
        # Original parameters are shards of their own; else it matters where in the flat one they begin.
        is_own = placement.handle._use_orig_params
        place = "" if is_own else f", from {where.offset_in_shard} of the flat parameter"
        return f"elements {where.intra_param_start_idx} to {where.intra_param_end_idx} {whole}{place}"
    if isinstance(parameter, DTensor):
        mesh, cuts = parameter.device_mesh, ", ".join(str(axis) for axis in parameter.placements)
        return f"place {mesh.get_coordinate()} of mesh {tuple(mesh.shape)} cut by {cuts} {whole}"
    return f"all {whole}"


def gather_whole(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """Return the whole of a tensor that is sharded as `parameter` is: on one rank, the shard. Collective otherwise."""
    if not isinstance(parameter, DTensor) or parameter.device_mesh.size() == 1:
        return shard
    mesh, placements = parameter.device_mesh, parameter.placements
    # Given, because the last ranks' shards can be smaller or empty.
    whole: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
    # Every rank made its shard by the same rule; checking it would be a collective for each parameter.
    return DTensor.from_local(shard, mesh, placements, run_check=False, **whole).full_tensor()


def gather_together(parameters: Sequence[nn.Parameter], shards: Sequence[Tensor]) -> list[Tensor]:
    """Return the wholes of tensors that are sharded as these parameters are, in few exchanges. Collective.

    What is cut along its first axis over one group of ranks, as by FSDP2, goes together, `TOGETHER_BYTES` at a time;
    anything else alone (`gather_whole`).
    """
    wholes: dict[int, Tensor] = {}
    waiting: list[int] = []
    num_bytes = 0
    for index, (parameter, shard) in enumerate(zip(parameters, shards, strict=True)):
        waiting.append(index)
        # By the wholes, which all ranks know: shards may be smaller on the last ones.
        num_bytes += parameter.numel() * shard.element_size()
        if num_bytes >= TOGETHER_BYTES or index == len(parameters) - 1:
            found = start_gathering([parameters[i] for i in waiting], [shards[i] for i in waiting])()
            wholes |= zip(waiting, found, strict=True)
            waiting, num_bytes = [], 0
    return [wholes[index] for index in range(len(shards))]


def start_gathering(parameters: Sequence[nn.Parameter], shards: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start to gather all of these together, and return a function that waits and gives the wholes. Collective.

    What does not go together (`gather_together`) is gathered in that function, which all ranks must call too.
    """
    together: dict[Any, list[int]] = {}
    alone: list[int] = []
    for index, (parameter, shard) in enumerate(zip(parameters, shards, strict=True)):
        group = _group_of_first_axis(parameter)
        (alone if group is None else together.setdefault((group, shard.dtype), [])).append(index)
    started = [
        _start([parameters[i] for i in indices], [shards[i] for i in indices], group)
        for (group, _), indices in together.items()
    ]

    def finish() -> list[Tensor]:
        wholes = {index: gather_whole(parameters[index], shards[index]) for index in alone}
        for indices, wait in zip(together.values(), started, strict=True):
            wholes |= zip(indices, wait(), strict=True)
        return [wholes[index] for index in range(len(shards))]

    return finish


def _group_of_first_axis(parameter: nn.Parameter) -> ProcessGroup | None:
    """Return the ranks over which a parameter is cut along its first axis, None if it is not, or not alone."""
    if not isinstance(parameter, DTensor):
        return None
    cut = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    is_first = len(cut) == 1 and parameter.placements[cut[0]] == Shard(0) and parameter.device_mesh.size(cut[0]) > 1
    return parameter.device_mesh.get_group(cut[0]) if is_first else None


def _start(
    parameters: Sequence[nn.Parameter], shards: Sequence[Tensor], group: ProcessGroup
) -> Callable[[], list[Tensor]]:
    """Start the one exchange that gives the wholes; the last ranks' shards can be smaller, or empty."""
    num_ranks, parts = group.size(), []
    shapes = [parameter.shape for parameter in parameters]
    lengths = [math.ceil(shape[0] / num_ranks) * shape[1:].numel() for shape in shapes]
    for shard, length in zip(shards, lengths, strict=True):
        flat = shard.flatten()
        parts.append(torch.nn.functional.pad(flat, (0, length - len(flat))))
    mine = torch.cat(parts)
    of_all = mine.new_empty(num_ranks * len(mine))
    work = torch.distributed.all_gather_into_tensor(of_all, mine, group=group, async_op=True)

    def finish() -> list[Tensor]:
        work.wait()
        columns = torch.split(of_all.view(num_ranks, -1), lengths, dim=1)
        # Of several columns each is copied, so that none keeps the whole exchange in memory.
        return [column.reshape(-1, *shape[1:])[: shape[0]] for column, shape in zip(columns, shapes, strict=True)]

    return finish


def gather_flat(
    handle: Any, shape: torch.Size, shard_of: Mapping[int, Tensor | None], like: Tensor
) -> tuple[Tensor, ...]:
    """Return what each original parameter of a flat one has of a tensor sharded alike, zeros where unknown. Collective.

    `shape` is that of the sharded flat parameter; `shard_of` maps the id of what the optimizer holds to its shard; the
    result has the dtype and device of `like`.
    """
    flat = handle.flat_param
    if not handle._use_orig_params:
        known = shard_of.get(id(flat))
        shard = like.new_zeros(shape) if known is None else known.to(like.device, non_blocking=True)
    else:
        # The originals' shards are apart, without the padding between and behind them.
        shard = like.new_zeros(shape)
        for parameter, where in zip(flat._params, flat._shard_param_infos, strict=True):
            known = shard_of.get(id(parameter))
            if known is not None and where.in_shard:
                shard[where.offset_in_shard : where.offset_in_shard + where.numel_in_shard] = known.flatten()
    if handle.uses_sharded_strategy:
        whole = shard.new_empty(shard.numel() * handle.process_group.size())
        # The ranks' shards are equally long: the last ones end in padding.
        torch.distributed.all_gather_into_tensor(whole, shard, group=handle.process_group)
        shard = whole[: flat._unpadded_unsharded_size.numel()]
    return tuple(handle._get_unflat_views(shard))


def reshard(module: nn.Module) -> None:
    """Reshard every FSDP unit between two passes, so that modules show their shards and the next pass reads them.

    A forward pass leaves the root unsharded: FSDP2 then shows the unsharded parameters, FSDP1 the shards, but computes
    with the copy it has. FSDP2's `reshard` is not recursive.
    """
    for unit in fsdp2_units(module):
        unit.reshard()
    for handle in flat_handles(module):
        # Before its first pass a handle has not yet set its shard apart.
        if hasattr(handle.flat_param, "_local_shard"):
            handle.reshard(handle.uses_sharded_strategy)
            handle.post_reshard()


def fsdp2_units(module: nn.Module) -> list[FSDPModule]:
    """Return FSDP2's units, the root first."""
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


def unit_of_modules(root: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return, of each module, the FSDP2 unit that gathers its parameters: the innermost around it, else the root."""
    units: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module, unit: nn.Module) -> None:
        unit = module if isinstance(module, FSDPModule) else unit
        if module not in units:
            units[module] = unit
            for child in module.children():
                visit(child, unit)

    visit(root, root)
    return units


def compute_device(module: nn.Module) -> torch.device:
    """Return where the module's passes compute: where its parameters lie, unless FSDP keeps them in CPU memory."""
    if isinstance(module, FSDP) and module.compute_device is not None:
        return module.compute_device
    if isinstance(module, FSDPModule):
        # After an interrupted pass all may be unsharded, and lie where they were computed with.
        kind = next((p.device_mesh.device_type for p in module.parameters() if isinstance(p, DTensor)), None)
        if kind is not None:
            is_cpu = kind == "cpu"
            return torch.device(kind) if is_cpu else torch.device(kind, torch.get_device_module(kind).current_device())
    return next(module.parameters()).device


def data_parallel_group(module: nn.Module) -> ProcessGroup | None:
    """Return the group that FSDP shards the module over, None if it is not sharded.

    Raises: ValueError for hybrid sharding, whose replicas this engine does not know how to give problems to.
    """
    if isinstance(module, FSDP):
        if module.sharding_strategy.name.startswith(("HYBRID", "_HYBRID")):
            raise ValueError("PlainEngine shards over one group of ranks; use FULL_SHARD instead of hybrid sharding")
        return module.process_group
    if isinstance(module, FSDPModule):
        mesh = next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))
        if mesh.ndim != 1:
            raise ValueError(f"PlainEngine shards over one group of ranks; the device mesh has {mesh.ndim} axes")
        return mesh.get_group()
    return None


def sharding_group(module: nn.Module) -> ProcessGroup | None:
    """Return the ranks over which the trainable parameters are cut, None if each rank has all of them.

    Where parameters are replicated too (hybrid sharding), those of one replica. Call it while sharded.

    Raises: ValueError, with a parameter's name, if not all are cut over one group of ranks: sums over its shards would
        count some numbers twice, or leave some out.
    """
    flat = {id(handle.flat_param): handle for handle in flat_handles(module) if handle.uses_sharded_strategy}
    if flat:
        return next(iter(flat.values())).process_group
    groups: dict[tuple[int, ...], ProcessGroup | None] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        axes = _cut_axes(parameter)
        group = parameter.device_mesh.get_group(axes[0]) if isinstance(parameter, DTensor) and axes else None
        groups[() if group is None else tuple(torch.distributed.get_process_group_ranks(group))] = group
        if len(axes) > 1 or len(groups) > 1:
            how = ", ".join(map(str, parameter.placements)) if isinstance(parameter, DTensor) else "whole on each rank"
            trouble = f"{name} is not cut over the same one group of ranks as the other parameters ({how})"
            raise ValueError(
                f"{trouble}. Remedy: train without tensor, expert and pipeline parallelism (their sizes 1)"
            )
    return next(iter(groups.values()), None)


def _cut_axes(parameter: nn.Parameter) -> list[int]:
    """Return the axes of its mesh, of several ranks, over which a parameter is not replicated."""
    if not isinstance(parameter, DTensor):
        return []
    sizes = parameter.device_mesh.shape
    return [axis for axis, p in enumerate(parameter.placements) if sizes[axis] > 1 and not p.is_replicate()]
