# SPDX-License-Identifier: Apache-2.0
"""Curves of a tuned comparison as a table of all tests, and as a figure over all that runs spend.

write_curves(fresh, tried, folder / "curves.csv")
draw_curves(by_method(curves), folder / "curves.png")
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from verl_gradalign.experiments.learning_curves import AXES, BySeed, LearningCurve, accuracy_at

NUM_POINTS = 100
FRESH, TRIED = "fresh", "tried"


def write_curves(fresh: Sequence[LearningCurve], tried: Sequence[LearningCurve], path: Path) -> None:
    """Write a row per run and test, of the fresh seeds and of what learning rates were tried in."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seeds", "regime", "method", "learning_rate", "seed", *AXES, "accuracy", "audit"])
        for seeds, curve in [*((FRESH, curve) for curve in fresh), *((TRIED, curve) for curve in tried)]:
            run = curve.run
            for test in zip(*(curve.spent[axis] for axis in AXES), curve.accuracy, curve.audit, strict=True):
                writer.writerow([seeds, run.regime, run.method, run.learning_rate, run.seed, *test])


def draw_curves(methods: Mapping[str, BySeed], path: Path) -> None:
    """Draw each method's mean over its seeds, and every seed thinly, over each of AXES."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).flat
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        draw_panel(panel, methods, axis)
        panel.set(xlabel=label, ylabel="accuracy on the wanted families")
    if methods:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize="small", ncols=5)
    figure.savefig(path, dpi=110)


def draw_panel(panel: Axes, methods: Mapping[str, BySeed], axis: str) -> None:
    """Draw each method's mean over its seeds, and every seed thinly, over one of AXES."""
    for number, (method, of_seed) in enumerate(methods.items()):
        # As far as all seeds go.
        grid = np.linspace(0, min(curve.spent[axis][-1] for curve in of_seed.values()), NUM_POINTS)
        color, dashes = f"C{number % 10}", "--" if number >= 10 else "-"
        for curve in of_seed.values():
            panel.plot(curve.spent[axis], curve.accuracy, color=color, linewidth=0.5, alpha=0.35, linestyle=dashes)
        mean = np.mean([accuracy_at(curve, axis, grid) for curve in of_seed.values()], axis=0)
        panel.plot(grid, mean, color=color, linewidth=1.8, linestyle=dashes, label=method)
    panel.grid(alpha=0.3)
