# SPDX-License-Identifier: Apache-2.0
"""Everything of an engine that scoring must leave alone, compared bit for bit, and which collectives ran.

before = observe(engine)
...
assert differences(before, observe(engine)) == []
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from verl.workers.engine.base import BaseEngine

from verl_gradalign.bench import observations
from verl_gradalign.bench.observations import differences
from verl_gradalign.integration.engine import module_of
from verl_gradalign.probe.fsdp import local_part

__all__ = ["CollectiveCounter", "differences", "local", "observe", "observe_model"]


def local(tensor: Tensor) -> Tensor:
    return local_part(tensor).detach()


def observe(engine: BaseEngine) -> dict[str, Any]:
    """Return everything that scoring must leave alone, tensors as copies of this rank's shards."""
    return {**observations.observe(module_of(engine), engine.optimizer), "mode": engine.mode}


def observe_model(engine: BaseEngine) -> dict[str, Any]:
    """Return copies of what a training step changes: parameters, buffers, optimizer state."""
    return observations.observe_training(module_of(engine), engine.optimizer)


class CollectiveCounter(TorchDispatchMode):
    """Counts the collectives that run under it, by the name of the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))
