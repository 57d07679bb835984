# SPDX-License-Identifier: Apache-2.0
"""What measuring changes, bit for bit: nothing, neither at once nor in the next step; and in the update no gradient.

Two equal updates may differ on a GPU by themselves, where sums are atomic; torch is told to be deterministic, and what
two updates without measuring differ in is shown beside.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from verl_gradalign.bench.cases import QWEN_05B, tiny
from verl_gradalign.bench.device import chosen_device, one_rank
from verl_gradalign.bench.observations import Seen, differences, observe, observe_training
from verl_gradalign.bench.options import Options, Record
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.fsdp import local_part

NUM_PROBLEMS = 4
RANK = 16


def run(options: Options) -> Iterator[Record]:
    """Yield what each estimator changes, and whether the update is the same behind it and around it."""
    # Read when the first product is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = chosen_device(options.is_dry_run)
    case = replace(tiny(QWEN_05B) if options.is_dry_run else QWEN_05B, num_problems=NUM_PROBLEMS)
    with one_rank(device):
        bench = PlainBench(case, device)
        bench.update()  # fills the optimizer's state
        for name in ESTIMATORS:
            yield _left_alone(bench, name)
        yield from _next_step(bench)
        yield from _in_the_update(bench)


def _left_alone(bench: PlainBench, estimator: str) -> Record:
    """Score while gradients are there, and look at everything before and afterwards."""
    bench.gradient_with_logits()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = observe(bench.module, bench.optimizer)
    bench.score(estimator)
    changed = differences(before, observe(bench.module, bench.optimizer))
    bench.optimizer.zero_grad(set_to_none=True)
    kinds = Counter(key.split()[0] for key in before)
    names = {"parameters": "parameter", "gradients": "gradient", "moments": "optimizer", "buffers": "buffer"}
    looked_at = {name: kinds[kind] for name, kind in names.items()}
    claim = f"{estimator} leaves weights, gradients, optimizer, buffers and generators as they were"
    record: Record = {"table": "at once", "estimator": estimator, **looked_at, "changed": ", ".join(changed[:5])}
    return {**record, "claim": claim, "holds": not changed}


def _next_step(bench: PlainBench) -> Iterator[Record]:
    """Take the same step again and again from one state: twice by itself, and once behind each estimator."""
    state = observe_training(bench.module, bench.optimizer)

    def step(before: Callable[[], object]) -> Seen:
        _restore(bench, state)
        before()
        bench.update_with_logits()
        return observe_training(bench.module, bench.optimizer)

    plain = step(lambda: None)
    by_itself = differences(plain, step(lambda: None))
    for name in ("ghost", "finite_difference"):
        changed = differences(plain, step(partial(bench.score, name)))
        yield _against_control("next step", name, changed, by_itself, f"the step behind {name} is the one without it")
    _restore(bench, state)


def _in_the_update(bench: PlainBench) -> Iterator[Record]:
    """Take the gradient twice by itself, and once with each way of measuring in its passes."""
    plain = _gradient(bench, bench.gradient_with_logits)
    by_itself = differences(plain, _gradient(bench, bench.gradient_with_logits))
    for name, rank in (("the whole direction", None), (f"rank {RANK} of it", RANK)):
        changed = differences(plain, _gradient(bench, partial(bench.measured_gradient, rank)))
        claim = f"an update measured along {name} takes the gradient of one without"
        yield _against_control("in the update", name, changed, by_itself, claim)


def _against_control(table: str, way: str, changed: Sequence[str], by_itself: Sequence[str], claim: str) -> Record:
    """Return a record whose claim is open where two runs without measuring differ too."""
    holds = None if by_itself else not changed
    shown = {"way": way, "changed": len(changed), "changed_by_itself": len(by_itself), "first": ", ".join(changed[:2])}
    return {"table": table, **shown, "claim": claim, "holds": holds}


def _gradient(bench: PlainBench, make: Callable[[], object]) -> Seen:
    make()
    named = bench.module.named_parameters()
    found = {name: local_part(p.grad).detach().clone() for name, p in named if p.grad is not None}
    bench.optimizer.zero_grad(set_to_none=True)
    return dict(found)


def _restore(bench: PlainBench, state: Seen) -> None:
    """Put parameters, buffers and the optimizer's state back, in place."""
    with torch.no_grad():
        for name, parameter in bench.module.named_parameters():
            local_part(parameter).copy_(state[f"parameter {name}"])
            for key, value in bench.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    local_part(value).copy_(state[f"optimizer {key} {name}"])
        for name, buffer in bench.module.named_buffers():
            local_part(buffer).copy_(state[f"buffer {name}"])
