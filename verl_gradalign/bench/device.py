# SPDX-License-Identifier: Apache-2.0
"""The accelerator, whichever torch knows, or the CPU in its place: memory, waiting, process groups of one rank and of
several.

with one_rank(device):
    peak = peak_of(method, device)
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")
TIMEOUT = datetime.timedelta(minutes=5)
"""Of a collective: a rank that waits longer waits for one that has died."""


def chosen_device(is_dry_run: bool) -> torch.device:
    """Return the current accelerator, or the CPU in a dry run. Raises: RuntimeError if there is no accelerator."""
    if is_dry_run:
        return torch.device("cpu")
    if not torch.accelerator.is_available():
        raise RuntimeError("torch sees no accelerator here")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, torch.accelerator.current_device_index())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def free_cache(device: torch.device) -> None:
    """Give back what the allocator keeps of freed tensors, those of models that only hooks hold together too."""
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


@dataclass(frozen=True)
class Peak:
    """The most bytes that lay in memory during a call."""

    highest: int
    """Of all that the process holds there."""
    before: int

    @property
    def beyond(self) -> int:
        """Return what the call took more than was there before."""
        return self.highest - self.before


def peak_of(method: Callable[[], Any], device: torch.device) -> Peak:
    """Return the peak of the device's memory during a call; of a CPU the resident set's, libraries included."""
    if device.type == "cpu":
        _forget_peak()
        before = _resident()[0]
        method()
        return Peak(_resident()[1], before)
    module = torch.get_device_module(device)
    synchronize(device)
    before = module.memory_allocated(device)
    module.reset_peak_memory_stats(device)
    method()
    synchronize(device)
    return Peak(module.max_memory_allocated(device), before)


def _forget_peak() -> None:
    # Where the kernel does not let a process set its high-water mark back, it is that of all of its life.
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5", encoding="ascii")


def _resident() -> tuple[int, int]:
    """Return the bytes of the resident set, and its high-water mark."""
    try:
        lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
        now, highest = (1024 * int(lines[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    except (OSError, KeyError):
        unit = 1 if sys.platform == "darwin" else 1024
        now = highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return now, highest


@contextlib.contextmanager
def process_group(device: torch.device, store: Path, rank: int = 0, num_ranks: int = 1) -> Iterator[None]:
    """Open the default process group on the device's own backend; the ranks find each other by the file."""
    backend = dist.get_default_backend_for_device(device)
    # Said, so that NCCL does not guess it from the rank.
    bound: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
    where: dict[str, Any] = {"init_method": f"file://{store}", "rank": rank, "world_size": num_ranks}
    dist.init_process_group(backend, timeout=TIMEOUT, **where, **bound)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """Open a process group of this process alone, which FSDP2 needs on one device too."""
    with tempfile.TemporaryDirectory() as root, process_group(device, Path(root) / "store"):
        yield
