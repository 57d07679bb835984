# SPDX-License-Identifier: Apache-2.0
"""Runs a benchmark's cases, each on as many ranks as it asks for, and writes its records line by line.

run_on_ranks(arguments, run_case, Path(arguments.out) / "update_cost.jsonl")
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.benchmarks.cases import SWEEPS, Case

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
            torch.multiprocessing.spawn(
                _run_rank, (world_size, root, arguments, run_case, mine, results), nprocs=world_size
            )


def _run_rank(
    rank: int,
    world_size: int,
    root: str,
    arguments: argparse.Namespace,
    run_case: RunCase,
    cases: list[Case],
    results: Path,
) -> None:
    torch.set_num_threads(max(1, arguments.threads // world_size))
    backend = "nccl" if arguments.device == "cuda" else "gloo"
    store = f"file://{root}/store-{world_size}"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world_size)
    for case in cases:
        for record in run_case(case, Path(root), arguments):
            if rank == 0:
                line = json.dumps(record)
                print(line, flush=True)
                with results.open("a") as stream:
                    stream.write(line + "\n")
    dist.destroy_process_group()
