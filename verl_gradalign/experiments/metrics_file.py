# SPDX-License-Identifier: Apache-2.0
"""What runs were trained on and what came of it, read from their files.

row = summarise_run("outputs/quickstart/cosine", pool="outputs/quickstart/data/pool.parquet")
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from verl_gradalign.log.selection_log import read_selection_log


@dataclass(frozen=True)
class RunSummary:
    """One line of the comparison. Shares and accuracies are between 0 and 1; None: not measured."""

    num_steps: int
    accuracy_before: float | None
    accuracy_after: float | None
    corrupted_pool: float
    """Of the candidates."""
    corrupted_trained: float
    """Of the groups trained on."""
    step_s: float
    """Median seconds of a step, without the first."""
    selection_share: float
    """Median share of a step that selection takes."""


def read_metrics(path: str | Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, metrics) of every complete line that verl's file logger has written so far."""
    for line in Path(path).read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            return  # the last line of a running or killed run may be cut
        yield entry["step"], entry["data"]


def metrics_by_step(path: str | Path) -> dict[int, dict[str, float]]:
    """Return what was written of each step, of a step written twice the later numbers."""
    steps = dict[int, dict[str, float]]()
    for step, metrics in read_metrics(path):
        steps.setdefault(step, {}).update(metrics)
    return steps


def accuracies(metrics: dict[str, float]) -> dict[str, float]:
    """Return verl's `val-core/<data source>/acc/mean@n` by data source; empty if the step did not validate."""
    names = [name for name in metrics if name.startswith("val-core/") and "/acc/mean@" in name]
    return {name.split("/acc/")[0].removeprefix("val-core/"): metrics[name] for name in names}


def held_out_accuracy(metrics: dict[str, float]) -> float | None:
    """Return the mean accuracy over data sources; None if not validated."""
    values = list(accuracies(metrics).values())
    return float(np.mean(values)) if values else None


def summarise_run(run_dir: str | Path, pool: str | Path) -> RunSummary:
    """Return the summary of a finished run.

    `pool` is the one train file, whose `extra_info.corrupted` marks coin-flip rewards.
    Raises: FileNotFoundError if the run wrote no metrics or no selection log.
    """
    steps = metrics_by_step(Path(run_dir) / "metrics.jsonl")
    tested = [accuracy for metrics in steps.values() if (accuracy := held_out_accuracy(metrics)) is not None]
    trained = [metrics for metrics in steps.values() if "timing_s/step" in metrics]
    log = read_selection_log(Path(run_dir) / "gradalign")
    corrupted = np.array([info["corrupted"] for info in pq.read_table(pool).column("extra_info").to_pylist()])
    of_row = corrupted[log.column("problem_id").to_numpy()]
    kept = log.column("kept").to_numpy(zero_copy_only=False)
    timed = trained[1:] or trained
    return RunSummary(
        num_steps=len(trained),
        accuracy_before=tested[0] if tested else None,
        accuracy_after=tested[-1] if tested else None,
        corrupted_pool=float(of_row.mean()),
        corrupted_trained=float(of_row[kept].mean()),
        step_s=float(np.median([metrics["timing_s/step"] for metrics in timed])),
        selection_share=float(np.median([metrics["gradalign/seconds/share_of_step"] for metrics in timed])),
    )
