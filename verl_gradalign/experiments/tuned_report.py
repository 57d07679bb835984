# SPDX-License-Identifier: Apache-2.0
"""The tables and the figure of a tuned comparison, from the curves of its runs.

write_report(fresh, tried, MINIATURES["imbalance_mini"], 10_240, num_tuning_responses=10_240, folder=output)
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from verl_gradalign.experiments.learning_curves import LearningCurve, accuracy_at, area, paired, responses_to
from verl_gradalign.markdown import markdown_table
from verl_gradalign.toy.regimes import Miniature

BASELINE = "random"
QUARTERS = np.array([0.25, 0.5, 0.75, 1.0])
THRESHOLD_AT = 0.75
"""Share of the budget at which the baseline's accuracy is what the others are to reach."""
NUM_POINTS = 100
BySeed = dict[int, LearningCurve]


def write_report(
    fresh: Sequence[LearningCurve],
    tried: Sequence[LearningCurve],
    miniature: Miniature,
    num_responses: int,
    num_tuning_responses: int,
    folder: Path,
) -> None:
    """Write summary.md and curves.png of the fresh seeds, tuning.md of what was tried, and curves.csv of both."""
    methods = by_method(fresh)
    parts = [
        summary_table(methods, miniature.label, num_responses),
        _reading(methods, num_responses),
        "Every seed, area under the curve:",
        seeds_table(methods, num_responses),
    ]
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / "tuning.md").write_text(tuning_table(tried, num_tuning_responses) + "\n", encoding="utf-8")
    write_curves([*fresh, *tried], folder / "curves.csv")
    draw_curves(methods, num_responses, folder / "curves.png")


def by_method(curves: Sequence[LearningCurve]) -> dict[str, BySeed]:
    """Return the curves by method, in order of appearance, and by seed."""
    methods: dict[str, BySeed] = {}
    for curve in curves:
        methods.setdefault(curve.run.method, {})[curve.run.seed] = curve
    return methods


def threshold(methods: Mapping[str, BySeed], num_responses: int) -> float:
    """Return the baseline's accuracy at three quarters of the budget, mean over its seeds; nan without a baseline."""
    curves = methods.get(BASELINE, {}).values()
    return float(np.mean([accuracy_at(c, THRESHOLD_AT * num_responses) for c in curves])) if curves else np.nan


def summary_table(methods: Mapping[str, BySeed], watched: str, num_responses: int) -> str:
    """Return a row per method: means over its seeds, and what it gains on the baseline at the same seeds."""
    to_reach = threshold(methods, num_responses)
    header = ["method", "learning rate", "accuracy after 1/4, 1/2, 3/4, all", "area", f"area - {BASELINE}'s"]
    header += [f"responses to {to_reach:.3f}", "audit set", f"{watched} share", "updates", "seconds"]
    rows = []
    for method, of_seed in methods.items():
        curves = list(of_seed.values())
        quarters = np.mean([accuracy_at(c, QUARTERS * num_responses) for c in curves], axis=0)
        reached = [responses_to(c, to_reach) for c in curves]
        rows.append(
            [
                method,
                f"{curves[0].run.learning_rate:g}",
                " ".join(f"{accuracy:.3f}" for accuracy in quarters),
                f"{np.mean([area(c, num_responses) for c in curves]):.3f}",
                _gain(of_seed, methods.get(BASELINE, {}), num_responses) if method != BASELINE else "",
                f"{_median(reached, num_responses)} ({sum(map(np.isfinite, reached))} of {len(reached)})",
                f"{np.mean([c.audit[-1] for c in curves]):.3f}",
                f"{np.mean([c.share for c in curves]):.2f}",
                f"{np.mean([c.num_steps for c in curves]):.0f}",
                f"{np.mean([c.seconds for c in curves]):.0f}",
            ]
        )
    return markdown_table(header, rows)


def _gain(of_seed: BySeed, baseline: BySeed, num_responses: int) -> str:
    """Return the paired difference of areas with its interval, bold where the interval lies above zero."""
    seeds = sorted(of_seed.keys() & baseline.keys())
    if not seeds:
        return "-"
    ours, theirs = ([area(curves[seed], num_responses) for seed in seeds] for curves in (of_seed, baseline))
    mean, half_width = paired(ours, theirs)
    text = f"{mean:+.3f}" if np.isnan(half_width) else f"{mean:+.3f} ± {half_width:.3f}"
    return f"**{text}**" if mean > half_width else text


def _median(responses: Sequence[float], num_responses: int) -> str:
    """Return the median over seeds; a seed that never gets there counts as more than all."""
    # Of an even number of seeds the later of the two in the middle: half way to infinity is nowhere.
    median = sorted(responses)[len(responses) // 2]
    return f"{median:,.0f}" if np.isfinite(median) else f"> {num_responses:,}"


def _reading(methods: Mapping[str, BySeed], num_responses: int) -> str:
    seeds = sorted({seed for of_seed in methods.values() for seed in of_seed})
    return (
        f"{num_responses:,} generated responses a run, trusted ones and candidates included. Seeds: "
        f"{', '.join(map(str, seeds))}, none of which the learning rate was chosen by. Area: mean accuracy over the "
        f"run, on the trusted set's families. The difference to {BASELINE} is paired by seed, with its 95% interval "
        f"(Student's t), bold where that lies above 0. Responses: median over seeds until the accuracy that {BASELINE} "
        "has at three quarters of the budget, and how many seeds reach it. Seconds: of training, without tests."
    )


def seeds_table(methods: Mapping[str, BySeed], num_responses: int) -> str:
    """Return a row per method with the area under every seed's curve."""
    seeds = sorted({seed for of_seed in methods.values() for seed in of_seed})

    def cell(of_seed: BySeed, seed: int) -> str:
        return f"{area(of_seed[seed], num_responses):.3f}" if seed in of_seed else "-"

    rows = [[method, *(cell(of_seed, seed) for seed in seeds)] for method, of_seed in methods.items()]
    return markdown_table(["method", *(f"seed {seed}" for seed in seeds)], rows, is_right=True)


def tuning_table(tried: Sequence[LearningCurve], num_responses: int) -> str:
    """Return a row per method with the area under the curve of every learning rate that was tried."""
    rates = sorted({c.run.learning_rate or 0.0 for c in tried})
    areas = {(c.run.method, c.run.learning_rate): f"{area(c, num_responses):.3f}" for c in tried}
    methods = dict.fromkeys(c.run.method for c in tried)
    rows = [[method, *(areas.get((method, rate), "-") for rate in rates)] for method in methods]
    return markdown_table(["method", *(f"{rate:g}" for rate in rates)], rows, is_right=True)


def write_curves(curves: Sequence[LearningCurve], path: Path) -> None:
    """Write a row per run and test."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["regime", "method", "learning_rate", "seed", "responses", "accuracy", "audit"])
        for curve in curves:
            run = curve.run
            for test in zip(curve.responses, curve.accuracy, curve.audit, strict=True):
                writer.writerow([run.regime, run.method, run.learning_rate, run.seed, *test])


def draw_curves(methods: Mapping[str, BySeed], num_responses: int, path: Path) -> None:
    """Draw each method's mean over its seeds, and every seed thinly."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    grid = np.linspace(0, num_responses, NUM_POINTS)
    for number, (method, of_seed) in enumerate(methods.items()):
        lines = np.array([accuracy_at(curve, grid) for curve in of_seed.values()])
        color, dashes = f"C{number % 10}", "--" if number >= 10 else "-"
        axes.plot(grid, lines.T, color=color, linewidth=0.5, alpha=0.35, linestyle=dashes)
        axes.plot(grid, lines.mean(0), color=color, linewidth=1.8, linestyle=dashes, label=method)
    axes.set(xlabel="generated responses, trusted ones included", ylabel="accuracy on the trusted families")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=110)
