# SPDX-License-Identifier: Apache-2.0
"""Curves of a tuned comparison as a table of all tests, and as a figure over all that runs spend.

write_curves(curves, folder / "curves.csv")
draw_curves(by_method(curves), folder / "curves.png")
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from verl_gradalign.experiments.learning_curves import AXES, BySeed, LearningCurve, accuracy_at

NUM_POINTS = 100


def write_curves(curves: Sequence[LearningCurve], path: Path) -> None:
    """Write a row per run and test."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["regime", "method", "learning_rate", "seed", *AXES, "accuracy", "audit"])
        for curve in curves:
            run = curve.run
            for test in zip(*(curve.spent[axis] for axis in AXES), curve.accuracy, curve.audit, strict=True):
                writer.writerow([run.regime, run.method, run.learning_rate, run.seed, *test])


def draw_curves(methods: Mapping[str, BySeed], path: Path) -> None:
    """Draw each method's mean over its seeds, and every seed thinly, over each of AXES."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).flat
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        for number, (method, of_seed) in enumerate(methods.items()):
            # As far as all seeds go.
            grid = np.linspace(0, min(curve.spent[axis][-1] for curve in of_seed.values()), NUM_POINTS)
            color, dashes = f"C{number % 10}", "--" if number >= 10 else "-"
            for curve in of_seed.values():
                x, y = curve.spent[axis], curve.accuracy
                panel.plot(x, y, color=color, linewidth=0.5, alpha=0.35, linestyle=dashes)
            mean = np.mean([accuracy_at(curve, axis, grid) for curve in of_seed.values()], axis=0)
            panel.plot(grid, mean, color=color, linewidth=1.8, linestyle=dashes, label=method)
        panel.set(xlabel=label, ylabel="accuracy on the trusted families")
        panel.grid(alpha=0.3)
    if methods:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize="small", ncols=5)
    figure.savefig(path, dpi=110)
