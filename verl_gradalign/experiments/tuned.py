# SPDX-License-Identifier: Apache-2.0
"""Methods compared on a miniature at equal generated responses, each with a learning rate that was tuned for it.

    verl-gradalign compare imbalance_mini --tuned --output outputs/imbalance

For every method a run with each of a few learning rates, on one seed; then fresh seeds with the rate whose area under
the curve was largest. All of these generate the same number of responses, trusted ones and candidates included, and are
tested after every eighth of them; so do all that a rate is tried in, which may be shorter. Leaves in the output folder:
summary.md, tuning.md, curves.csv, curves.png, and runs/<method>/lr-<rate>/seed-<n>. The same call goes on where it was
interrupted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from verl_gradalign.experiments.compare import COLUMNS, Comparison, check_same, data_of, policy_of
from verl_gradalign.experiments.launches import run_series
from verl_gradalign.experiments.learning_curves import LearningCurve, area, read_curve
from verl_gradalign.experiments.methods import (
    BATCH_SIZE,
    METHODS,
    NUM_RESPONSES_PER_PROBLEM,
    overrides_of,
)
from verl_gradalign.experiments.plan import RunPlan
from verl_gradalign.experiments.tuned_report import write_report
from verl_gradalign.toy.regimes import MINIATURES, Miniature
from verl_gradalign.toy.train_files import write_mixed, write_oracle

FRESH_SEEDS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Tuning:
    """What a tuned comparison is told beyond what to compare."""

    seed: int = 0
    """Of the runs that the learning rate is chosen by."""
    learning_rates: tuple[float, ...] | None = None
    """None: the miniature's. One alone is taken as it is."""
    num_responses: int | None = None
    """What every run generates. None: the miniature's."""
    num_tuning_responses: int | None = None
    """What a run generates that a learning rate is tried in. None: the miniature's, and at most `num_responses`."""
    num_tests: int = 8
    """Tests of a run, after equal numbers of responses, besides that of the untrained policy."""

    def budgets(self, miniature: Miniature) -> tuple[dict[str, int], dict[str, int]]:
        """Return the arguments of `cpu.series.Budget`: of a run that a rate is tried in, and of one of a fresh seed."""
        num_responses = self.num_responses or miniature.num_responses
        num_tuning = min(self.num_tuning_responses or miniature.num_tuning_responses, num_responses)
        tried, fresh = ({"num_responses": num, "num_tests": self.num_tests} for num in (num_tuning, num_responses))
        return tried, fresh


def compare_tuned(comparison: Comparison, tuning: Tuning, console: Console) -> Path:
    """Run what is not done yet, and return the path of the summary.

    Raises: ValueError for what cannot be run; RuntimeError with the end of the output if a run fails. What is done by
        then is in the summary.
    """
    _check(comparison, tuning)
    output, miniature = comparison.output.resolve(), MINIATURES[comparison.regime]
    rates = tuning.learning_rates or miniature.learning_rates
    to_try, budget = tuning.budgets(miniature)
    num_tuning_responses, num_responses = to_try["num_responses"], budget["num_responses"]
    check_same(
        comparison,
        output,
        **budget,
        num_tuning_responses=num_tuning_responses,
        tuning_seed=tuning.seed,
        learning_rates=list(rates),
    )
    tried = [_plan(comparison, m, tuning.seed, rate) for m in comparison.methods for rate in rates]
    tried = tried if len(rates) > 1 else []
    with Progress(*COLUMNS, console=console) as progress:
        policy = policy_of(comparison, output, progress)
        _run(comparison, tried, policy, to_try, progress)
        chosen = choose_rates([read_curve(run) for run in tried], num_tuning_responses)
        fresh = [
            _plan(comparison, m, seed, chosen.get(m, rates[0])) for seed in comparison.seeds for m in comparison.methods
        ]
        try:
            _run(comparison, fresh, policy, budget, progress)
        finally:
            curves, before = ([read_curve(run) for run in runs if run.is_done] for runs in (fresh, tried))
            write_report(curves, before, miniature, num_responses, num_tuning_responses, output)
    return output / "summary.md"


def _check(comparison: Comparison, tuning: Tuning) -> None:
    if comparison.regime not in MINIATURES:
        raise ValueError(
            f"regime={comparison.regime}: only miniatures are tuned; choose one of {', '.join(MINIATURES)}"
        )
    unknown = [method for method in comparison.methods if method not in METHODS]
    if unknown:
        raise ValueError(f"methods={unknown}: unknown here; choose among {', '.join(METHODS)}")
    if tuning.seed in comparison.seeds:
        raise ValueError(f"tuning seed {tuning.seed} is among seeds={list(comparison.seeds)}; name fresh ones")


def _plan(comparison: Comparison, method: str, seed: int, rate: float) -> RunPlan:
    folder = comparison.output.resolve() / "runs" / method / f"lr-{rate:g}" / f"seed-{seed}"
    return RunPlan(comparison.regime, method, seed, folder, rate)


def _run(
    comparison: Comparison, runs: Sequence[RunPlan], policy: Path, budget: Mapping[str, int], progress: Progress
) -> None:
    output = comparison.output.resolve()

    def specify(run: RunPlan) -> dict[str, Any]:
        data = data_of(comparison, output, run.seed)
        _write_train_files(comparison.regime, data, budget["num_responses"], run.seed)
        return {"overrides": [*overrides_of(run, data, policy), *comparison.overrides], "budget": dict(budget)}

    run_series(runs, specify, output, comparison.num_jobs, comparison.python, progress)


def _write_train_files(regime: str, data: Path, num_responses: int, seed: int) -> None:
    if not (data / "oracle.parquet").exists():
        # Nothing but the shared batch is generated where half of it is trusted, so this is how many there are.
        num_batches = -(-num_responses // (BATCH_SIZE * NUM_RESPONSES_PER_PROBLEM))
        write_mixed(data, num_batches, BATCH_SIZE, seed)
        write_oracle(MINIATURES[regime], data)


def choose_rates(curves: Sequence[LearningCurve], num_responses: int) -> dict[str, float]:
    """Return each method's learning rate of the largest area under the curve; the smaller one of equals."""
    best: dict[str, tuple[float, float]] = {}
    for curve in sorted(curves, key=lambda curve: curve.run.learning_rate or 0.0):
        value, method = area(curve, num_responses), curve.run.method
        if method not in best or value > best[method][0]:
            best[method] = (value, curve.run.learning_rate or 0.0)
    return {method: rate for method, (_, rate) in best.items()}
