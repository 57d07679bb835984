# SPDX-License-Identifier: Apache-2.0
"""What the runs of a comparison left behind, as one tidy table and as a summary by method.

table = collect(runs)  # a row per run and step
write_csv(table, "results.csv")
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from verl_gradalign.experiments.metrics_file import accuracies, held_out_accuracy, metrics_by_step
from verl_gradalign.experiments.plan import RunPlan
from verl_gradalign.markdown import markdown_table
from verl_gradalign.toy.regimes import MINIATURES

SHARE = "experiment/share/"
TESTED = "tested"


def collect(runs: Sequence[RunPlan]) -> list[dict[str, Any]]:
    """Return a row per run and step, the untrained policy's test as step 0.

    Columns: regime, method, seed, step; tokens generated and seconds of training so far (validation excluded);
    `accuracy` (mean over the data sources of the test) and `accuracy/<data source>`, empty where a step was not tested;
    `tested`, the accuracy on the sources that the regime watches; `share`, what is watched of the problems trained on;
    `reliability/direction` and `reliability/scores`.
    """
    return [row for run in runs if run.is_done for row in _rows(run)]


def _rows(run: RunPlan) -> Iterable[dict[str, Any]]:
    regime = MINIATURES.get(run.regime)
    seconds = 0.0
    for step, metrics in metrics_by_step(run.folder / "metrics.jsonl").items():
        seconds += metrics.get("timing_s/step", 0.0)
        of_source = accuracies(metrics)
        # A miniature is tested on other kinds of problems too; its trusted set is of those that it is about.
        tested = [a for source, a in of_source.items() if regime is None or family(source) in regime.trusted]
        shares = {family(name): share for name, share in metrics.items() if name.startswith(SHARE)}
        yield {
            **{"regime": run.regime, "method": run.method, "seed": run.seed, "step": step},
            "tokens": metrics.get("experiment/num_tokens", 0.0 if step == 0 else None),
            "seconds": seconds,
            "accuracy": held_out_accuracy(metrics),
            **{f"accuracy/{source}": accuracy for source, accuracy in of_source.items()},
            TESTED: float(np.mean(tested)) if tested else None,
            "share": regime.share(shares) if regime and shares else shares.get("corrupted"),
            **{name: metrics.get(f"gradalign/{name}") for name in ("reliability/direction", "reliability/scores")},
        }


def family(name: str) -> str:
    """Return the last part of a data source's name, or of a metric's."""
    return name.rsplit("/", 1)[-1]


SUMMARY: dict[str, tuple[str, Callable[[list[float]], Any]]] = {
    "accuracy": (TESTED, itemgetter(-1)),  # at the last step, on what the trusted set is of
    "share": ("share", np.mean),  # watched share of what was trained on, mean over the steps
    "first_share": ("share", lambda values: np.mean(values[: max(1, round(len(values) / 4))])),  # of the steps
    "seconds": ("seconds", itemgetter(-1)),
    "tokens": ("tokens", itemgetter(-1)),
    "direction": ("reliability/direction", np.mean),
    "scores": ("reliability/scores", np.mean),
}
"""What is said of a run: the column of the table, and what becomes of its known values."""


@dataclass(frozen=True)
class MethodSummary:
    """A method over its seeds. Every name of SUMMARY has one value per seed, in their order; nan: not measured."""

    method: str
    seeds: tuple[int, ...]
    values: dict[str, np.ndarray]


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[MethodSummary]:
    """Return one summary per method, in order of appearance."""
    summaries = []
    for method in dict.fromkeys(str(row["method"]) for row in rows):
        mine = [row for row in rows if row["method"] == method]
        seeds = tuple(dict.fromkeys(int(row["seed"]) for row in mine))
        values = {}
        for name, (column, reduced) in SUMMARY.items():
            known = [[r[column] for r in mine if r["seed"] == seed and r.get(column) is not None] for seed in seeds]
            values[name] = np.array([float(reduced(of_seed)) if of_seed else np.nan for of_seed in known])
        summaries.append(MethodSummary(method, seeds, values))
    return summaries


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the table; columns that only some rows have are empty in the others."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(summaries: Sequence[MethodSummary], path: str | Path, watched: str) -> None:
    """Write the summary as a table: means over the seeds with the lowest and highest in brackets."""
    header = ["method", "accuracy", f"{watched} share", "in the first quarter", "reliability v / scores"]
    rows = [
        [
            s.method,
            *(_spread(s.values[name]) for name in ("accuracy", "share", "first_share")),
            f"{_mean(s.values['direction'])} / {_mean(s.values['scores'])}",
            f"{np.mean(s.values['tokens']) / 1000:.0f}",
            f"{np.mean(s.values['seconds']):.0f}",
        ]
        for s in summaries
    ]
    table = markdown_table([*header, "thousand tokens", "seconds"], rows)
    seeds = ", ".join(map(str, sorted({seed for s in summaries for seed in s.seeds})))
    text = f"{table}\n\nSeeds: {seeds}. Mean, and lowest to highest over seeds.\n"
    Path(path).write_text(text, encoding="utf-8")


def _spread(values: np.ndarray) -> str:
    if np.isnan(values).all():
        return "-"
    return f"{np.nanmean(values):.1%} ({np.nanmin(values):.1%} to {np.nanmax(values):.1%})"


def _mean(values: np.ndarray) -> str:
    return "-" if np.isnan(values).all() else f"{np.nanmean(values):.2f}"


AXES = {"step": "updates", "tokens": "generated tokens", "seconds": "seconds of training"}
NUM_POINTS = 200


def curve(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (x, mean, lowest, highest) over the seeds of one method's rows.

    Seeds need not share their x values: each is interpolated between its own points, over the range that all cover.
    """
    points = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [(row[x], row[y]) for row in rows if row["seed"] == seed and None not in (row.get(x), row.get(y))]
        if mine:
            points.append(np.array(sorted(mine), dtype=float).T)
    if not points:
        return (np.array([]),) * 4
    low, high = max(p[0].min() for p in points), min(p[0].max() for p in points)
    shared = points[0][0] if all(np.array_equal(p[0], points[0][0]) for p in points) else None
    grid = np.linspace(low, high, NUM_POINTS) if shared is None else shared
    values = np.array([np.interp(grid, *p) for p in points])
    return grid, values.mean(0), values.min(0), values.max(0)


def draw_figures(rows: Sequence[Mapping[str, Any]], folder: str | Path, watched: str) -> list[Path]:
    """Write the figures as PNG files and return their paths. Bands run from the lowest to the highest seed."""
    plots = [(f"accuracy_by_{x}.png", x, "tested", label, "accuracy") for x, label in AXES.items()]
    plots.append(("share_by_step.png", "step", "share", AXES["step"], f"{watched} share of what was trained on"))
    return [_draw(rows, Path(folder) / name, x, y, labels) for name, x, y, *labels in plots]


def _draw(rows: Sequence[Mapping[str, Any]], path: Path, x: str, y: str, labels: Sequence[str]) -> Path:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        grid, mean, low, high = curve([row for row in rows if row["method"] == method], x, y)
        if len(grid):
            axes.plot(grid, mean, color=f"C{number % 10}", label=method, linewidth=1.6)
            axes.fill_between(grid, low, high, color=f"C{number % 10}", alpha=0.12, linewidth=0)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)
    return path
