# SPDX-License-Identifier: Apache-2.0
"""Runs a miniature's comparison on one budget, every method with a learning rate of its own.

    verl-gradalign compare imbalance_mini --tune --budget-responses 10240 --output outputs/imbalance

For every method a run with each of a few learning rates, on one seed; then fresh seeds with the rate whose area under
the curve was largest. All of these generate the same number of responses, or of tokens, or train for the same time,
with what trusted problems and candidates take, and are tested after every eighth of it. So do all that a rate is tried
in, which may be shorter and are tested as often in the same stretch. Leaves in the output folder: summary.md,
tuning.md, curves.csv, curves.png, and runs/<method>/lr-<rate>/seed-<n>. The same call goes on where it was interrupted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from verl_gradalign.errors import refuse
from verl_gradalign.experiments.budget import TUNING_OPTION, Budget, as_given, check_budget
from verl_gradalign.experiments.compare import COLUMNS, Comparison, check_same, data_of, policy_of
from verl_gradalign.experiments.launches import run_series
from verl_gradalign.experiments.learning_curves import LearningCurve, area, read_curve
from verl_gradalign.experiments.methods import METHODS, RESPONSES_OF_UPDATE, batch_size, overrides_of
from verl_gradalign.experiments.plan import RunPlan, check_unique
from verl_gradalign.experiments.time_left import PlannedRun, TimeLeft
from verl_gradalign.experiments.tuned_report import GivenThreshold, write_report
from verl_gradalign.toy.regimes import MINIATURES, Miniature, policy_folder
from verl_gradalign.toy.train_files import write_mixed, write_oracle
from verl_gradalign.types import RESPONSES, SECONDS

FRESH_SEEDS = (1, 2, 3, 4, 5)
STEPS_PER_SECOND = 2
"""More than a miniature makes. A run that did would read the mixed file again from its beginning."""


@dataclass(frozen=True)
class Tuning:
    """What a tuned comparison is told beyond what to compare."""

    seed: int = 0
    """Of the runs that the learning rate is chosen by."""
    learning_rates: tuple[float, ...] | None = None
    """None: the miniature's. One alone is taken as it is."""
    budget: Budget | None = None
    """Of every run. None: the miniature's, in responses."""
    tuning_amount: float | None = None
    """What a run spends that a learning rate is tried in, in the budget's unit, and at most that.

    None: of responses the miniature's number, of another unit the same share of the budget.
    """
    threshold: float | None = None
    """Accuracy that the methods are to reach. None: the miniature's, or what `random` has after 3/4 of the budget."""
    num_tests: int = 8
    """Tests of a run, after equal parts of the budget, besides that of the untrained policy."""

    def accuracy_to_reach(self, miniature: Miniature) -> float | None:
        """Return what is fixed before the first run; None: nothing is."""
        return miniature.threshold if self.threshold is None else self.threshold

    def budgets(self, miniature: Miniature) -> tuple[Budget, Budget]:
        """Return the budget of a run that a rate is tried in, and of one of a fresh seed."""
        budget = self.budget or Budget(miniature.num_responses)
        usual = float(miniature.num_tuning_responses)
        if budget.unit != RESPONSES:
            usual = budget.amount * miniature.num_tuning_responses / miniature.num_responses
        amount = min(usual, budget.amount) if self.tuning_amount is None else self.tuning_amount
        return Budget(amount, budget.unit), budget

    def tests_in(self, part: Budget, whole: Budget) -> int:
        """Return how often a run of a part of a run's budget is tested: as often in the same stretch."""
        return max(1, round(self.num_tests * part.amount / whole.amount))


def compare_tuned(comparison: Comparison, tuning: Tuning, console: Console) -> Path:
    """Run what is not done yet, and return the path of the summary.

    Raises: ValueError for what cannot be run; RuntimeError with the end of the output if a run fails. What is done by
        then is in the summary.
    """
    _check(comparison, tuning)
    output, miniature = comparison.output.resolve(), MINIATURES[comparison.regime]
    rates = tuning.learning_rates or miniature.learning_rates
    to_try, budget = tuning.budgets(miniature)
    begun_with = check_same(comparison, output, **_settings(tuning, rates, to_try, budget, miniature))
    given = GivenThreshold(tuning.accuracy_to_reach(miniature), begun_with["threshold"])
    tried = [_plan(comparison, m, tuning.seed, rate) for m in comparison.methods for rate in rates]
    tried = tried if len(rates) > 1 else []
    num_tests = tuning.tests_in(to_try, budget), tuning.num_tests
    left = _time_left(comparison, tried, (to_try, budget), num_tests)
    policy = policy_folder(comparison.policy or output / "policy", miniature.policy)
    _say(console, left.said((policy / "config.json").exists()))
    if budget.unit == SECONDS and comparison.num_jobs > 1:
        _say(console, f"--jobs {comparison.num_jobs}: seconds are compared, and series side by side take more of them")
    with Progress(*COLUMNS, console=console) as progress:
        policy = policy_of(comparison, output, progress)
        run = partial(_run, comparison, policy, progress, lambda: _say(console, left.said()))
        run(tried, to_try, num_tests[0])
        chosen = choose_rates([read_curve(run) for run in tried], to_try)
        fresh = [
            _plan(comparison, m, seed, chosen.get(m, rates[0])) for seed in comparison.seeds for m in comparison.methods
        ]
        try:
            run(fresh, budget, num_tests[1])
        finally:
            curves, before = ([read_curve(run) for run in runs if run.is_done] for runs in (fresh, tried))
            write_report(curves, before, miniature, (to_try, budget), given, output)
    return output / "summary.md"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _check(comparison: Comparison, tuning: Tuning) -> None:
    if comparison.regime not in MINIATURES:
        raise ValueError(
            f"regime={comparison.regime}: only miniatures are tuned. Remedy: choose one of {', '.join(MINIATURES)}, or "
            "leave out --tune"
        )
    for method in comparison.methods:
        if method not in METHODS:
            refuse("--methods", method, "is unknown with --tune", f"choose among {', '.join(METHODS)}")
    check_unique(comparison.methods, comparison.seeds)
    if tuning.seed in comparison.seeds:
        why = f"is among --seeds {','.join(map(str, comparison.seeds))}, which are to be fresh"
        refuse("--tuning-seed", tuning.seed, why, "name another one")
    if tuning.threshold is not None and not 0 < tuning.threshold < 1:
        refuse("--threshold", tuning.threshold, "must be an accuracy between 0 and 1", "give for instance 0.8")
    to_try, budget = tuning.budgets(MINIATURES[comparison.regime])
    num_responses = {method: METHODS[method].num_responses for method in comparison.methods}
    largest = max(num_responses, key=lambda method: num_responses[method])
    instead = f", or leave out {largest}" if len(set(num_responses.values())) > 1 else ""
    for own, option in ((budget, budget.option), (to_try, TUNING_OPTION)):
        check_budget(own, option, num_responses[largest], largest, instead)
    if to_try.amount > budget.amount:
        refuse(TUNING_OPTION, as_given(to_try.amount), f"is more than a run's budget of {budget}", "give at most that")


def _settings(
    tuning: Tuning, rates: Sequence[float], to_try: Budget, budget: Budget, miniature: Miniature
) -> dict[str, Any]:
    return {
        f"budget_{budget.unit}": budget.amount,
        "tuning_budget": to_try.amount,
        "tuning_seed": tuning.seed,
        "rates": list(rates),
        "num_tests": tuning.num_tests,
        "threshold": tuning.accuracy_to_reach(miniature),
    }


def _plan(comparison: Comparison, method: str, seed: int, rate: float) -> RunPlan:
    folder = comparison.output.resolve() / "runs" / method / f"lr-{rate:g}" / f"seed-{seed}"
    return RunPlan(comparison.regime, method, seed, folder, rate)


def _time_left(
    comparison: Comparison, tried: Sequence[RunPlan], budgets: tuple[Budget, Budget], num_tests: tuple[int, int]
) -> TimeLeft:
    of_tried, of_fresh = zip(budgets, num_tests, strict=True)
    planned = [PlannedRun(run.method, run.seed, *of_tried, run.learning_rate) for run in tried]
    planned += [PlannedRun(method, seed, *of_fresh) for seed in comparison.seeds for method in comparison.methods]
    return TimeLeft(comparison.output.resolve(), planned, comparison.num_jobs)


def _run(
    comparison: Comparison,
    policy: Path,
    progress: Progress,
    on_done: Callable[[], object],
    runs: Sequence[RunPlan],
    budget: Budget,
    num_tests: int,
) -> None:
    output = comparison.output.resolve()
    meter = {"amount": budget.amount, "unit": budget.unit, "num_tests": num_tests}

    def specify(run: RunPlan) -> dict[str, Any]:
        data = data_of(comparison, output, run.seed)
        _write_train_files(comparison.regime, data, budget, run.seed)
        return {"overrides": [*overrides_of(run, data, policy), *comparison.overrides], "budget": meter}

    run_series(runs, specify, output, comparison.num_jobs, comparison.python, progress, on_done)


def _write_train_files(regime: str, data: Path, budget: Budget, seed: int) -> None:
    if not (data / "oracle.parquet").exists():
        # Nothing but the shared batch is generated where half of it is trusted, so there are no more than these. A
        # response has a token at least.
        of_batch = 1 / STEPS_PER_SECOND if budget.unit == SECONDS else RESPONSES_OF_UPDATE
        write_mixed(data, int(-(-budget.amount // of_batch)), batch_size(MINIATURES[regime]), seed)
        write_oracle(MINIATURES[regime], data)


def choose_rates(curves: Sequence[LearningCurve], budget: Budget) -> dict[str, float]:
    """Return each method's learning rate of the largest area under the curve; the smaller one of equals."""
    best: dict[str, tuple[float, float]] = {}
    for curve in sorted(curves, key=lambda curve: curve.run.learning_rate or 0.0):
        value, method = area(curve, budget), curve.run.method
        if method not in best or value > best[method][0]:
            best[method] = (value, curve.run.learning_rate or 0.0)
    return {method: rate for method, (_, rate) in best.items()}
