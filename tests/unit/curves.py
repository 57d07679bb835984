# SPDX-License-Identifier: Apache-2.0
"""Runs of a tuned comparison whose numbers are known."""

import json

import numpy as np

from verl_gradalign.experiments.budget import Budget
from verl_gradalign.experiments.curve_files import write_curves
from verl_gradalign.experiments.learning_curves import LearningCurve
from verl_gradalign.experiments.plan import DONE, RunPlan

BUDGET = Budget(1000)
REGIME = "imbalance_mini"
NUM_UPDATES = 40
TOKENS_PER_RESPONSE = 5


def curve_of(method, seed, accuracy, learning_rate=4e-4):
    """A curve with tests at equal distances; the audit set is a point worse, and a tenth of the training is watched."""
    run = RunPlan(REGIME, method, seed, None, learning_rate)
    share = np.linspace(0, 1, len(accuracy))
    whole = {"responses": BUDGET.amount, "tokens": TOKENS_PER_RESPONSE * BUDGET.amount}
    whole |= {"seconds": 60.0 + seed, "updates": NUM_UPDATES}
    spent = {axis: share * amount for axis, amount in whole.items()}
    return LearningCurve(run, spent, np.array(accuracy), np.array(accuracy) - 0.01, 0.1)


def seeds_of(method, accuracy, seeds=(1, 2, 3)):
    """Curves of several seeds, each a point better at the end than the one before."""
    return [curve_of(method, seed, [*accuracy[:-1], accuracy[-1] + seed / 100]) for seed in seeds]


LOW, HIGH = [0.3, 0.3, 0.4], [0.3, 0.6, 0.9]


def write_comparison(folder):
    """Leave what a comparison leaves in which an oracle and a forecast do better, and a rate was tried on seed 0."""
    folder.mkdir(parents=True)
    settings = {"regime": REGIME, f"budget_{BUDGET.unit}": BUDGET.amount, "threshold": 0.6}
    (folder / "comparison.json").write_text(json.dumps(settings))
    fresh = [*seeds_of("random", LOW), *seeds_of("oracle", HIGH), *seeds_of("forecast", [0.3, 0.5, 0.7], (2, 3))]
    write_curves(fresh, seeds_of("random", HIGH, (0,)), folder / "curves.csv")


def write_run(run, tests, learning_rate=None):
    """Leave what a run leaves, with a step of 256 responses, 2 s and a test of 1 s for every test after the first."""
    run.folder.mkdir(parents=True)
    with (run.folder / "metrics.jsonl").open("w") as file:
        for step, accuracy in enumerate(tests):
            data = {f"val-core/gradalign/tasks/{name}/acc/mean@1": accuracy for name in ("rotation", "audit")}
            data["val-core/gradalign/tasks/sorting/acc/mean@1"] = 0.0
            if step:
                data |= {"timing_s/step": 2.0, "timing_s/testing": 1.0, "actor/lr": learning_rate or run.learning_rate}
                data |= {"experiment/share/gradalign/tasks/rotation": 0.25, "experiment/num_responses": 256.0 * step}
                data["experiment/num_tokens"] = TOKENS_PER_RESPONSE * 256.0 * step
            file.write(json.dumps({"step": step, "data": data}) + "\n")
    (run.folder / DONE).touch()
