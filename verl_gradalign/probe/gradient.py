# SPDX-License-Identifier: Apache-2.0
"""Read the gradient of a module shard by shard, and leave the module as it was found.

Works on plain modules, FSDP1 and FSDP2. It does not run passes and it does not reduce over ranks.

    with leave_no_trace(module):
        loss.backward()
        shards = [local_grad(parameter) for _, parameter in trainable_parameters(module)]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
from torch.distributed.tensor import DTensor

__all__ = [
    "all_parameters",
    "clear_gradients",
    "leave_no_trace",
    "local_grad",
    "require_no_dropout",
    "require_no_gradients",
    "reshard",
    "trainable_parameters",
]


def trainable_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of every parameter that requires a gradient, tied ones once, in the module's order.

    Under FSDP2 call it while the parameters are sharded, i.e. inside `leave_no_trace` and outside a pass: an unsharded
    module shows temporary parameters whose `.grad` nobody reduces.
    """
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def local_grad(parameter: nn.Parameter) -> Tensor | None:
    """Return this rank's shard of the parameter's gradient, without a copy; None if there is none."""
    grad = parameter.grad
    return grad.to_local() if isinstance(grad, DTensor) else grad


def clear_gradients(module: nn.Module) -> None:
    """Set the gradient of every parameter to None."""
    for parameter in all_parameters(module):
        parameter.grad = None


def require_no_gradients(module: nn.Module) -> None:
    """Raise RuntimeError if a parameter already has a gradient, which the next backward pass would add to."""
    for name, parameter in trainable_parameters(module):
        if parameter.grad is not None:
            raise RuntimeError(
                f"{name} already has a gradient, which would be counted into the first problem; "
                "score inside leave_no_trace(module), which sets gradients aside and puts them back"
            )


def require_no_dropout(module: nn.Module) -> None:
    """Raise ValueError, naming the modules, if any dropout probability of the model is above 0."""
    active = [
        f"{name or type(submodule).__name__} (p={p})"
        for name, submodule in module.named_modules()
        for p in (
            getattr(submodule, "p", 0) if "Dropout" in type(submodule).__name__ else 0,
            getattr(submodule, "attention_dropout", 0),
        )
        if isinstance(p, float) and p > 0
    ]
    if active:
        raise ValueError(
            f"dropout is active in {', '.join(active[:5])}: gradients would depend on chance. Remedy: set it to 0, "
            "e.g. +actor_rollout_ref.model.override_config.attention_dropout=0"
        )


@contextmanager
def leave_no_trace(module: nn.Module) -> Iterator[None]:
    """Set the module's gradients aside, and restore them and everything else that a pass touches. Collective-free.

    Restored, also after an exception: every `.grad` (the same tensor object), `requires_grad` and `training` flag, the
    states of Python's, NumPy's and torch's generators (CPU and the current CUDA device). After an exception the
    sharding machinery is put back between two passes, and gradients that it accumulated unsharded are dropped, so that
    the next training step is bit-identical (tests/distributed/test_fsdp.py).

    Not restored: parameters and buffers, which a backward pass does not change.
    """
    reshard(module)
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in all_parameters(module)]
    training_flags = [(submodule, submodule.training) for submodule in module.modules()]
    restore_generators = _save_generators()
    clear_gradients(module)
    try:
        yield
    except BaseException:
        _abandon_pass(module)
        raise
    finally:
        for parameter, grad, requires_grad in gradients:
            parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        for submodule, training in training_flags:
            submodule.training = training
        restore_generators()


def all_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return every parameter of the module, FSDP1's flat ones included."""
    # Under FSDP1 with use_orig_params=True the flat parameter, whose .grad the originals' .grad are views of, is not
    # among module.parameters().
    flat = [handle.flat_param for _, handle in _fsdp1_handles(module)]
    return list({id(parameter): parameter for parameter in [*module.parameters(), *flat]}.values())


def _save_generators() -> Callable[[], None]:
    python_state, numpy_state, cpu_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state)

    return restore


def _fsdp1_handles(module: nn.Module) -> list[tuple[FSDP, Any]]:
    return [(unit, unit._handle) for unit in FSDP.fsdp_modules(module) if unit._handle is not None]


def _fsdp2_units(module: nn.Module) -> list[FSDPModule]:
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


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


def _abandon_pass(module: nn.Module) -> None:
    """Bring FSDP back to the state between two passes after a pass was cut short anywhere."""
    units = _fsdp2_units(module)
    if units:
        _abandon_pass_fsdp2(units)
    for unit, handle in _fsdp1_handles(module):
        # Before its first pass there is nothing to abandon.
        if hasattr(handle.flat_param, "_local_shard"):
            _abandon_pass_fsdp1(unit, handle)
    clear_gradients(module)


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
