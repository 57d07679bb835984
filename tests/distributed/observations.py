# SPDX-License-Identifier: Apache-2.0
"""Everything of an engine that scoring must leave alone, compared bit for bit, and which collectives ran.

before = observe(engine)
...
assert differences(before, observe(engine)) == []
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from verl.workers.engine.base import BaseEngine

from verl_gradalign.integration.engine import module_of

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def observe(engine: BaseEngine) -> dict[str, Any]:
    """Return everything that scoring must leave alone, tensors as copies of this rank's shards."""
    module, seen = module_of(engine), observe_model(engine)
    for name, parameter in module.named_parameters():
        seen[f"gradient {name}"] = None if parameter.grad is None else local(parameter.grad).clone()
        seen[f"gradient object {name}"] = None if parameter.grad is None else id(parameter.grad)
        seen[f"requires_grad {name}"] = parameter.requires_grad
    for name, submodule in module.named_modules():
        seen[f"training {name}"] = submodule.training
        seen[f"hooks {name}"] = [tuple(getattr(submodule, kind)) for kind in HOOKS]
    seen["mode"] = engine.mode
    seen["torch generator"] = torch.get_rng_state()
    seen["numpy generator"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    seen["python generator"] = random.getstate()
    return seen


def observe_model(engine: BaseEngine) -> dict[str, Any]:
    """Return copies of what a training step changes: parameters, buffers, optimizer state."""
    seen: dict[str, Any] = {}
    for name, parameter in module_of(engine).named_parameters():
        seen[f"parameter {name}"] = local(parameter).clone()
        for key, value in engine.optimizer.state[parameter].items():
            seen[f"optimizer {key} {name}"] = local(value).clone() if isinstance(value, Tensor) else value
    for name, buffer in module_of(engine).named_buffers():
        seen[f"buffer {name}"] = local(buffer).clone()
    return seen


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names of what is not bit-identical."""
    changed = sorted(before.keys() ^ after.keys())
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            same = old.dtype == new.dtype and old.shape == new.shape and old.numpy().tobytes() == new.numpy().tobytes()
        else:
            same = old is new or (not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new)
        if not same:
            changed.append(key)
    return changed


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that run under it, by the name of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))
