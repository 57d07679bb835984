# SPDX-License-Identifier: Apache-2.0
"""The tables of a tuned comparison, from the curves of its runs.

write_report(fresh, tried, MINIATURES["imbalance_mini"], (Budget(10_240), Budget(10_240)), GivenThreshold(), folder)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl_gradalign.experiments.budget import Budget, shown
from verl_gradalign.experiments.curve_files import draw_curves, write_curves
from verl_gradalign.experiments.learning_curves import (
    AXES,
    UPDATES,
    BySeed,
    LearningCurve,
    accuracy_at,
    area,
    area_gain,
    by_method,
    gain,
    median_spent,
    spent_to,
)
from verl_gradalign.markdown import markdown_table
from verl_gradalign.toy.regimes import Miniature
from verl_gradalign.types import RESPONSES, SECONDS, TOKENS, UNITS

BASELINE, ORACLE = "random", "oracle"
LEAST_GAIN = 1.5
"""Of the oracle's tokens. A regime in which a perfect choice gains less says nothing about others."""
QUARTERS = np.array([0.25, 0.5, 0.75, 1.0])
THRESHOLD_AT = 0.75
"""Share of the budget at which the baseline's accuracy is what the others are to reach."""


@dataclass(frozen=True)
class GivenThreshold:
    """The accuracy that is to be reached. None: none was fixed, it is the baseline's after THRESHOLD_AT."""

    accuracy: float | None = None
    at_first: float | None = None
    """What was fixed when the first run was started."""


def write_report(
    fresh: Sequence[LearningCurve],
    tried: Sequence[LearningCurve],
    miniature: Miniature,
    budgets: tuple[Budget, Budget],
    given: GivenThreshold,
    folder: Path,
) -> None:
    """Write summary.md and curves.png of the fresh seeds, tuning.md of what was tried, and curves.csv of both.

    `budgets`: of a run that a learning rate was tried in, and of one of a fresh seed.
    """
    to_try, budget = budgets
    methods = by_method(fresh)
    to_reach = given.accuracy or threshold(methods, budget)
    parts = [
        summary_table(methods, miniature.label, budget),
        _reading(methods, budget),
        *([] if np.isnan(to_reach) else [f"What it takes to {to_reach:.3f}:", spent_table(methods, to_reach, budget)]),
        " ".join([*threshold_remarks(methods, to_reach, given, budget), *gain_remark(methods, to_reach, budget)]),
        "Every seed, area under the curve:",
        seeds_table(methods, budget),
    ]
    (folder / "summary.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / "tuning.md").write_text(tuning_table(tried, to_try) + "\n", encoding="utf-8")
    write_curves(fresh, tried, folder / "curves.csv")
    draw_curves(methods, folder / "curves.png")


def threshold(methods: Mapping[str, BySeed], budget: Budget) -> float:
    """Return the baseline's accuracy at three quarters of the budget, mean over its seeds; nan without a baseline."""
    curves = methods.get(BASELINE, {}).values()
    at = THRESHOLD_AT * budget.amount
    return float(np.mean([accuracy_at(c, budget.unit, at) for c in curves])) if curves else np.nan


def summary_table(methods: Mapping[str, BySeed], watched: str, budget: Budget) -> str:
    """Return a row per method: means over its seeds, and what it gains on the baseline at the same seeds."""
    header = ["method", "learning rate", "accuracy after 1/4, 1/2, 3/4, all", "area", f"area - {BASELINE}'s"]
    header += ["audit set", f"{watched} share", *(f"all {axis}" for axis in UNITS), UPDATES]
    rows = []
    for method, of_seed in methods.items():
        curves = list(of_seed.values())
        quarters = np.mean([accuracy_at(c, budget.unit, QUARTERS * budget.amount) for c in curves], axis=0)
        rows.append(
            [
                method,
                f"{curves[0].run.learning_rate:g}",
                " ".join(f"{accuracy:.3f}" for accuracy in quarters),
                f"{np.mean([area(c, budget) for c in curves]):.3f}",
                _gain(of_seed, methods.get(BASELINE, {}), budget) if method != BASELINE else "",
                _known(float(np.mean([c.audit[-1] for c in curves])), 3),
                _known(float(np.mean([c.share for c in curves])), 2),
                *(f"{np.mean([c.spent[axis][-1] for c in curves]):,.0f}" for axis in (*UNITS, UPDATES)),
            ]
        )
    return markdown_table(header, rows)


def _known(value: float, num_digits: int) -> str:
    return "-" if np.isnan(value) else f"{value:.{num_digits}f}"


def _gain(of_seed: BySeed, baseline: BySeed, budget: Budget) -> str:
    """Return the paired difference of areas with its interval, bold where the interval lies above zero."""
    mean, half_width = area_gain(of_seed, baseline, budget)
    if np.isnan(mean):
        return "-"
    text = f"{mean:+.3f}" if np.isnan(half_width) else f"{mean:+.3f} ± {half_width:.3f}"
    return f"**{text}**" if mean > half_width else text


def _reading(methods: Mapping[str, BySeed], budget: Budget) -> str:
    seeds = sorted({seed for of_seed in methods.values() for seed in of_seed})
    amount = {
        RESPONSES: f"{budget.amount:,.0f} generated responses a run, trusted ones and candidates included.",
        TOKENS: f"{budget.amount:,.0f} generated tokens a run, those of trusted problems and candidates included.",
        SECONDS: f"{shown(budget.amount)} seconds of training a run, with what trusted problems and candidates take.",
    }[budget.unit]
    return (
        f"{amount} Seeds: "
        f"{', '.join(map(str, seeds))}, none of which the learning rate was chosen by. Area: mean accuracy over these "
        f"{budget.unit}, on the test's problems of the wanted families. The difference to {BASELINE} is paired by "
        "seed, with its 95% interval (Student's t), bold where that lies above 0. All: means of what whole runs "
        "generated, and of the time of their training, without tests."
    )


def spent_table(methods: Mapping[str, BySeed], to_reach: float, budget: Budget) -> str:
    """Return a row per method: how many seeds reach the accuracy, and after what; medians over seeds."""
    rows = []
    for method, of_seed in methods.items():
        curves = list(of_seed.values())
        num_reached = sum(map(np.isfinite, _spent(of_seed, to_reach, budget)))
        cells = [_median(curves, to_reach, axis, budget) for axis in AXES]
        rows.append([method, f"{num_reached} of {len(curves)}", *cells])
    return markdown_table(["method", "seeds that reach it", *AXES], rows, is_right=True)


def _median(curves: Sequence[LearningCurve], to_reach: float, axis: str, budget: Budget) -> str:
    amount, is_more = median_spent(curves, to_reach, axis, budget)
    exact = is_more and axis == budget.unit
    return f"{'> ' * is_more}{shown(amount) if exact else f'{amount:,.0f}'}"


def gain_remark(methods: Mapping[str, BySeed], to_reach: float, budget: Budget) -> list[str]:
    """Return the sentence on what a perfect choice gains, and whether methods can be told apart by so much."""
    if np.isnan(to_reach) or not {BASELINE, ORACLE} <= methods.keys():
        return []
    times, is_more = gain(methods[ORACLE], methods[BASELINE], to_reach, budget)
    if np.isnan(times):
        return [
            f"What a perfect choice gains ({ORACLE}) is not known: it never reaches {to_reach:.3f}, or begins there."
        ]
    said = f"To get there {BASELINE} takes {'more than ' * is_more}{times:.1f} times the tokens of a perfect choice"
    if times >= LEAST_GAIN:
        return [f"{said} ({ORACLE})."]
    return [f"{said} ({ORACLE}): **with less than {LEAST_GAIN} this regime cannot tell ways of choosing apart.**"]


def threshold_remarks(
    methods: Mapping[str, BySeed], to_reach: float, given: GivenThreshold, budget: Budget
) -> list[str]:
    """Return the sentences on the threshold: where it comes from, and who never reaches it or began above it."""
    if np.isnan(to_reach):
        remedy = f"give --threshold, or run {BASELINE} too"
        return [f"There is no accuracy to reach: none was given, and {BASELINE} was not run. Remedy: {remedy}."]
    remarks = [f"{to_reach:.3f} is the accuracy that {BASELINE} has after three quarters of the budget."]
    if given.accuracy is not None:
        remarks = [f"{to_reach:.3f} was fixed before the first run was started."]
        if given.accuracy != given.at_first:
            began = "without one" if given.at_first is None else f"with {given.at_first:g}"
            remarks = [f"**{to_reach:.3f} was given (--threshold) later**: the comparison was begun {began}."]
    remarks.append("Medians over seeds, all that was generated counted, tests left out; >: not within the budget.")
    never = [m for m, of_seed in methods.items() if not any(map(np.isfinite, _spent(of_seed, to_reach, budget)))]
    if len(never) == len(methods):
        remedy = f"a lower --threshold, or a larger {budget.option} in another --output"
        remarks.append(f"**No run reaches {to_reach:.3f} within {budget}.** Remedy: {remedy}.")
    elif never:
        remarks.append(f"No seed reaches it within {budget} with {', '.join(never)}.")
    started = [float(curve.accuracy[0]) for of_seed in methods.values() for curve in of_seed.values()]
    if started and max(started) >= to_reach:
        remarks.append(f"The untrained policy has up to {max(started):.3f}: what a run takes to get there says little.")
    return remarks


def _spent(of_seed: BySeed, to_reach: float, budget: Budget) -> list[float]:
    return [spent_to(curve, to_reach, budget)[budget.unit] for curve in of_seed.values()]


def seeds_table(methods: Mapping[str, BySeed], budget: Budget) -> str:
    """Return a row per method with the area under every seed's curve."""
    seeds = sorted({seed for of_seed in methods.values() for seed in of_seed})

    def cell(of_seed: BySeed, seed: int) -> str:
        return f"{area(of_seed[seed], budget):.3f}" if seed in of_seed else "-"

    rows = [[method, *(cell(of_seed, seed) for seed in seeds)] for method, of_seed in methods.items()]
    return markdown_table(["method", *(f"seed {seed}" for seed in seeds)], rows, is_right=True)


def tuning_table(tried: Sequence[LearningCurve], budget: Budget) -> str:
    """Return a row per method with the area under the curve of every learning rate that was tried."""
    rates = sorted({c.run.learning_rate or 0.0 for c in tried})
    areas = {(c.run.method, c.run.learning_rate): f"{area(c, budget):.3f}" for c in tried}
    methods = dict.fromkeys(c.run.method for c in tried)
    rows = [[method, *(areas.get((method, rate), "-") for rate in rates)] for method in methods]
    return markdown_table(["method", *(f"{rate:g}" for rate in rates)], rows, is_right=True)
