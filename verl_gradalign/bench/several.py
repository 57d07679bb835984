# SPDX-License-Identifier: Apache-2.0
"""The same on all devices together under FSDP2: what gathers take, and whether ranks change the scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from verl_gradalign.bench.cases import QWEN_15B, Case, tiny
from verl_gradalign.bench.options import Options, Record, Skipped
from verl_gradalign.bench.ranks import on_ranks
from verl_gradalign.bench.speed import measured


def run(options: Options) -> Iterator[Record]:
    """Yield what each method takes on all devices. Skipped where there is one alone."""
    num_ranks = options.num_devices
    if num_ranks < 2:
        raise Skipped("one device is seen here, and gathers need two or more")
    kind = "cpu" if options.is_dry_run else _kind()
    case = tiny(QWEN_15B) if options.is_dry_run else QWEN_15B
    # More problems than ranks: whole problems lie on one rank.
    case = replace(case, num_ranks=num_ranks, num_problems=2 * num_ranks)
    yield from on_ranks(on_one, num_ranks, kind, case)


def on_one(device: torch.device, case: Case) -> Iterator[Record]:
    """Yield this rank's measurements. Collective."""
    yield from measured(case, device)


def _kind() -> str:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return kind.type
