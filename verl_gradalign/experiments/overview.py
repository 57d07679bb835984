# SPDX-License-Identifier: Apache-2.0
"""Several tuned comparisons on one page: overview.md and overview.png.

    python -m verl_gradalign.experiments.overview outputs/rare_mini outputs/useless_mini --output outputs

Each folder is what `verl-gradalign compare REGIME --tune` has left: comparison.json and curves.csv.
"""

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from verl_gradalign.experiments.budget import Budget
from verl_gradalign.experiments.curve_files import FRESH, draw_panel
from verl_gradalign.experiments.learning_curves import (
    AXES,
    BySeed,
    LearningCurve,
    accuracy_at,
    area_gain,
    by_method,
    gain,
)
from verl_gradalign.experiments.plan import RunPlan
from verl_gradalign.experiments.tuned_report import BASELINE, ORACLE, threshold
from verl_gradalign.markdown import markdown_table
from verl_gradalign.types import TOKENS, UNITS

NUM_COLUMNS = 3
DRAWN = (BASELINE, "trusted_mixed", "forecast", "forecast_shuffled", ORACLE)
"""Methods of the figure; the tables have all."""


@dataclass(frozen=True)
class Finished:
    """A comparison, as its folder tells it."""

    regime: str
    budget: Budget
    methods: dict[str, BySeed]
    to_reach: float


def read_comparison(folder: Path) -> Finished:
    """Return what the runs of fresh seeds came to.

    Raises: ValueError if the folder is not of a tuned comparison with these two methods.
    """
    paths = folder / "comparison.json", folder / "curves.csv"
    if not all(path.exists() for path in paths):
        raise ValueError(f"{folder}: no comparison.json or curves.csv. Remedy: name folders of `compare --tune`")
    settings = json.loads(paths[0].read_text(encoding="utf-8"))
    unit = next((unit for unit in UNITS if f"budget_{unit}" in settings), None)
    if unit is None:
        raise ValueError(f"{paths[0]}: has no budget. Remedy: name folders of `compare --tune`")
    with paths[1].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "seeds" not in rows[0]:
        raise ValueError(f"{paths[1]}: is of an earlier version. Remedy: give the comparison's command again")
    runs: dict[RunPlan, list[list[float]]] = {}
    for row in (row for row in rows if row["seeds"] == FRESH):
        run = RunPlan(row["regime"], row["method"], int(row["seed"]), folder, float(row["learning_rate"]))
        runs.setdefault(run, []).append([float(row[name]) for name in (*AXES, "accuracy", "audit")])
    curves = []
    for run, tests in runs.items():
        *spent, accuracy, audit = np.array(tests).T
        curves.append(LearningCurve(run, dict(zip(AXES, spent, strict=True)), accuracy, audit, np.nan))
    methods, budget = by_method(curves), Budget(settings[f"budget_{unit}"], unit)
    if missing := {BASELINE, ORACLE} - methods.keys():
        raise ValueError(f"{folder}: {', '.join(sorted(missing))} was not run. Remedy: run it with the same command")
    return Finished(settings["regime"], budget, methods, settings["threshold"] or threshold(methods, budget))


def regimes_table(comparisons: Sequence[Finished]) -> str:
    """Return a row per regime: where random choice and a perfect one end, and what the perfect one gains."""
    header = [
        "regime",
        "untrained",
        f"{BASELINE}, end",
        f"{ORACLE}, end",
        "accuracy to reach",
        f"{ORACLE}'s gain in tokens",
    ]
    rows = []
    for c in comparisons:
        ends = [_end(c, c.methods[method]) for method in (BASELINE, ORACLE)]
        begun = float(np.mean([curve.accuracy[0] for curve in c.methods[BASELINE].values()]))
        accuracies = [begun, *ends, c.to_reach]
        rows.append([c.regime, *map(_shown, accuracies), _times(c, ORACLE, is_inverse=True)])
    return markdown_table(header, rows)


def areas_table(comparisons: Sequence[Finished]) -> str:
    """Return a row per method: the area under its curve above random's, paired by seed, with its 95% interval."""

    def cell(c: Finished, method: str) -> str:
        if method == BASELINE or method not in c.methods:
            return "" if method == BASELINE else "-"
        mean, half_width = area_gain(c.methods[method], c.methods[BASELINE], c.budget)
        text = f"{100 * mean:+.1f} ± {100 * half_width:.1f}"
        return f"**{text}**" if mean > half_width else text

    return _by_method(comparisons, cell)


def ends_table(comparisons: Sequence[Finished]) -> str:
    """Return a row per method with its accuracy when the budget is spent."""
    return _by_method(comparisons, lambda c, m: _shown(_end(c, c.methods[m])) if m in c.methods else "-")


def tokens_table(comparisons: Sequence[Finished]) -> str:
    """Return a row per method: tokens to the accuracy, over those of random choice; medians over seeds."""
    return _by_method(comparisons, lambda c, m: "1" if m == BASELINE else _times(c, m, is_inverse=False))


def _by_method(comparisons: Sequence[Finished], cell: Callable[[Finished, str], str]) -> str:
    methods = dict.fromkeys(method for c in comparisons for method in c.methods)
    rows = [[f"`{method}`", *(cell(c, method) for c in comparisons)] for method in methods]
    return markdown_table(["method", *(c.regime for c in comparisons)], rows, is_right=True)


def _times(c: Finished, method: str, is_inverse: bool) -> str:
    if method not in c.methods:
        return "-"
    times, is_more = gain(c.methods[method], c.methods[BASELINE], c.to_reach, c.budget)
    if np.isnan(times):
        return "never"
    if is_inverse:
        return f"{'> ' * is_more}{times:.1f}"
    return f"{'< ' * is_more}{1 / times:.2f}"


def _end(c: Finished, of_seed: BySeed) -> float:
    return float(np.mean([accuracy_at(curve, c.budget.unit, c.budget.amount) for curve in of_seed.values()]))


def _shown(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}"


def draw(comparisons: Sequence[Finished], path: Path) -> None:
    """Draw a panel per regime: accuracy over generated tokens, means over seeds and every seed thinly."""
    num_columns = min(NUM_COLUMNS, len(comparisons))
    num_rows = -(-len(comparisons) // num_columns)
    figure = Figure(figsize=(1.5 + 4 * num_columns, 0.5 + 3.2 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False).flat
    for c, panel in zip(comparisons, panels, strict=False):
        draw_panel(panel, {method: c.methods[method] for method in DRAWN if method in c.methods}, TOKENS)
        panel.axhline(c.to_reach, color="gray", linewidth=0.8, linestyle=":")
        panel.set(title=c.regime, xlabel="generated tokens, all counted", ylabel="accuracy")
    for panel in list(panels):
        panel.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def write_overview(folders: Sequence[Path], output: Path) -> None:
    """Write overview.md and overview.png of these comparisons into the folder."""
    comparisons = [read_comparison(folder) for folder in folders]
    output.mkdir(parents=True, exist_ok=True)
    tables = {
        "What a perfect choice gains (accuracies in per cent):": regimes_table(comparisons),
        "Area under the curve above random's, in points of accuracy, with its 95% interval:": areas_table(comparisons),
        "Accuracy when all is spent, in per cent:": ends_table(comparisons),
        "Tokens to the accuracy to reach, over random's:": tokens_table(comparisons),
    }
    text = "\n\n".join(f"{title}\n\n{table}" for title, table in tables.items())
    (output / "overview.md").write_text(text + "\n", encoding="utf-8")
    draw(comparisons, output / "overview.png")


def main() -> None:
    """Read the command line and write the overview."""
    parser = argparse.ArgumentParser(prog="python -m verl_gradalign.experiments.overview", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="of tuned comparisons")
    parser.add_argument("--output", required=True, type=Path, help="folder for overview.md and overview.png")
    arguments = parser.parse_args()
    write_overview(arguments.folders, arguments.output)


if __name__ == "__main__":
    main()
