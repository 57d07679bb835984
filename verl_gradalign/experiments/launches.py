# SPDX-License-Identifier: Apache-2.0
"""Runs as processes: what they are started with, series of them side by side, and what is shown meanwhile.

    run_series(runs, specification_of, output, num_series=1, python=sys.executable, progress=progress)

Runs that are done are left out, so the same call goes on where it was interrupted.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from verl_gradalign.experiments.metrics_file import read_metrics
from verl_gradalign.experiments.plan import DONE, RunPlan

POLL_S = 1.0
Launch = tuple[subprocess.Popen[bytes], Path]
"""A process and the file that its output goes to."""


def cpu_environment() -> dict[str, str]:
    """Return what the environment of verl on the CPU must hold.

    One thread per process: more gain little with tiny models, lose much on a busy machine, and round differently.
    """
    return {
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        # TransferQueue asks for 8 threads per message, and says in the log for every message that there are fewer.
        "TQ_NUM_THREADS": "1",
    }


def run_series(
    runs: Sequence[RunPlan],
    specification_of: Callable[[RunPlan], Mapping[str, Any]],
    output: Path,
    num_series: int,
    python: str,
    progress: Progress,
    on_done: Callable[[], object] | None = None,
) -> None:
    """Run what is not done yet in at most `num_series` series of processes (`verl_gradalign.cpu.series`).

    `specification_of` gives a run's overrides, and whatever else a series is told of it. `on_done` is called when
    another run has ended.
    Raises: RuntimeError with the end of the output if a run fails; what is done stays done.
    """
    todo = [run for run in runs if not run.is_done]
    num_series = min(num_series, len(todo))
    launches = []
    for number in range(num_series):
        specifications = [
            {"folder": str(run.folder), "done": str(run.folder / DONE), "seed": run.seed, **specification_of(run)}
            for run in todo[number::num_series]
        ]
        path, log = output / f"series-{number}.json", output / f"series-{number}.log"
        path.write_text(json.dumps(specifications), encoding="utf-8")
        launches.append(start([python, "-m", "verl_gradalign.cpu.series", str(path)], log, output, cpu_environment()))
    watch(launches, runs, progress, on_done)


def start(command: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]) -> Launch:
    """Start a process in a folder, its output going to the log."""
    whole = {**os.environ, **environment}
    with log.open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=whole), log


def watch(
    launches: Sequence[Launch],
    runs: Sequence[RunPlan],
    progress: Progress,
    on_done: Callable[[], object] | None = None,
) -> None:
    """Wait for the processes, showing every run that has begun; end the others when one fails.

    Raises: RuntimeError with the end of the output of the one that failed.
    """
    processes = [process for process, _ in launches]
    total = progress.add_task("runs", total=len(runs))
    num_done = sum(run.is_done for run in runs)
    bars = [progress.add_task(f"  {run.title}", total=None, visible=False) for run in runs]
    try:
        while any(process.poll() is None for process in processes):
            time.sleep(POLL_S)
            num_before, num_done = num_done, sum(run.is_done for run in runs)
            progress.update(total, completed=num_done)
            if num_done > num_before and on_done:
                on_done()
            for run, bar in zip(runs, bars, strict=True):
                path = run.folder / "metrics.jsonl"
                is_running = path.exists() and not run.is_done
                num_steps = sum("timing_s/step" in m for _, m in read_metrics(path)) if is_running else 0
                progress.update(bar, completed=num_steps, visible=is_running)
            if any(process.poll() for process in processes):
                break
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                process.wait()
    # Those that were ended here have a negative code, and come last.
    for process, log in sorted(launches, key=lambda launch: -launch[0].returncode):
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"verl failed (exit {process.returncode}); its whole output is in {log}\n{tail}")
