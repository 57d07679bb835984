# SPDX-License-Identifier: Apache-2.0
"""A module's gradient as local shards, and a context that leaves no trace of having computed one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def trainable_parameters(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Return (name, parameter) of every parameter that requires a gradient, in the module's order."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def local_shard(tensor: Tensor | None) -> Tensor | None:
    """Return the part of `tensor` that this rank holds; None stays None (a rank without a share of a parameter)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_shards(module: torch.nn.Module) -> list[Tensor | None]:
    """Return the local shards of `.grad`, one entry per trainable parameter. Not copies."""
    return [local_shard(parameter.grad) for _, parameter in trainable_parameters(module)]


def drop_gradients(module: torch.nn.Module) -> None:
    """Set every `.grad` to None."""
    for parameter in module.parameters():
        parameter.grad = None


@contextmanager
def leave_no_trace(module: torch.nn.Module) -> Iterator[None]:
    """Give the body a module without gradients, and restore everything it may change, also after an exception.

    Restored bit for bit: every parameter's `.grad` and `requires_grad`, every submodule's training flag, and the
    state of the Python, NumPy, torch and device random generators.
    """
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in module.parameters()]
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device_state = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    drop_gradients(module)
    try:
        yield
    except BaseException:
        _reshard(module)
        raise
    finally:
        drop_gradients(module)
        for parameter, gradient, requires_grad in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        for submodule, training in flags:
            submodule.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state)


def _reshard(module: torch.nn.Module) -> None:
    """Reshard what an exception left unsharded. FSDP2's root stays unsharded after a forward, and reshard() is not
    recursive (tests/distributed/test_fsdp.py)."""
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.reshard()
