# SPDX-License-Identifier: Apache-2.0
"""The update, each estimator, and measuring in the update, side by side: time, peak memory, share in gathers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from verl_gradalign.bench.cases import LONG, QWEN_05B, QWEN_15B, Case, tiny
from verl_gradalign.bench.device import chosen_device, free_cache, one_rank, peak_of
from verl_gradalign.bench.gathers import gathers_of_direction, share_in_collectives
from verl_gradalign.bench.options import Options, Record, left_out
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.bench.timing import side_by_side
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.estimators import ESTIMATORS

REPEATS = 3
BASELINE = "update"
PROFILED = (BASELINE, "measured update, whole", "ghost, sums only", "backward")
RANK = 16
SUMS_ONLY = ProbeConfig(response_derivatives=False)


def run(options: Options) -> Iterator[Record]:
    """Yield what each method takes on one device, for each model and length of problems."""
    device = chosen_device(options.is_dry_run)
    with one_rank(device):
        for case in cases(options):
            yield from measured(case, device)
            free_cache(device)


def cases(options: Options) -> list[Case]:
    """Return what is measured, in order of value."""
    found = [replace(size, **length) for length in ({}, LONG) for size in (QWEN_05B, QWEN_15B)]
    return [tiny(found[0])] if options.is_dry_run else found


def methods_of(bench: PlainBench) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    methods: dict[str, Callable[[], Any]] = {
        BASELINE: bench.update_with_logits,
        "update without logits": bench.update,
        "measured update, whole": bench.measured_update,
        f"measured update, rank {RANK}": partial(bench.measured_update, RANK),
        "ghost, sums only": partial(bench.score, "ghost", SUMS_ONLY),
    }
    return methods | {name: partial(bench.score, name) for name in ESTIMATORS}


def measured(case: Case, device: torch.device) -> Iterator[Record]:
    """Yield a record for each method, one method's after the other. Collective."""
    where = {"model": case.sweep, "problem": case.shape, "ranks": case.num_ranks}
    try:
        bench = PlainBench(case, device)
        methods = methods_of(bench)
        timings = side_by_side(methods, REPEATS, device)
        for name, method in methods.items():
            timing, peak = timings[name], peak_of(method, device)
            ratios = timing.ratios(timings[BASELINE])
            yield {
                "table": "methods",
                **where,
                "method": name,
                "seconds": timing.median,
                "of_update": ratios[len(ratios) // 2],
                "least": ratios[0],
                "most": ratios[-1],
                "tokens_per_s": bench.num_tokens / timing.median,
                "peak_gb": peak.highest / 1e9,
                "beyond_gb": peak.beyond / 1e9,
                # Profiling takes seconds, however short the call.
                "in_collectives": share_in_collectives(method, device) if name in PROFILED else None,
            }
        yield {"table": "gathers of the direction", **where, **gathers_of_direction(bench, device)}
    except torch.OutOfMemoryError as error:
        if case.num_ranks > 1:  # the others wait in a collective
            raise
        yield left_out(where, error)
