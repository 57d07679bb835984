# SPDX-License-Identifier: Apache-2.0
"""Everything that measuring must leave alone, compared bit for bit.

before = observe(module, optimizer)
...
assert differences(before, observe(module, optimizer)) == []
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from verl_gradalign.probe.fsdp import compute_device, local_part

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Seen = dict[str, Any]


def observe(module: nn.Module, optimizer: torch.optim.Optimizer) -> Seen:
    """Return everything that measuring must leave alone, tensors as copies of this rank's shards."""
    seen = observe_training(module, optimizer)
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        seen[f"gradient {name}"] = None if grad is None else local_part(grad).detach().clone()
        seen[f"gradient object {name}"] = None if grad is None else id(grad)
        seen[f"requires_grad {name}"] = parameter.requires_grad
    for name, submodule in module.named_modules():
        seen[f"training {name}"] = submodule.training
        seen[f"hooks {name}"] = [tuple(getattr(submodule, kind)) for kind in HOOKS]
    seen["torch generator"] = torch.get_rng_state()
    device = compute_device(module)
    if device.type != "cpu":
        seen["device generator"] = torch.get_device_module(device).get_rng_state(device)
    numpy_state: Any = np.random.get_state()
    seen["numpy generator"] = torch.from_numpy(numpy_state[1].astype(np.int64))
    seen["python generator"] = random.getstate()
    return seen


def observe_training(module: nn.Module, optimizer: torch.optim.Optimizer) -> Seen:
    """Return copies of what a training step changes: parameters, buffers, optimizer state."""
    seen: Seen = {}
    for name, parameter in module.named_parameters():
        seen[f"parameter {name}"] = local_part(parameter).detach().clone()
        for key, value in optimizer.state[parameter].items():
            seen[f"optimizer {key} {name}"] = local_part(value).clone() if isinstance(value, Tensor) else value
    for name, buffer in module.named_buffers():
        seen[f"buffer {name}"] = local_part(buffer).clone()
    return seen


def differences(before: Seen, after: Seen) -> list[str]:
    """Return the names of what is not bit-identical."""
    changed = sorted(before.keys() ^ after.keys())
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            same = old.dtype == new.dtype and old.shape == new.shape and torch.equal(_bytes(old), _bytes(new))
        else:
            same = old is new or (not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new)
        if not same:
            changed.append(key)
    return changed


def _bytes(tensor: Tensor) -> Tensor:
    # nan is not equal to itself, and zero is to minus zero.
    return tensor.detach().contiguous().flatten().view(torch.uint8)
