# SPDX-License-Identifier: Apache-2.0
"""How accuracy grows with what a run has generated and taken, and how runs compare by it.

curve = read_curve(run)
area(curve, Budget(10_240, "responses")), spent_to(curve, 0.9, Budget(10_240, "responses"))["seconds"]
difference, half_width = paired([...], [...])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from verl_gradalign.data.tasks import AUDIT
from verl_gradalign.experiments.budget import Budget
from verl_gradalign.experiments.metrics_file import accuracies, metrics_by_step
from verl_gradalign.experiments.plan import RunPlan
from verl_gradalign.experiments.results import SHARE, family
from verl_gradalign.student import student_t
from verl_gradalign.toy.regimes import MINIATURES
from verl_gradalign.types import RESPONSES, SECONDS, TOKENS

LEARNING_RATE = "actor/lr"
"""verl's metric."""
UPDATES = "updates"
AXES = {
    RESPONSES: "generated responses, trusted ones and candidates included",
    TOKENS: "generated tokens, those of trusted problems and candidates included",
    SECONDS: "seconds of training, tests excluded",
    UPDATES: "updates",
}
"""What a curve is over."""


@dataclass(frozen=True)
class LearningCurve:
    """A run's tests, the untrained policy's first. Arrays have one entry per test."""

    run: RunPlan
    spent: Mapping[str, np.ndarray]
    """So far, by name of AXES."""
    accuracy: np.ndarray
    """From 0 to 1, mean over the wanted families; problems of the test."""
    audit: np.ndarray
    """Of the audit set, which is of the trusted set's families; nan if it was not tested."""
    share: float
    """Mean watched share (`Miniature.label`) of what was trained on; nan if not known."""


BySeed = dict[int, LearningCurve]


def by_method(curves: Sequence[LearningCurve]) -> dict[str, BySeed]:
    """Return the curves by method, in order of appearance, and by seed."""
    methods: dict[str, BySeed] = {}
    for curve in curves:
        methods.setdefault(curve.run.method, {})[curve.run.seed] = curve
    return methods


def read_curve(run: RunPlan) -> LearningCurve:
    """Return the curve of a run that is done.

    Raises: ValueError if the run was not made with the learning rate that it stands for, or was never tested.
    """
    miniature = MINIATURES[run.regime]
    tests, shares, rates = list[tuple[float, ...]](), list[float](), set[float]()
    seconds = num_updates = 0.0
    path = run.folder / "metrics.jsonl"
    for metrics in metrics_by_step(path).values():
        seconds += metrics.get("timing_s/step", 0.0)
        num_updates += "timing_s/step" in metrics
        rates |= {value for name, value in metrics.items() if name == LEARNING_RATE}
        of_family = {family(name): value for name, value in metrics.items() if name.startswith(SHARE)}
        if of_family:
            shares.append(miniature.share(of_family))
        of_source = {family(source): accuracy for source, accuracy in accuracies(metrics).items()}
        tested = [accuracy for name, accuracy in of_source.items() if name in miniature.targets]
        if tested:
            generated = (metrics.get(f"experiment/num_{name}", 0.0) for name in (RESPONSES, TOKENS))
            tests.append((*generated, seconds, num_updates, float(np.mean(tested)), of_source.get(AUDIT, np.nan)))
    if run.learning_rate is not None and rates and not np.allclose(list(rates), run.learning_rate):
        raise ValueError(f"{path}: {LEARNING_RATE}={sorted(rates)}, not {run.learning_rate}. Remedy: delete the run")
    if not tests:
        raise ValueError(f"{path}: no test of {', '.join(miniature.targets)}. Remedy: delete the run")
    *spent, accuracy, audit = np.array(tests).T
    share = float(np.mean(shares)) if shares else np.nan
    return LearningCurve(run, dict(zip(AXES, spent, strict=True)), accuracy, audit, share)


def accuracy_at(curve: LearningCurve, axis: str, at: float | np.ndarray) -> np.ndarray:
    """Return the accuracy where so much was spent, interpolated between the tests."""
    return np.interp(at, curve.spent[axis], curve.accuracy)


def area(curve: LearningCurve, budget: Budget) -> float:
    """Return the mean accuracy until the budget is spent: the area under the curve, from 0 to 1.

    A curve that ends earlier goes on at its last accuracy.
    """
    spent = curve.spent[budget.unit]
    x = np.unique([0.0, *spent[spent < budget.amount], budget.amount])
    y = accuracy_at(curve, budget.unit, x)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / budget.amount)


def spent_to(curve: LearningCurve, accuracy: float, budget: Budget) -> dict[str, float]:
    """Return what was spent when the accuracy was first reached, by name of AXES, interpolated between the tests.

    All of it is inf if it was not reached within the budget.
    """
    never = dict.fromkeys(curve.spent, float("inf"))
    reached = np.flatnonzero(curve.accuracy >= accuracy)
    if not len(reached):
        return never
    around = slice(max(0, reached[0] - 1), reached[0] + 1)
    at = {axis: float(np.interp(accuracy, curve.accuracy[around], x[around])) for axis, x in curve.spent.items()}
    return at if at[budget.unit] <= budget.amount else never


def median_spent(curves: Sequence[LearningCurve], accuracy: float, axis: str, budget: Budget) -> tuple[float, bool]:
    """Return the median over seeds of what reaching the accuracy took, and whether it took more than that.

    A seed that never gets there counts as more than all. If the median is such a one, the number is what was spent at
    least by those that never did.
    """
    values = [spent_to(curve, accuracy, budget)[axis] for curve in curves]
    # Of an even number of seeds the later of the two in the middle: half way to infinity is nowhere.
    median = sorted(values)[len(values) // 2]
    if np.isfinite(median):
        return median, False
    if axis == budget.unit:
        return budget.amount, True
    # Of what is not the budget's unit runs have spent different amounts; more than the least is true of every one.
    ended = [curve.spent[axis][-1] for curve, value in zip(curves, values, strict=True) if not np.isfinite(value)]
    return float(min(ended)), True


def gain(ours: BySeed, theirs: BySeed, accuracy: float, budget: Budget) -> tuple[float, bool]:
    """Return how many times our tokens they take to reach the accuracy, and whether it is more than that.

    Of medians over seeds. nan if ours never get there, or have it from the beginning.
    """
    (own, is_never), (other, is_more) = (
        median_spent(list(of_seed.values()), accuracy, TOKENS, budget) for of_seed in (ours, theirs)
    )
    return (float("nan"), False) if is_never or own == 0 else (other / own, is_more)


def area_gain(ours: BySeed, theirs: BySeed, budget: Budget) -> tuple[float, float]:
    """Return by how much our area under the curve is larger, over the seeds of both, and as `paired` its half width.

    Both are nan if there is no such seed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return float("nan"), float("nan")
    return paired(*([area(curves[seed], budget) for seed in seeds] for curves in (ours, theirs)))


def paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference and the half width of its 95% interval (Student's t), of values paired by seed.

    The half width is nan for a single pair.
    """
    difference = np.asarray(values) - np.asarray(baseline)
    if len(difference) < 2:
        return float(difference.mean()), float("nan")
    width = float(student_t(np.array([len(difference) - 1.0]))[0])
    return float(difference.mean()), float(width * difference.std(ddof=1) / np.sqrt(len(difference)))
