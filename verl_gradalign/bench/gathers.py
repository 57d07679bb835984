# SPDX-License-Identifier: Apache-2.0
"""What of a pass is spent in putting shards together: all collectives of any method, and the direction's alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from verl_gradalign.bench.options import Record
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.bench.timing import timed
from verl_gradalign.probe.direction_gather import DirectionGather, UnitGather
from verl_gradalign.probe.estimators.ghost import tapped_scores
from verl_gradalign.probe.fsdp import Placement
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.tap_points import tap_points

KERNELS = re.compile(r"ncclDevKernel|ncclKernel|rccl|oneccl")
"""Of collectives, on accelerators. On a CPU gloo's threads mark what they run."""
ON_A_CPU = re.compile(r"gloo:")


def share_in_collectives(method: Callable[[], Any], device: torch.device) -> float | None:
    """Return the seconds of collectives, waiting for other ranks included, over those of the call. Collective.

    They may run beside products, so it is no loss of time yet. None where the profiler shows nothing of the device.
    """
    activities = [ProfilerActivity.CPU]
    if device.type != "cpu":
        activities.append(getattr(ProfilerActivity, device.type.upper(), ProfilerActivity.CUDA))
    with profile(activities=activities) as profiler:
        elapsed = timed(method, device)
    on_cpu, found = device.type == "cpu", profiler.key_averages()
    if not on_cpu and not any(event.self_device_time_total for event in found):
        return None
    pattern = ON_A_CPU if on_cpu else KERNELS
    mine = (event for event in found if pattern.search(event.key))
    microseconds = sum(event.cpu_time_total if on_cpu else event.self_device_time_total for event in mine)
    return microseconds / 1e6 / elapsed


def gathers_of_direction(bench: PlainBench, device: torch.device) -> Record:
    """Return what `ghost` spends in gathers of the direction, made once, and by FSDP unit in every pass. Collective.

    Once is what it does where the whole direction fits beside a pass. Each gather is waited for, so the second share is
    an upper bound.
    """
    points = tap_points(bench.module)
    with leave_no_trace(bench.module):
        gather = DirectionGather(bench.module, bench.direction, device)
        once = timed(lambda: gather.all({use.identity: use for p in points for use in p.placements}.values()), device)
        clock = Clock(UnitGather(gather, bench.module, [use for p in points for use in p.placements]), device)

        def score() -> None:
            problems = bench.whole
            tapped_scores(bench.engine, problems, bench.direction.norm, points, clock, per_response=False)

        total = timed(score, device)
    return {"gathered_once_s": once, "by_unit_s": clock.seconds, "pass_s": total, "share": clock.seconds / total}


class Clock:
    """Adds up the seconds of a gather."""

    def __init__(self, gather: Callable[[Placement], Tensor], device: torch.device) -> None:
        self.seconds = 0.0
        self._gather, self._device = gather, device

    def __call__(self, placement: Placement) -> Tensor:
        """Return the whole of a parameter's direction. Collective."""
        made: list[Tensor] = []
        self.seconds += timed(lambda: made.append(self._gather(placement)), self._device)
        return made[0]
