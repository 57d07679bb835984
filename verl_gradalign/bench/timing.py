# SPDX-License-Identifier: Apache-2.0
"""Methods timed side by side: each once in every repeat, in turn, so that what else a machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from verl_gradalign.bench.device import synchronize

Method = Callable[[], Any]


def timed(method: Method, device: torch.device) -> float:
    """Return the seconds that `method` takes from when all ranks are ready until it is done on the device."""
    if dist.is_initialized():
        dist.barrier()
    synchronize(device)
    started = time.perf_counter()
    method()
    synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Timing:
    """Of one method, over the repeats."""

    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
    """Of this process, which a busy machine disturbs less."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratios(self, other: Timing) -> list[float]:
        """Return the times as ratios to another method's of the same repeat, in order of size."""
        return sorted(mine / its for mine, its in zip(self.seconds, other.seconds, strict=True))

    def processor_ratio(self, other: Timing) -> float:
        """Return the median ratio of processor seconds to another method's of the same repeat."""
        pairs = zip(self.processor_seconds, other.processor_seconds, strict=True)
        return statistics.median(mine / its for mine, its in pairs)


def side_by_side(methods: Mapping[str, Method], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Return every method's times; a first repeat warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    processor: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, method in methods.items():
            before = time.process_time()
            elapsed = timed(method, device)
            if repeat:
                seconds[name].append(elapsed)
                processor[name].append(time.process_time() - before)
    return {name: Timing(tuple(seconds[name]), tuple(processor[name])) for name in methods}
