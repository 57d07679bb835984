# SPDX-License-Identifier: Apache-2.0
"""A verl platform for machines without an accelerator, chosen with `VERL_PLATFORM=cpu`.

It answers verl's questions about a device with those of a CPU. Ray's resource stays "GPU", because verl counts
accelerators by that name: start Ray with as many logical GPUs as there are ranks (`configs/platform/cpu.yaml`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformRegistry
from verl.plugin.platform.platform_base import PlatformBase


def _always(value: Any) -> Callable[..., Any]:
    """Return a function, or method, whose answer is `value` whatever it is asked."""
    return lambda *_, **__: value


class CpuDeviceModule(ModuleType):
    """The part of the `torch.cuda` namespace that verl calls, answered for a CPU.

    Memory figures are the resident set of this process, in bytes. Random states are those of torch's CPU generator.
    """

    empty_cache = ipc_collect = reset_peak_memory_stats = reset_max_memory_allocated = set_device = _always(None)
    # verl looks its peak FLOP/s up by this name, and reports a utilisation of zero where it is unknown.
    get_device_name = _always("CPU")
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)

    def __getattr__(self, name: str) -> Any:
        # torch.cpu has the stream and device calls (synchronize, current_stream, ...).
        return getattr(torch.cpu, name)

    memory_allocated = memory_reserved = max_memory_allocated = max_memory_reserved = staticmethod(
        lambda *_: psutil.Process().memory_info().rss
    )

    @staticmethod
    def mem_get_info(*_: Any) -> tuple[int, int]:
        """Return (available, total) bytes of main memory."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    get_rng_state = staticmethod(lambda *_: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_: torch.set_rng_state(state))


class CpuDevice(str):
    """The device id "cpu", which verl uses both as `.to(id)` and in `torch.device(f"{name}:{id}")`."""

    def __format__(self, spec: str) -> str:
        return "0"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """CPU backend: gloo collectives, no device memory, no profiler ranges."""

    device_name = vendor_name = "cpu"
    device_module: ModuleType = CpuDeviceModule("torch_cpu_as_device")
    is_available = _always(True)
    # Never found by detection: a GPU machine must not fall back to its CPU in silence.
    is_platform_available = _always(False)
    current_device = _always(CpuDevice("cpu"))
    device_count = _always(1)
    get_device_capability = _always((None, None))
    communication_backend_name = _always("gloo")
    visible_devices_envvar = _always("CUDA_VISIBLE_DEVICES")
    ray_resource_name = _always("GPU")
    is_ipc_supported = _always(False)
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    set_device = synchronize = set_allocator_settings = empty_cache = _always(None)
    profiler_start = profiler_stop = cudart = _always(None)
    ray_noset_envvars = _always(["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"])
    nvtx_range = _always(nullcontext())
