# SPDX-License-Identifier: Apache-2.0
"""A function run on several ranks of one machine, whose records come as they are made."""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import start_processes

from verl_gradalign.bench.device import process_group
from verl_gradalign.bench.options import Record

POLL_S = 0.2
OnRank = Callable[..., Iterator[Record]]
"""Of the rank's device and the arguments; found by name in every rank."""


def on_ranks(function: OnRank, num_ranks: int, kind: str, *arguments: Any) -> Iterator[Record]:
    """Yield the records of rank 0, of a function that every rank runs. Raises: what a rank raised, as text."""
    # What uses an accelerator cannot be forked; what computes on a CPU need not import all anew.
    method = "fork" if kind == "cpu" else "spawn"
    records = torch.multiprocessing.get_context(method).Queue()
    with tempfile.TemporaryDirectory() as root:
        where = (num_ranks, kind, Path(root) / "store")
        everything = (where, records, function, arguments)
        start: Any = start_processes
        ranks = start(_run, everything, num_ranks, join=False, start_method=method)
        is_over = False
        while not is_over:
            is_over = ranks.join(timeout=POLL_S)
            while True:
                try:
                    yield records.get(timeout=POLL_S) if is_over else records.get_nowait()
                except queue.Empty:
                    break


def _run(rank: int, where: tuple[int, str, Path], records: Any, function: OnRank, arguments: tuple[Any, ...]) -> None:
    num_ranks, kind, store = where
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, rank)
    if kind == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // num_ranks))
    else:
        torch.accelerator.set_device_index(rank)
    with process_group(device, store, rank, num_ranks):
        for record in function(device, *arguments):
            if rank == 0:
                records.put(record)
