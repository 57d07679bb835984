# SPDX-License-Identifier: Apache-2.0
"""Peak memory and collectives of a call, from a run that is not timed."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from verl_gradalign.bench.device import peak_of


class CountCollectives(TorchDispatchMode):
    """Counts collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.counts[func._opname.strip("_").removesuffix("_base")] += 1
        return func(*args, **(kwargs or {}))


class TrackStorage(TorchDispatchMode):
    """Notes the bytes of the storages that operations have made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._live += size
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def count_collectives(method: Callable[[], Any]) -> dict[str, int]:
    """Return how often the call uses each kind of collective, on this rank."""
    with CountCollectives() as mode:
        method()
    return dict(mode.counts)


def peak_bytes(method: Callable[[], Any], device: str) -> int:
    """Return the most memory that the call holds at once, beyond what was there before, on this rank."""
    if device != "cpu":
        return peak_of(method, torch.device(device)).beyond
    with TrackStorage() as mode:
        method()
    return mode.peak
