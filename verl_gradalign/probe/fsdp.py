# SPDX-License-Identifier: Apache-2.0
"""What is known of the insides of FSDP1, FSDP2 and DTensor: where shards lie, and how a pass is ended or given up.

Everything here that begins with an underscore in torch can change with its version; no other module of the probe uses
such a name. tests/distributed/test_fsdp.py says what must hold.

    reshard(module)
    local = local_part(parameter)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
from torch.distributed.tensor import DTensor

__all__ = [
    "FlatUse",
    "abandon_pass",
    "data_parallel_group",
    "flat_handles",
    "flat_shard",
    "flat_uses",
    "gather_flat",
    "gather_whole",
    "held_part",
    "local_part",
    "reshard",
]


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be sharded, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def flat_handles(root: nn.Module) -> list[Any]:
    """Return FSDP1's handles, one per flat parameter."""
    return [handle for _, handle in _fsdp1_handles(root)]


def _fsdp1_handles(module: nn.Module) -> list[tuple[FSDP, Any]]:
    return [(unit, unit._handle) for unit in FSDP.fsdp_modules(module) if unit._handle is not None]


def _fsdp2_units(module: nn.Module) -> list[FSDPModule]:
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


class FlatUse(NamedTuple):
    """One use, by a module, of a parameter that FSDP1 has flattened."""

    module: nn.Module
    attribute: str
    handle: Any
    view: int
    """Index among the parameters of the flat one."""
    parameter: nn.Parameter
    """What the optimizer holds: the flat parameter, or the original one where those are kept."""
    shape: torch.Size
    """Of the whole original parameter."""


def flat_uses(root: nn.Module) -> Iterator[FlatUse]:
    """Yield every use of everything that FSDP1 has flattened, a tied parameter's own use first."""
    for handle in flat_handles(root):
        flat_param = handle.flat_param
        owned = {}
        for view, (attribute, module, _) in enumerate(flat_param._param_infos):
            parameter = flat_param._params[view] if handle._use_orig_params else flat_param
            use = FlatUse(module, attribute, handle, view, parameter, flat_param._shapes[view])
            owned[id(module), attribute] = use
            yield use
        for shared in flat_param._shared_param_infos:
            first = owned[id(shared.prim_module), shared.prim_param_name]
            yield first._replace(module=shared.module, attribute=shared.param_name)


def held_part(parameter: nn.Parameter, handle: Any, view: int | None, shape: torch.Size) -> str:
    """Return, in words, which part of a parameter of this shape the rank holds. Equal words mean equal parts."""
    if handle is not None:
        where = handle.flat_param._shard_param_infos[view]
        if not where.in_shard:
            return f"nothing of shape {tuple(shape)}"
        first, last = where.intra_param_start_idx, where.intra_param_end_idx
        # Original parameters are shards of their own; else it matters where in the flat one they begin.
        place = "" if handle._use_orig_params else f", from {where.offset_in_shard} of the flat parameter"
        return f"elements {first} to {last} of shape {tuple(shape)}{place}"
    if isinstance(parameter, DTensor):
        mesh, cuts = parameter.device_mesh, ", ".join(str(axis) for axis in parameter.placements)
        return f"place {mesh.get_coordinate()} of mesh {tuple(mesh.shape)} cut by {cuts} of shape {tuple(shape)}"
    return f"all of shape {tuple(shape)}"


def gather_whole(parameter: nn.Parameter, shard: Tensor) -> Tensor:
    """Return the whole of a tensor that is sharded as `parameter` is. Collective if that is a DTensor."""
    if not isinstance(parameter, DTensor):
        return shard
    whole: Tensor = DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        # Every rank made its shard by the same rule; checking it would be a collective for each parameter.
        run_check=False,
        # Given, because the last ranks' shards can be smaller or empty.
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()
    return whole


def flat_shard(handle: Any, shape: torch.Size, shard_of: Mapping[int, Tensor | None], like: Tensor) -> Tensor:
    """Return this rank's shard of a flat tensor of zeros and the given shards, with the dtype and device of `like`.

    `shard_of` maps the id of what the optimizer holds to its shard; `shape` is that of the sharded flat parameter.
    """
    flat_param = handle.flat_param
    if not handle._use_orig_params:
        shard = shard_of.get(id(flat_param))
        return like.new_zeros(shape) if shard is None else shard.to(like.device, non_blocking=True)
    # The originals' shards are apart, without the padding between and behind them.
    flat = like.new_zeros(shape)
    for parameter, where in zip(flat_param._params, flat_param._shard_param_infos, strict=True):
        shard = shard_of.get(id(parameter))
        if shard is not None and where.in_shard:
            flat[where.offset_in_shard : where.offset_in_shard + where.numel_in_shard] = shard.flatten()
    return flat


def gather_flat(handle: Any, shard: Tensor) -> list[Tensor]:
    """Return what a flat tensor, sharded as the handle's flat parameter, holds of each original one. Collective."""
    if handle.uses_sharded_strategy:
        whole = shard.new_empty(shard.numel() * handle.process_group.size())
        torch.distributed.all_gather_into_tensor(whole, shard, group=handle.process_group)
        # The ranks' shards are equally long: the last ones end in padding.
        shard = whole[: handle.flat_param._unpadded_unsharded_size.numel()]
    return list(handle._get_unflat_views(shard))


def reshard(module: nn.Module) -> None:
    """Reshard every FSDP unit between two passes, so that modules show their shards and the next pass reads them.

    A forward pass leaves the root unsharded: FSDP2 then shows the unsharded parameters, FSDP1 the shards, but computes
    with the copy it has. FSDP2's `reshard` is not recursive.
    """
    for unit in _fsdp2_units(module):
        unit.reshard()
    for _, handle in _fsdp1_handles(module):
        # Before its first pass a handle has not yet set its shard apart.
        if hasattr(handle.flat_param, "_local_shard"):
            handle.reshard(handle.uses_sharded_strategy)
            handle.post_reshard()


def abandon_pass(module: nn.Module) -> None:
    """Bring FSDP back to the state between two passes after a pass was cut short anywhere."""
    units = _fsdp2_units(module)
    if units:
        _abandon_pass_fsdp2(units)
    for unit, handle in _fsdp1_handles(module):
        # Before its first pass there is nothing to abandon.
        if hasattr(handle.flat_param, "_local_shard"):
            _abandon_pass_fsdp1(unit, handle)


def _abandon_pass_fsdp2(units: list[FSDPModule]) -> None:
    root = units[0]
    root.set_requires_gradient_sync(True)
    # Public since torch 2.13; before, an interrupted FSDP2 pass cannot be recovered from with public calls.
    # Before the first pass nobody is root yet, and there is nothing to recover from.
    if hasattr(root, "reset_iter_state") and root._get_fsdp_state()._is_root is not None:
        root.reset_iter_state()
    for unit in units:
        unit.reshard()
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            for shard in group.fsdp_params if group is not None else ():
                # Micro-batches before the last one accumulate here, out of sight of `.grad`, and reset_iter_state
                # (torch 2.13) keeps it: without this the next training step would add the abandoned gradient.
                shard.unsharded_accumulated_grad = None
                if hasattr(shard, "_unsharded_param"):
                    shard._unsharded_param.grad = None


def _abandon_pass_fsdp1(unit: FSDP, handle: Any) -> None:
    """Do what FSDP1's own end-of-backward callback does, except keep the gradient."""
    flat_param = handle.flat_param
    if hasattr(flat_param, "_post_backward_hook_state"):
        flat_param._post_backward_hook_state[-1].remove()
        del flat_param._post_backward_hook_state
    flat_param._post_backward_called = False
    flat_param.grad = None
    # Before the reshard, which does less in the middle of a forward.
    handle._training_state = HandleTrainingState.IDLE
    # Unconditional: with use_orig_params the shard can be in place while the modules still show views of the whole.
    handle.reshard(handle.uses_sharded_strategy)
    handle.post_reshard()
    if hasattr(flat_param, "_saved_grad_shard"):
        del flat_param._saved_grad_shard
    handle._ran_pre_backward_hook = handle._needs_pre_backward_unshard = handle._prefetched = False
    handle._post_forward_index = None
    unit.training_state = TrainingState.IDLE
    if unit._is_root:
        unit._post_backward_callback_queued = False  # type: ignore[assignment]
        unit._exec_order_data.next_iter()


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
