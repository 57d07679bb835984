# SPDX-License-Identifier: Apache-2.0
"""Other ways to train: fp16, parameters in CPU memory, adapters. Scores, time and memory of each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from verl_gradalign.bench.agreement import agreement, is_faithful, largest_difference
from verl_gradalign.bench.cases import QWEN_05B, Case, build_model, tiny
from verl_gradalign.bench.device import chosen_device, one_rank, peak_of
from verl_gradalign.bench.options import Options, Record
from verl_gradalign.bench.plain import PlainBench, sharded, with_checkpointing
from verl_gradalign.bench.reference import reference_scores
from verl_gradalign.bench.timing import Method, side_by_side
from verl_gradalign.probe.estimators import ESTIMATORS

REPEATS = 3
LONG_ENOUGH = 1600
"""Tokens of a row, eight of which have coefficients near the smallest numbers of fp16."""
ADAPTER_RANK = 32
SAME = 1e-5
"""Difference of scores whose parameters only lie elsewhere, as a share of the norm: float32 sums in another order."""
BY_ITSELF = 10.0
"""Times the difference of two equal passes, where sums on the device are atomic."""


def fp16(options: Options) -> Iterator[Record]:
    """Yield the agreement of fp16 scores with float32 ones, for every estimator."""
    device = chosen_device(options.is_dry_run)
    case = replace(QWEN_05B, dtype="float16", tokens_per_row=LONG_ENOUGH)
    case = tiny(case) if options.is_dry_run else case
    single = with_checkpointing(build_model(case), case).to(device)
    plain = PlainBench(replace(case, dtype="float32"), device, single)
    reference = reference_scores(single, plain.trusted, plain.candidates)
    del plain, single
    with one_rank(device):
        bench = PlainBench(case, device)
        for name in ESTIMATORS:
            found = agreement(bench.score(name), reference)
            record: Record = {"table": "fp16", "problem": case.shape, "estimator": name, **found}
            if name in ("ghost", "backward"):
                record |= {"claim": f"{name} in fp16 agrees with float32", "holds": is_faithful(found)}
            yield record


def offload(options: Options) -> Iterator[Record]:
    """Yield what changes where FSDP2 keeps parameters in CPU memory, and where they have been there in between."""
    device = chosen_device(options.is_dry_run)
    case = tiny(QWEN_05B) if options.is_dry_run else QWEN_05B
    with one_rank(device):
        here = PlainBench(case, device)
        module = with_checkpointing(build_model(case), case)
        away = PlainBench(
            case, device, sharded(module, list(module.model.layers), case.dtype, device, is_offloaded=True)
        )
        benches = {"on the device": here, "FSDP2's offload": away}
        methods = {name: partial(bench.score, "ghost") for name, bench in benches.items()}
        timings = side_by_side(methods, REPEATS, device)
        plain = here.score("ghost")
        allowed = max(SAME, BY_ITSELF * largest_difference(here.score("ghost"), plain))
        for name, method in methods.items():
            difference = largest_difference(method(), plain)
            peak = peak_of(method, device).highest / 1e9
            record = {"table": "offload", "parameters": name, "seconds": timings[name].median, "peak_gb": peak}
            claim = f"scores do not depend on where parameters lie: {name}"
            yield {**record, "difference": difference, "claim": claim, "holds": difference <= allowed}
        # verl's own way: moved as a whole, between its phases.
        here.module.to("cpu")
        here.module.to(device)
        difference = largest_difference(here.score("ghost"), plain)
        claim = "scores do not depend on where parameters lie: moved away and back"
        record = {"table": "offload", "parameters": "moved away and back", "difference": difference}
        yield {**record, "claim": claim, "holds": difference <= allowed}


def lora(options: Options) -> Iterator[Record]:
    """Yield the agreement of adapters' scores with float32 ones, and what they and the update take."""
    device = chosen_device(options.is_dry_run)
    case = tiny(QWEN_05B) if options.is_dry_run else QWEN_05B
    single = _with_adapters(case, device)
    twin: Any = copy.deepcopy(single)
    plain = PlainBench(replace(case, dtype="float32"), device, single)
    reference = reference_scores(single, plain.trusted, plain.candidates)
    exact = agreement(plain.score("ghost"), reference)
    yield {"table": "adapters", "dtype": "float32", "method": "ghost", **exact}
    del plain, single
    with one_rank(device):
        layers = list(twin.get_base_model().model.layers)
        bench = PlainBench(case, device, sharded(twin, layers, case.dtype, device))
        methods: dict[str, Method] = {"update": bench.update_with_logits, "ghost": partial(bench.score, "ghost")}
        timings = side_by_side(methods, REPEATS, device)
        for name, method in methods.items():
            peak = peak_of(method, device).highest / 1e9
            yield {"table": "cost", "method": name, "seconds": timings[name].median, "peak_gb": peak}
        # Behind the updates the adapters are others: the learning rate is too small to show in the scores.
        found = agreement(bench.score("ghost"), reference)
        claim = "ghost of adapters in bf16 agrees with float32"
        record = {"table": "adapters", "dtype": "bfloat16", "method": "ghost", **found}
        yield {**record, "claim": claim, "holds": is_faithful(found)}


def _with_adapters(case: Case, device: torch.device) -> nn.Module:
    """Return the case's model with adapters on all linear layers of its blocks, both of whose halves are random."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=ADAPTER_RANK, lora_alpha=ADAPTER_RANK, target_modules="all-linear", lora_dropout=0.0)
    model: Any = get_peft_model(build_model(case), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and with it the gradient of the other half
                parameter.normal_(std=0.02)
    if case.has_checkpointing:
        # Checkpointed blocks must be reached by a gradient, and the embedding in front of them is frozen.
        model.enable_input_require_grads()
    return with_checkpointing(model, case).to(device)
