# SPDX-License-Identifier: Apache-2.0
"""What scoring costs, measured against the update that it precedes: on the same rows, side by side, in one run.

    python -m tests.benchmarks.score_vs_update                               two CPU cores, verl's FSDP2 actor
    python -m tests.benchmarks.score_vs_update --engine plain --device cuda --sweeps gpu

Each repeat times the update and every estimator once, in turn; a ratio is taken within its repeat, and its median,
least and largest are printed, one JSON line per case and method. `backward` is the baseline that people have today:
one problem at a time on all ranks. Peak memory and collectives come from a pass that is not timed. A plot of the
ratios is written beside the lines (--out).
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cases import SWEEPS, X_AXES, Case
from tests.benchmarks.counting import count_collectives, peak_bytes
from tests.benchmarks.ranks import run_on_ranks
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.bench.timing import side_by_side
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.estimators import ESTIMATORS

if not torch.cuda.is_available():
    # Before verl is imported, here and in the ranks that this program spawns: it has no platform otherwise.
    os.environ.setdefault("VERL_PLATFORM", "cpu")

BASELINE = "backward"


def run_case(case: Case, root: Path, engine: str, device: str, repeats: int) -> list[dict[str, Any]]:
    """Return one record per method. Collective: every rank runs it."""
    bench: Any
    if engine == "verl":
        from tests.benchmarks.on_verl import VerlBench

        bench = VerlBench(case, root, device)
    else:
        bench = PlainBench(case, torch.device(device))
    methods: dict[str, Callable[[], Any]] = {"update": bench.update}
    for name in ESTIMATORS:
        methods[name] = partial(bench.score, name)
    methods["ghost, sums only"] = partial(bench.score, "ghost", ProbeConfig(response_derivatives=False))
    timings = side_by_side(methods, repeats, torch.device(device))
    records = []
    num_tokens = case.num_problems * case.rows_per_problem * case.tokens_per_row
    for name, method in methods.items():
        timing = timings[name]
        ratios, speedups = timing.ratios(timings["update"]), timings[BASELINE].ratios(timing)
        median = timing.median
        records.append(
            {
                **asdict(case),
                "engine": engine,
                "device": device,
                "num_parameters": bench.num_parameters,
                "method": name,
                "seconds": round(median, 4),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
                "faster_than_baseline": round(statistics.median(speedups), 2),
                "tokens_per_second": round(num_tokens / median),
                "peak_bytes": peak_bytes(method, device),
                "collectives": count_collectives(method),
            }
        )
    return records


def records_of(case: Case, root: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return run_case(case, root, arguments.engine, arguments.device, arguments.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=["verl", "plain"], default="verl")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=[*X_AXES, "base"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, shared by the ranks")
    parser.add_argument("--out", default="outputs/benchmarks")
    arguments = parser.parse_args()
    results = Path(arguments.out) / "score_vs_update.jsonl"
    run_on_ranks(arguments, records_of, results)
    from tests.benchmarks.plot import plot_ratios

    plot_ratios(results, results.with_suffix(".png"))


if __name__ == "__main__":
    main()
