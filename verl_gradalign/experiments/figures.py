# SPDX-License-Identifier: Apache-2.0
"""Figures of a comparison: accuracy against updates, generated tokens and seconds, and the watched share over time.

draw_figures(collect(runs), "outputs/unreliable_mini", watched="corrupted")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["curve", "draw_figures"]

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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = pyplot.get_cmap("tab10")
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        grid, mean, low, high = curve([row for row in rows if row["method"] == method], x, y)
        if len(grid):
            axes.plot(grid, mean, color=colours(number % 10), label=method, linewidth=1.6)
            axes.fill_between(grid, low, high, color=colours(number % 10), alpha=0.12, linewidth=0)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
