# SPDX-License-Identifier: Apache-2.0
"""Runs of a tuned comparison whose numbers are known."""

import json

import numpy as np

from verl_gradalign.experiments.budget import Budget
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
