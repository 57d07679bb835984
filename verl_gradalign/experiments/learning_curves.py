# SPDX-License-Identifier: Apache-2.0
"""How accuracy grows with the responses that a run has generated, and how runs compare by it.

curve = read_curve(run)
area(curve, num_responses=10_240), responses_to(curve, 0.9)
difference, half_width = paired([...], [...])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_gradalign.data.tasks import AUDIT
from verl_gradalign.experiments.metrics_file import accuracies, metrics_by_step
from verl_gradalign.experiments.plan import RunPlan
from verl_gradalign.experiments.results import SHARE, family
from verl_gradalign.student import student_t
from verl_gradalign.toy.regimes import MINIATURES

LEARNING_RATE = "actor/lr"
"""verl's metric."""


@dataclass(frozen=True)
class LearningCurve:
    """A run's tests, the untrained policy's first. Arrays have one entry per test."""

    run: RunPlan
    responses: np.ndarray
    """Generated so far, trusted ones and candidates included, tests excluded."""
    accuracy: np.ndarray
    """From 0 to 1, mean over the families that the trusted set is of; problems of the test."""
    audit: np.ndarray
    """The same, of the audit set; nan if it was not tested."""
    num_steps: int
    seconds: float
    """Of training, tests excluded."""
    share: float
    """Mean watched share (`Miniature.label`) of what was trained on; nan if not known."""


def read_curve(run: RunPlan) -> LearningCurve:
    """Return the curve of a run that is done.

    Raises: ValueError if the run was not made with the learning rate that it stands for, or was never tested.
    """
    miniature = MINIATURES[run.regime]
    tests, shares, seconds, rates = list[tuple[float, float, float]](), list[float](), 0.0, set[float]()
    path = run.folder / "metrics.jsonl"
    for metrics in metrics_by_step(path).values():
        seconds += metrics.get("timing_s/step", 0.0)
        rates |= {value for name, value in metrics.items() if name == LEARNING_RATE}
        of_family = {family(name): value for name, value in metrics.items() if name.startswith(SHARE)}
        if of_family:
            shares.append(miniature.share(of_family))
        of_source = {family(source): accuracy for source, accuracy in accuracies(metrics).items()}
        tested = [accuracy for name, accuracy in of_source.items() if name in miniature.trusted]
        if tested:
            responses = metrics.get("experiment/num_responses", 0.0)
            tests.append((responses, float(np.mean(tested)), of_source.get(AUDIT, np.nan)))
    if run.learning_rate is not None and rates and not np.allclose(list(rates), run.learning_rate):
        raise ValueError(f"{path}: {LEARNING_RATE}={sorted(rates)}, not {run.learning_rate}. Remedy: delete the run")
    if not tests:
        raise ValueError(f"{path}: no test of {', '.join(miniature.trusted)}. Remedy: delete the run")
    responses, accuracy, audit = np.array(tests).T
    share = float(np.mean(shares)) if shares else np.nan
    return LearningCurve(run, responses, accuracy, audit, len(shares), seconds, share)


def accuracy_at(curve: LearningCurve, responses: float | np.ndarray) -> np.ndarray:
    """Return the accuracy after so many responses, interpolated between the tests."""
    return np.interp(responses, curve.responses, curve.accuracy)


def area(curve: LearningCurve, num_responses: float) -> float:
    """Return the mean accuracy from the first to the `num_responses`th response: the area under the curve, from 0 to 1.

    A curve that ends earlier goes on at its last accuracy.
    """
    x = np.unique([0.0, *curve.responses[curve.responses < num_responses], num_responses])
    y = accuracy_at(curve, x)
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / num_responses)


def responses_to(curve: LearningCurve, accuracy: float) -> float:
    """Return after how many responses the accuracy is first reached, interpolated between the tests; inf: never."""
    reached = np.flatnonzero(curve.accuracy >= accuracy)
    if not len(reached):
        return float("inf")
    if reached[0] == 0:
        return float(curve.responses[0])
    around = slice(reached[0] - 1, reached[0] + 1)
    return float(np.interp(accuracy, curve.accuracy[around], curve.responses[around]))


def paired(values: Sequence[float], baseline: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference and the half width of its 95% interval (Student's t), of values paired by seed.

    The half width is nan for a single pair.
    """
    difference = np.asarray(values) - np.asarray(baseline)
    if len(difference) < 2:
        return float(difference.mean()), float("nan")
    width = float(student_t(np.array([len(difference) - 1.0]))[0])
    return float(difference.mean()), float(width * difference.std(ddof=1) / np.sqrt(len(difference)))
