# SPDX-License-Identifier: Apache-2.0
"""Seconds, memory and size of a report on a log of ten million rows.

    python -m tests.benchmarks.report_of_10_million --folder /tmp/ten_million

The log is made once and used again if the folder has it: 20,000 steps of 500 candidates each, of a pool of 300,000
problems from five sources, with one further column, 60 metrics per step and 16 sampled problems per step. The report is
made by a process of its own, whose peak resident memory is the system's own account of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.report_logs import LogPlan, write_log

PLAN = LogPlan(
    num_steps=20_000,
    num_candidates=500,
    num_problems=300_000,
    num_samples=16,
    steps_per_part=100,
    num_other_metrics=34,
    prompt="Problem {id}. " + "A train leaves the station at noon and another one follows it an hour later. " * 8,
    response="Let us see. " + "The first train is ahead by the distance it makes in an hour. " * 10 + "So {sum}.",
)
LIMITS = {"seconds": 60.0, "peak_resident_gb": 2.0, "report_mb": 5.0}


def measure(folder: Path, output: Path) -> dict[str, float]:
    """Return seconds, peak resident memory (1e9 bytes) and size (1e6 bytes) of one report.

    On a machine that others use too, seconds depend on the load, seconds of the CPU nearly do not: both are told.
    """
    command = [sys.executable, "-m", "verl_gradalign.cli", "report", str(folder), "--output", str(output)]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the report failed with exit code {process.returncode}")
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "peak_resident_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "report_mb": round(output.stat().st_size / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the log; made if it is not there")
    parser.add_argument("--steps", type=int, default=PLAN.num_steps)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    log = arguments.folder / "gradalign"
    if not log.exists():
        started = time.perf_counter()
        write_log(log, LogPlan(**{**vars(PLAN), "num_steps": arguments.steps}))
        print(f"made the log in {time.perf_counter() - started:.0f} s", flush=True)
    size = sum(path.stat().st_size for path in log.iterdir())
    print(json.dumps({"rows": arguments.steps * PLAN.num_candidates, "log_mb": round(size / 1e6)}), flush=True)
    for _ in range(arguments.repeats):
        result = measure(arguments.folder, arguments.folder / "report.html")
        is_within = all(result[name] < limit for name, limit in LIMITS.items())
        print(json.dumps({**result, "within_limits": is_within}), flush=True)


if __name__ == "__main__":
    main()
