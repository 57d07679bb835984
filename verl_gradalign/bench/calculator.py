# SPDX-License-Identifier: Apache-2.0
"""The calculator's memory and operations (`verl-gradalign cost`) against what an update and a scoring pass take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from verl_gradalign.bench.cases import LONG, QWEN_05B, QWEN_15B, Case, config_of, tiny
from verl_gradalign.bench.device import chosen_device, free_cache, one_rank, peak_of
from verl_gradalign.bench.options import Options, Record, left_out
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.bench.speed import BASELINE, methods_of
from verl_gradalign.bench.timing import side_by_side
from verl_gradalign.cost import ModelShape, Setting, estimate
from verl_gradalign.cost.estimate import score, update

REPEATS = 3
WITHOUT_DERIVATIVES = "ghost, sums only"
"""What the calculator counts by default."""


def run(options: Options) -> Iterator[Record]:
    """Yield computed beside measured numbers, of each model."""
    device = chosen_device(options.is_dry_run)
    found = [replace(size, **length) for size in (QWEN_05B, QWEN_15B) for length in ({}, LONG)]
    with one_rank(device):
        for case in [tiny(found[0])] if options.is_dry_run else found:
            try:
                yield from _compared(case, device)
            except torch.OutOfMemoryError as error:
                yield left_out({"model": case.sweep, "problem": case.shape}, error)
            free_cache(device)


def setting_of(case: Case) -> Setting:
    """Return what the calculator is told of a case."""
    prompt = case.tokens_per_row // 4
    response = case.tokens_per_row - prompt
    return Setting(
        ModelShape.from_hf_config(config_of(case).to_dict(), case.sweep),
        num_gpus=case.num_ranks,
        train_batch_size=case.num_problems,
        rollout_n=case.rows_per_problem,
        prompt_tokens=prompt,
        response_tokens=response,
        max_prompt_tokens=prompt,
        max_response_tokens=response,
        oversample=1.0,
        estimator="ghost",
        has_checkpointing=case.has_checkpointing,
        micro_batch_tokens=case.max_tokens,
        compute_bytes=4 if case.dtype == "float32" else 2,
        # Here it lies on the device while the update runs.
        is_direction_offloaded=False,
    )


def _compared(case: Case, device: torch.device) -> Iterator[Record]:
    setting = setting_of(case)
    memory = estimate(setting).memory
    bench = PlainBench(case, device)
    every = methods_of(bench)
    methods = {name: every[name] for name in (BASELINE, WITHOUT_DERIVATIVES)}
    timings = side_by_side(methods, REPEATS, device)
    operations = {BASELINE: update(setting) * bench.num_tokens, WITHOUT_DERIVATIVES: score(setting) * bench.num_tokens}
    computed = {BASELINE: memory["update"], WITHOUT_DERIVATIVES: memory["score"]}
    for name, method in methods.items():
        peak, seconds = peak_of(method, device).highest, timings[name].median
        yield {
            "table": "memory and time",
            "model": case.sweep,
            "problem": case.shape,
            "method": name,
            "computed_gb": computed[name] / 1e9,
            "measured_gb": peak / 1e9,
            "memory_ratio": peak / computed[name],
            "computed_of_update": operations[name] / operations[BASELINE],
            "measured_of_update": seconds / timings[BASELINE].median,
            "tflop_per_s": operations[name] / seconds / 1e12,
        }
