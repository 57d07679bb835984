# SPDX-License-Identifier: Apache-2.0
"""What the numbers were measured on: devices, versions, precision, and what a plain matrix product reaches."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from verl_gradalign.bench.device import chosen_device, synchronize
from verl_gradalign.bench.options import Options, Record
from verl_gradalign.bench.timing import timed
from verl_gradalign.doctor.machine import driver_version
from verl_gradalign.versions import installed_versions, version_of

OTHERS = ("flash-attn", "peft", "triton", "accelerate", "liger-kernel")
VARIABLES = (
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "NCCL_P2P_DISABLE",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
WIDTH, DRY_WIDTH, PRODUCTS = 8192, 128, 20


def run(options: Options) -> Iterator[Record]:
    """Yield the machine, the software, each device, and the speed of products."""
    device = chosen_device(options.is_dry_run)
    memory = psutil.virtual_memory()
    yield {
        "table": "machine",
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": memory.total / 1e9,
        "free_gb": memory.available / 1e9,
        "runs_on": device.type,
    }
    versions = {"python": platform.python_version(), **installed_versions()}
    versions |= {name: version for name in OTHERS if (version := version_of(name)) is not None}
    versions |= {"cuda": torch.version.cuda or "none", "hip": torch.version.hip or "none"}
    versions |= {"driver": driver_version() or "none"}
    yield from ({"table": "versions", "package": name, "version": version} for name, version in versions.items())
    yield from (
        {"table": "variables", "name": name, "value": os.environ[name]} for name in VARIABLES if name in os.environ
    )
    yield {
        "table": "precision",
        "float32_matmul": torch.get_float32_matmul_precision(),
        "tf32_of_cuda": torch.backends.cuda.matmul.allow_tf32,
        "tf32_of_cudnn": torch.backends.cudnn.allow_tf32,
        "flash_attention": find_spec("flash_attn") is not None,
    }
    if device.type != "cpu":
        yield from _devices(device)
    yield from _products(device, DRY_WIDTH if options.is_dry_run else WIDTH)


def _processor() -> str:
    """Return the processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _devices(device: torch.device) -> Iterator[Record]:
    module = torch.get_device_module(device)
    for index in range(torch.accelerator.device_count()):
        free, total = module.mem_get_info(index)
        record: Record = {"table": "devices", "device": index, "name": module.get_device_name(index)}
        record |= {"memory_gb": total / 1e9, "free_gb": free / 1e9}
        if hasattr(module, "get_device_capability"):
            record["capability"] = ".".join(map(str, module.get_device_capability(index)))
        yield record


def _products(device: torch.device, width: int) -> Iterator[Record]:
    """Yield the operations per second of a square product: what the times of the other parts can be held against."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        first, second = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        first @ second
        synchronize(device)

        def multiply(first: torch.Tensor = first, second: torch.Tensor = second) -> None:
            for _ in range(PRODUCTS):
                torch.mm(first, second)

        seconds = timed(multiply, device) / PRODUCTS
        yield {
            "table": "products",
            "dtype": str(dtype).removeprefix("torch."),
            "tflop_per_s": 2 * width**3 / seconds / 1e12,
        }
