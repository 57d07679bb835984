# SPDX-License-Identifier: Apache-2.0
"""Scores in float32 and in bf16 against each problem's gradient by plain autograd in float32.

TF32 is off: its products have ten bits, and would be taken for errors of the scores.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import nn

from verl_gradalign.bench.agreement import agreement, is_exact, is_faithful
from verl_gradalign.bench.cases import LONG, LONGEST, QWEN_05B, QWEN_15B, Case, build_model, tiny
from verl_gradalign.bench.device import chosen_device, free_cache, one_rank
from verl_gradalign.bench.options import Options, Record, left_out
from verl_gradalign.bench.plain import PlainBench, sharded, with_checkpointing
from verl_gradalign.bench.reference import Reference, reference_scores
from verl_gradalign.probe.estimators import ESTIMATORS

LENGTHS = ({"num_problems": 16}, {**LONG, "num_problems": 8}, LONGEST)
CLAIMED = ("ghost", "backward")
"""What must be faithful in bf16; the others are approximations in any precision."""
SIZES = (QWEN_05B, QWEN_15B)


def run(options: Options) -> Iterator[Record]:
    """Yield the agreement of every estimator, small problems of all models first."""
    device = chosen_device(options.is_dry_run)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield {"table": "precision", "float32_matmul": torch.get_float32_matmul_precision(), "tf32": False}
    models: dict[str, tuple[nn.Module, nn.Module]] = {}
    rate = 0.0
    with one_rank(device):
        for length, size in product(LENGTHS, SIZES):
            case = replace(size, **length)
            case = tiny(case) if options.is_dry_run else case
            if case.sweep not in models:
                models[case.sweep] = _twins(case, device)
            single, half = models[case.sweep]
            work = _work(case, single)
            if rate and work / rate > options.seconds_left:
                why = f"would take {work / rate:.0f} s, {options.seconds_left:.0f} s are left"
                yield left_out({"model": case.sweep, "problem": case.shape}, why)
                continue
            started = time.monotonic()
            yield from _compared(case, device, single, half)
            rate = work / (time.monotonic() - started)


def _twins(case: Case, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return the case's model plain in float32, and of the same weights as FSDP2 computes with them in bf16."""
    single = with_checkpointing(build_model(case), case).to(device)
    twin: Any = copy.deepcopy(single)
    return single, sharded(twin, list(twin.model.layers), "bfloat16", device)


def _work(case: Case, module: nn.Module) -> float:
    """Return a number that the time of a case is in proportion to."""
    return float((case.num_problems + 4) * case.rows_per_problem * case.tokens_per_row) * sum(
        parameter.numel() for parameter in module.parameters()
    )


def _compared(case: Case, device: torch.device, single: nn.Module, half: nn.Module) -> Iterator[Record]:
    where = {"model": case.sweep, "problem": case.shape, "problems": case.num_problems}
    try:
        bench = PlainBench(replace(case, dtype="float32"), device, single)
        reference = reference_scores(single, bench.trusted, bench.candidates)
        yield from _of_float32(bench, reference, where)
        del bench
        yield from _of_half(PlainBench(case, device, half), reference, where)
    except torch.OutOfMemoryError as error:
        # Cases that need less memory may follow, and the others are noted already.
        yield left_out(where, error)
        single.zero_grad(set_to_none=True)
        half.zero_grad(set_to_none=True)
        free_cache(device)


def _of_float32(bench: PlainBench, reference: Reference, where: Record) -> Iterator[Record]:
    found = agreement(bench.score("ghost"), reference)
    direction = bench.direction.norm / reference.direction_norm - 1
    claim = f"ghost is exact in float32: {where['model']}, {where['problem']}"
    yield {"table": "float32", **where, **found, "direction_norm": direction, "claim": claim, "holds": is_exact(found)}


def _of_half(bench: PlainBench, reference: Reference, where: Record) -> Iterator[Record]:
    for name in ESTIMATORS:
        found = agreement(bench.score(name), reference)
        record: Record = {"table": "bf16", **where, "estimator": name, **found}
        if name in CLAIMED:
            claim = f"{name} in bf16 agrees with float32: {where['model']}, {where['problem']}"
            record |= {"claim": claim, "holds": is_faithful(found)}
        yield record
