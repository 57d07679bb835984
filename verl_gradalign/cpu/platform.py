# SPDX-License-Identifier: Apache-2.0
"""A verl platform for machines without an accelerator, chosen with `VERL_PLATFORM=cpu`.

It answers verl's questions about a device with those of a CPU. Ray's resource stays "GPU", because verl counts
accelerators by that name: start Ray with as many logical GPUs as there are ranks (`configs/platform/cpu.yaml`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformRegistry
from verl.plugin.platform.platform_base import PlatformBase


def _do_nothing(*_: Any, **__: Any) -> None: ...


class CpuDeviceModule(ModuleType):
    """The part of the `torch.cuda` namespace that verl calls, answered for a CPU.

    Memory figures are the resident set of this process, in bytes. Random states are those of torch's CPU generator.
    """

    empty_cache = ipc_collect = reset_peak_memory_stats = reset_max_memory_allocated = set_device = _do_nothing
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)

    def __getattr__(self, name: str) -> Any:
        # torch.cpu has the stream and device calls (synchronize, current_stream, ...).
        return getattr(torch.cpu, name)

    @staticmethod
    def _resident(*_: Any) -> int:
        return psutil.Process().memory_info().rss

    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = _resident

    @staticmethod
    def mem_get_info(*_: Any) -> tuple[int, int]:
        """Return (available, total) bytes of main memory."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def get_device_name(*_: Any) -> str:
        """Return a name; verl looks its peak FLOP/s up and reports a utilisation of zero where it is unknown."""
        return "CPU"

    @staticmethod
    def get_rng_state(*_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


_DEVICE_MODULE = CpuDeviceModule("torch_cpu_as_device")


class CpuDevice(str):
    """The device id "cpu", which verl uses both as `.to(id)` and in `torch.device(f"{name}:{id}")`."""

    def __format__(self, spec: str) -> str:
        return "0"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """CPU backend: gloo collectives, no device memory, no profiler ranges."""

    set_device = synchronize = set_allocator_settings = empty_cache = _do_nothing
    profiler_start = profiler_stop = cudart = _do_nothing

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _DEVICE_MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Never found by detection: a GPU machine must not fall back to its CPU in silence.
        return False

    def current_device(self) -> CpuDevice:
        return CpuDevice("cpu")

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield
