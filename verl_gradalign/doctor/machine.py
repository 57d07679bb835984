# SPDX-License-Identifier: Apache-2.0
"""The machine: versions of packages, GPUs, memory and limits of the system."""

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.specifiers import SpecifierSet

from verl_gradalign.findings import Findings
from verl_gradalign.versions import version_of

PYTHON = SpecifierSet(">=3.10,<3.13")
REQUIRED = {
    "verl": ">=0.9.1,<0.10",
    "torch": "",
    "ray": "",
    "TransferQueue": ">=0.1.10,<0.2",
    "transformers": "",
    "tensordict": "",
    "pyarrow": ">=19",
}
"""As setup.py asks for; tests/unit/test_doctor.py compares the two."""
ENGINES = ("vllm", "sglang")
MIN_SHARED_BYTES = 2e9
MIN_OPEN_FILES = 4096
MIN_FREE_GB = 2.0
RAY_SOCKET = "/session_2026-01-01_00-00-00_000000_1000000/sockets/plasma_store"
"""Below Ray's folder; the last number is that of the process."""
MAX_SOCKET_PATH = 107
FREE_SHARE = 0.95
"""Of a GPU's memory; less is a sign of another process."""


@dataclass(frozen=True)
class Machine:
    """What a run can use here."""

    num_gpus: int
    gpu_gb: float
    """Of the smallest GPU; 0 without."""
    host_gb: float


def asks_for_cpu() -> bool:
    """Return whether the environment chooses verl's CPU platform."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def examine_environment(findings: Findings) -> Machine:
    """Add findings on packages, plugin, GPUs and the system; return what the machine has."""
    _packages(findings)
    _plugin(findings)
    machine = _hardware(findings)
    _limits(findings)
    examine_folders(findings)
    return machine


def _packages(findings: Findings) -> None:
    python = ".".join(map(str, sys.version_info[:3]))
    level, remedy = ("ok", "") if python in PYTHON else ("error", f"use Python {PYTHON}")
    findings.add("environment", level, f"Python {python}", remedy)
    for package, wanted in REQUIRED.items():
        version = version_of(package)
        if version is not None and SpecifierSet(wanted).contains(version, prereleases=True):
            findings.add("environment", "ok", f"{package} {version}")
        else:
            text = f"{package} is missing" if version is None else f"{package} {version} is not {wanted}"
            findings.add("environment", "error", text, f"pip install '{package}{wanted}'")
    engines = ", ".join(f"{engine} {version}" for engine in ENGINES if (version := version_of(engine)))
    if engines:
        findings.add("environment", "ok", engines)
    else:
        text = "neither vllm nor sglang is installed: rollouts on GPUs need one of them"
        remedy = "pip install 'verl[vllm]' (or 'verl[sglang]'); on a CPU +platform=cpu needs none"
        findings.add("environment", "note" if asks_for_cpu() else "warning", text, remedy)
    optional = {"flash-attn": "packed rows (use_remove_padding=true) need it", "wandb": "trainer.logger wandb needs it"}
    for package, why in optional.items():
        version = version_of(package)
        text = f"{package} {version}" if version else f"{package} is not installed; {why}"
        findings.add("environment", "ok" if version else "note", text)


def _plugin(findings: Findings) -> None:
    """Whether verl finds the entry point; what it registers is asked in `doctor.configuration`."""
    if not importlib.metadata.entry_points(group="verl.plugins", name="gradalign"):
        text = "no entry point gradalign in verl.plugins: verl will not load it"
        findings.add("plugin", "error", text, "pip install -e .")
    asked = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if asked != "auto" and "gradalign" not in [name.strip() for name in asked.split(",")]:
        text = f"VERL_USE_EXTERNAL_PLUGINS={asked} keeps verl from loading the plugin"
        findings.add("plugin", "error", text, "unset it, or set it to gradalign")


def _hardware(findings: Findings) -> Machine:
    num_gpus, gpu_gb, host_gb = 0, 0.0, psutil.virtual_memory().available / 1e9
    if version_of("torch") is not None:
        import torch

        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        findings.add("hardware", "note", f"torch is built for: {build}")
        if torch.cuda.is_available():
            free_and_total = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]
            num_gpus, gpu_gb = len(free_and_total), min(total for _, total in free_and_total) / 1e9
            name = torch.cuda.get_device_name(0)
            version = driver_version()
            driver = f", driver {version}" if version else ""
            findings.add("hardware", "ok", f"{num_gpus} x {name}, {gpu_gb:.0f} GB{driver}")
            for index, (free, total) in enumerate(free_and_total):
                if free < FREE_SHARE * total:
                    text = f"GPU {index}: {free / 1e9:.0f} of {total / 1e9:.0f} GB are free"
                    findings.add("hardware", "warning", text, "end what else runs there (nvidia-smi lists it)")
    if num_gpus == 0 and asks_for_cpu():
        findings.add("hardware", "note", "no GPU is seen here, and VERL_PLATFORM=cpu asks for none")
    elif num_gpus == 0:
        remedy = "run this where training runs, or set VERL_PLATFORM=cpu and +platform=cpu"
        findings.add("hardware", "warning", "no GPU is seen here", remedy)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings.add("hardware", "note", f"{num_cores} cores, {host_gb:.0f} GB of memory available")
    return Machine(num_gpus, gpu_gb, host_gb)


def _limits(findings: Findings) -> None:
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        text = f"{free / 1e9:.1f} GB free in /dev/shm"
        if free < MIN_SHARED_BYTES:
            remedy = "start the container with --shm-size=16g or more"
            findings.add("hardware", "warning", f"{text}: Ray's objects then go through the disk", remedy)
        else:
            findings.add("hardware", "ok", text)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        findings.add("hardware", "warning", f"only {soft} files may be open at once; Ray needs more", "ulimit -n 65536")
    else:
        findings.add("hardware", "ok", f"{soft if soft >= 0 else 'unlimited'} files may be open at once")


def examine_folders(findings: Findings, ray_folder: str | None = None) -> None:
    """Whether Ray's sockets fit into a path, and the caches that data and models go through can be written.

    `ray_folder`: what the configuration gives Ray as _temp_dir.
    """
    name, folder = _ray_folder(ray_folder)
    longest = len(os.fsencode(str(Path(folder).absolute()))) + len(RAY_SOCKET)
    if longest > MAX_SOCKET_PATH:
        most = MAX_SOCKET_PATH - len(RAY_SOCKET)
        text = f"{name} is too long: Ray cannot start, as paths of sockets end at {MAX_SOCKET_PATH} bytes ({longest})"
        findings.add("hardware", "warning", text, f"set RAY_TMPDIR to a path of {most - len('/ray')} bytes or less")
    if version_of("datasets") is not None:
        import datasets

        where = Path(datasets.config.HF_DATASETS_CACHE)
        _writable(f"the cache of data sets ({where})", where, "set HF_HOME to a folder that can be written", findings)
    _writable(f"{name}", Path(folder), "set RAY_TMPDIR to a folder that can be written", findings)


def _ray_folder(ray_folder: str | None) -> tuple[str, str]:
    """Return what Ray writes its sockets and logs below, and where it has it from."""
    if ray_folder:
        return f"ray_kwargs.ray_init._temp_dir={ray_folder}", ray_folder
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if os.environ.get(variable):
            return f"{variable}={os.environ[variable]}", os.path.join(os.environ[variable], "ray")
    return "/tmp", "/tmp/ray"


def _writable(what: str, path: Path, remedy: str, findings: Findings) -> None:
    """Add a warning if nothing can be written there. Asked by writing: permissions know no read-only mounts."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        free_gb = shutil.disk_usage(there).free / 1e9
    except OSError as error:
        findings.add("folders", "warning", f"{what}: {there} cannot be written ({error.strerror})", remedy)
        return
    if free_gb < MIN_FREE_GB:
        findings.add("folders", "warning", f"{what}: {free_gb:.1f} GB are free at {there}", remedy)


def driver_version() -> str | None:
    """Return the driver's version as the vendor's tool tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None
