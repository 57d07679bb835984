# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark's cases, each on as many ranks as it asks for, and writes its records line by line.

run_on_ranks(arguments, run_case, Path(arguments.out) / "update_cost.jsonl")
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.benchmarks.cases import SWEEPS, Case
from verl_gradalign.bench.ranks import on_ranks

RunCase = Callable[[Case, Path, argparse.Namespace], list[dict[str, Any]]]
"""Of a case, a folder that its ranks share, and the program's arguments; found by name in every rank."""


def run_on_ranks(arguments: argparse.Namespace, run_case: RunCase, results: Path) -> None:
    """Write the records of all cases of `arguments.sweeps`, in the place of what is there."""
    results.parent.mkdir(parents=True, exist_ok=True)
    results.unlink(missing_ok=True)
    cases = [case for sweep in arguments.sweeps for case in SWEEPS[sweep]]
    for world_size in sorted({case.num_ranks for case in cases}):
        with tempfile.TemporaryDirectory() as root:
            mine = [case for case in cases if case.num_ranks == world_size]
            for record in on_ranks(_run_cases, world_size, arguments.device, root, arguments, run_case, mine):
                line = json.dumps(record)
                print(line, flush=True)
                with results.open("a") as stream:
                    stream.write(line + "\n")


def _run_cases(
    device: torch.device, root: str, arguments: argparse.Namespace, run_case: RunCase, cases: list[Case]
) -> Iterator[dict[str, Any]]:
    torch.set_num_threads(max(1, arguments.threads // dist.get_world_size()))
    for case in cases:
        yield from run_case(case, Path(root), arguments)
