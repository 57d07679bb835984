# SPDX-License-Identifier: Apache-2.0
"""FSDP after a pass that was cut short: back to the state between two passes, its gradients dropped.

    try:
        loss.backward()
    except BaseException:
        abandon_pass(module)
        raise

Names that begin with an underscore in torch can change with its version; tests/distributed/test_fsdp.py says what must
hold, with torch 2.11 as with 2.13.
"""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._common_utils import HandleTrainingState
from torch.distributed.fsdp._common_utils import TrainingState as FSDP1State
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState as FSDP2State

from verl_gradalign.probe.fsdp import fsdp2_units


def abandon_pass(module: nn.Module) -> None:
    """Bring FSDP back to the state between two passes after a pass was cut short anywhere.

    Collective-free: every rank does it by itself, and all must.
    """
    if units := fsdp2_units(module):
        _abandon_pass_fsdp2(units)
    for unit in FSDP.fsdp_modules(module):
        # Before its first pass there is nothing to abandon.
        if unit._handle is not None and hasattr(unit._handle.flat_param, "_local_shard"):
            _abandon_pass_fsdp1(unit, unit._handle)


def _abandon_pass_fsdp2(units: list[FSDPModule]) -> None:
    root = units[0]
    root.set_requires_gradient_sync(True)
    # Before the first pass nobody is root yet, and there is nothing to recover from.
    if root._get_fsdp_state()._is_root is not None:
        if hasattr(root, "reset_iter_state"):
            root.reset_iter_state()
        else:
            _reset_iter_state(units)
    for unit in units:
        unit.reshard()
        for shard in (shard for group in _parameter_groups(unit) for shard in group.fsdp_params):
            # Micro-batches before the last one accumulate here, out of sight of `.grad`, and reset_iter_state
            # (torch 2.13) keeps it: without this the next training step would add the abandoned gradient.
            shard.unsharded_accumulated_grad = None
            if hasattr(shard, "_unsharded_param"):
                shard._unsharded_param.grad = None


def _parameter_groups(unit: FSDPModule) -> list[Any]:
    state = unit._get_fsdp_state()
    # Several of a unit since torch 2.13.
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in groups if group is not None]


def _reset_iter_state(units: list[FSDPModule]) -> None:
    """Do what FSDPModule.reset_iter_state does since torch 2.13; vLLM still asks for 2.11."""
    states: list[Any] = [unit._get_fsdp_state() for unit in units]
    groups = [group for unit in units for group in _parameter_groups(unit)]
    root = states[0]
    for group in groups:
        if group._all_gather_result is not None and hasattr(group._all_gather_result.all_gather_work, "wait"):
            group._all_gather_result.all_gather_work.wait()
    # What is under way is thrown away, not used on a stream that could be told to wait for it: the host waits, once.
    root._device_handle.synchronize()
    for state in states:
        state._training_state = FSDP2State.IDLE
        state._modules_to_run_forward.clear()
    for group in groups:
        group._training_state = FSDP2State.IDLE
        group._post_forward_indices.clear()
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._reshard_after_forward_event = group._partial_reduce_output = None
    root._comm_ctx.all_gather_state = root._comm_ctx.reduce_scatter_state = None
    root._comm_ctx.post_forward_order.clear()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False


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
    unit.training_state = FSDP1State.IDLE
    if unit._is_root:
        unit._post_backward_callback_queued = False  # type: ignore[assignment]
        unit._exec_order_data.next_iter()
