# SPDX-License-Identifier: Apache-2.0
"""Move the parameters along the direction, shard by shard, and put back the very same bits.

Local shards only: no communication. FSDP keeps unsharded copies between passes, in ways that differ by version and
setting, so every unit is resharded before an edit and after it (tests/distributed/test_fsdp.py).

    with perturbation(module, direction) as move:
        move(+step); engine.forward(...)
        move(-step); engine.forward(...)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl_gradalign.probe.direction import Direction, require_same_shards
from verl_gradalign.probe.gradient import reshard, trainable_parameters


@contextmanager
def perturbation(module: nn.Module, direction: Direction) -> Iterator[Callable[[float], None]]:
    """Yield `move(step)`, which sets the parameters to theta + step * v / |v|; restore theta bit for bit on exit.

    Holds a second copy of this rank's trainable shards.

    Raises: RuntimeError if the direction does not fit the module's shards; ValueError if a trainable parameter is
        stored in less than float32, where a small step is lost to rounding.
    """
    reshard(module)
    require_same_shards(module, direction)
    require_full_precision(module)
    locals_ = [_local(parameter) for _, parameter in trainable_parameters(module)]
    originals = [local.clone() for local in locals_]

    def move(step: float) -> None:
        reshard(module)
        for local, original, shard in zip(locals_, originals, direction.shards, strict=True):
            if shard is not None:
                torch.add(original, shard.to(original), alpha=step, out=local)

    try:
        yield move
    finally:
        reshard(module)
        for local, original in zip(locals_, originals, strict=True):
            local.copy_(original)
        reshard(module)


def require_full_precision(module: nn.Module) -> None:
    """Raise ValueError, naming the parameter, if a trainable one is stored in half precision."""
    for name, parameter in trainable_parameters(module):
        if parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} is stored in {parameter.dtype}, where a small step is lost to rounding. Remedy: store "
                "parameters in float32 (actor.fsdp_config.model_dtype=fp32), or set gradalign.estimator=ghost"
            )


def _local(parameter: nn.Parameter) -> Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()
