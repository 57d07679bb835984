# SPDX-License-Identifier: Apache-2.0
"""Compares runs made by two versions: the same problems kept for the same reasons, the same scores and metrics.

    python -m tests.benchmarks.same_runs OLD NEW      # two folders with runs of the same names below them

Both versions must have been given the same model, data and overrides; float64 sampling
(`actor_rollout_ref.rollout.dtype=float64`) keeps rounding from tipping a response. Prints every number that differs by
more than rounding, and ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from verl_gradalign.experiments.metrics_file import read_metrics
from verl_gradalign.log.selection_log import read_selection_log

# Two processes sum the same float32 gradients in orders of their own, and updates carry the rounding on: raise --rtol
# to what two runs of one version differ by.
RTOL, ATOL = 1e-6, 1e-9
# What depends on the machine, or is rounding itself.
OF_THE_MACHINE = ("seconds", "timing", "perf/", "share_of_step", "canary", "memory", "throughput", "_diff_")


def differs(old: object, new: object, rtol: float) -> bool:
    """Return whether two values differ by more than rounding."""
    if isinstance(old, float) and isinstance(new, float):
        return not (math.isclose(old, new, rel_tol=rtol, abs_tol=ATOL) or (math.isnan(old) and math.isnan(new)))
    return old != new


def differences(old: Path, new: Path, rtol: float) -> list[str]:
    """Return a line for every value that differs between two runs."""
    found = []
    rows, others = (read_selection_log(run / "gradalign").to_pylist() for run in (old, new))
    if len(rows) != len(others):
        found.append(f"the selection log has {len(rows)} and {len(others)} rows")
    for row, other in zip(rows, others, strict=False):
        for name in row.keys() | other.keys():
            if differs(row.get(name), other.get(name), rtol):
                where = f"step {row['step']}, problem {row['problem_id']}"
                found.append(f"{where}: {name} {row.get(name)} -> {other.get(name)}")
    lines, theirs = (list(read_metrics(run / "metrics.jsonl")) for run in (old, new))
    for (step, metrics), (other_step, others_metrics) in zip(lines, theirs, strict=False):
        if step != other_step:
            found.append(f"a line of metrics is of step {step} and {other_step}")
        for name in sorted(metrics.keys() | others_metrics.keys()):
            if not any(word in name for word in OF_THE_MACHINE):
                values = metrics.get(name), others_metrics.get(name)
                if differs(*values, rtol):
                    found.append(f"step {step}: {name} {values[0]} -> {values[1]}")
    if len(lines) != len(theirs):
        found.append(f"{len(lines)} and {len(theirs)} lines of metrics")
    print(f"{old.name}: {len(rows)} rows of the log and {len(lines)} lines of metrics compared, {len(found)} differ")
    return found


def main() -> int:
    """Compare every run below the first folder with the one of its name below the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rtol", type=float, default=RTOL, help="relative difference that counts as rounding")
    arguments = parser.parse_args()
    names = sorted(path.parent.name for path in arguments.old.glob("*/metrics.jsonl"))
    if not names:
        parser.error(f"no runs below {arguments.old}")
    found = [line for name in names for line in differences(arguments.old / name, arguments.new / name, arguments.rtol)]
    print("\n".join(found[:100]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
