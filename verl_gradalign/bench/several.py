# SPDX-License-Identifier: Apache-2.0
"""The same on all devices together under FSDP2: what gathers take, and whether ranks change the scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from verl_gradalign.bench.agreement import HALF_RMS, largest_difference
from verl_gradalign.bench.cases import QWEN_15B, Case, tiny
from verl_gradalign.bench.device import chosen_device, free_cache, one_rank
from verl_gradalign.bench.options import Options, Record, Skipped
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.bench.ranks import on_ranks
from verl_gradalign.bench.speed import measured

ESTIMATOR = "ghost"
SCORES = "scores of all ranks"


def run(options: Options) -> Iterator[Record]:
    """Yield what each method takes on all devices. Skipped where there is one alone."""
    num_ranks = options.num_devices
    if num_ranks < 2:
        raise Skipped("one device is seen here, and gathers need two or more")
    kind = "cpu" if options.is_dry_run else _kind()
    case = tiny(QWEN_15B) if options.is_dry_run else QWEN_15B
    # More problems than ranks: whole problems lie on one rank.
    case = replace(case, num_ranks=num_ranks, num_problems=2 * num_ranks)
    together: Record = {}
    for record in on_ranks(on_one, num_ranks, kind, case):
        if record["table"] == SCORES:
            together = record
        else:
            yield record
    # Not before: torch cannot be forked once it has computed gradients.
    device = chosen_device(options.is_dry_run)
    with one_rank(device):
        alone = PlainBench(replace(case, num_ranks=1), device).score(ESTIMATOR)
    dot_P, norm_P = (torch.tensor(together[name], dtype=torch.float64) for name in ("dots", "norms"))
    scores = replace(alone, dot_P=dot_P, norm_P=norm_P)
    difference = largest_difference(scores, alone)
    claim = f"scores on {num_ranks} devices are those on one"
    record = {"table": "scores", "model": case.sweep, "problem": case.shape, "ranks": num_ranks}
    yield {**record, "difference": difference, "claim": claim, "holds": difference <= HALF_RMS}


def on_one(device: torch.device, case: Case) -> Iterator[Record]:
    """Yield the scores of all ranks together, and then this rank's measurements. Collective."""
    scores = PlainBench(case, device).score(ESTIMATOR)
    assert scores.norm_P is not None
    yield {"table": SCORES, "dots": scores.dot_P.tolist(), "norms": scores.norm_P.tolist()}
    free_cache(device)
    yield from measured(case, device)


def _kind() -> str:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return kind.type
