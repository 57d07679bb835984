# SPDX-License-Identifier: Apache-2.0
"""How long the runs of a comparison will take, from those that are done.

    left = TimeLeft(output, [PlannedRun("random", 1, Budget(10_240), num_tests=8), ...], num_series=2)
    print(left.said())  # 44 runs of 10,240 responses, 2 side by side: about 48 min (...)

Until a run is done on this machine it goes by what one took on another, and says so. What a run that is under way has
done already is not counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl_gradalign.experiments.budget import Budget
from verl_gradalign.experiments.metrics_file import metrics_by_step
from verl_gradalign.experiments.plan import DONE
from verl_gradalign.types import RESPONSES, SECONDS, TOKENS

# Means over all methods of clean_mini and skill_mini, five seeds.
USUAL_S = {RESPONSES: 0.0095, TOKENS: 0.002, SECONDS: 1.0}
USUAL_TEST_S = 3.5
USUAL_MACHINE = "two cores of an Intel Xeon, two series side by side"
POLICY_S = 120.0
START_S = 60.0
"""Of a series' processes."""


@dataclass(frozen=True)
class PlannedRun:
    """A run that a comparison is made of. Its learning rate may not be known yet."""

    method: str
    seed: int
    budget: Budget
    num_tests: int
    """Besides that of the untrained policy."""
    learning_rate: float | None = None

    def is_done(self, output: Path) -> bool:
        """Return whether it is; without a learning rate, whether one of any is."""
        rate = "*" if self.learning_rate is None else f"{self.learning_rate:g}"
        return any(output.glob(f"runs/{self.method}/lr-{rate}/seed-{self.seed}/{DONE}"))


@dataclass(frozen=True)
class Pace:
    """What runs take, in seconds."""

    method: str
    of_unit: float
    of_test: float


class TimeLeft:
    """Looks at a comparison's folder whenever it is asked."""

    def __init__(self, output: Path, runs: Sequence[PlannedRun], num_series: int) -> None:
        self._output, self._runs, self._num_series = output, runs, num_series
        self._known: dict[Path, Pace] = {}

    def seconds(self, is_policy_made: bool = True) -> float:
        """Return how long the runs that are not done will take."""
        todo = self._todo()
        if not todo:
            return 0.0
        measured = self._paces()
        whole = sum(self._seconds_of(run, measured) for run in todo)
        return whole / min(self._num_series, len(todo)) + START_S + (0.0 if is_policy_made else POLICY_S)

    def said(self, is_policy_made: bool = True) -> str:
        """Return what is left to do, how long that takes, and by what that is known."""
        todo = self._todo()
        if not todo:
            return f"all {len(self._runs)} runs are done"
        counts = Counter(str(run.budget) for run in todo)
        runs = " and ".join(f"{count} run{'s' * (count > 1)} of {budget}" for budget, count in counts.items())
        num_done = len(self._runs) - len(todo)
        done = f" ({num_done} of {len(self._runs)} are done)" if num_done else ""
        num_series = min(self._num_series, len(todo))
        order = f"{num_series} side by side" if num_series > 1 else "one after the other"
        about = f"about {duration(self.seconds(is_policy_made))}, {order}"
        return f"to do: {runs}{done}: {about}; {self._grounds(todo[0].budget.unit)}"

    def _grounds(self, unit: str) -> str:
        measured = self._paces()
        num_measured, (of_unit, of_test) = len(measured), mean_pace(measured, unit)
        where = f"as on {USUAL_MACHINE}, until a run is done here"
        if num_measured:
            where = f"measured on {num_measured} run{'s' * (num_measured > 1)} done here"
        rate = "" if unit == SECONDS else f"{of_unit:.2g} s a {unit.removesuffix('s')} and "
        return f"{rate}{of_test:.1f} s a test, {where}"

    def _todo(self) -> list[PlannedRun]:
        return [run for run in self._runs if not run.is_done(self._output)]

    def _seconds_of(self, run: PlannedRun, measured: Sequence[Pace]) -> float:
        of_method = [pace for pace in measured if pace.method == run.method]
        of_unit, of_test = mean_pace(of_method or measured, run.budget.unit)
        return of_unit * run.budget.amount + of_test * (run.num_tests + 1)

    def _paces(self) -> list[Pace]:
        unit = self._runs[0].budget.unit
        for path in sorted(self._output.glob(f"runs/*/lr-*/seed-*/{DONE}")):
            if path not in self._known and (pace := pace_of(path.parent, unit)):
                self._known[path] = pace
        return list(self._known.values())


def mean_pace(paces: Sequence[Pace], unit: str) -> tuple[float, float]:
    """Return the seconds of a unit and of a test, means over runs; the usual ones if there are none."""
    if not paces:
        return USUAL_S[unit], USUAL_TEST_S
    return float(np.mean([p.of_unit for p in paces])), float(np.mean([p.of_test for p in paces]))


def pace_of(folder: Path, unit: str) -> Pace | None:
    """Return what a run that is done took (runs/<method>/lr-<rate>/seed-<n>); None if it does not say."""
    path = folder / "metrics.jsonl"
    steps = list(metrics_by_step(path).values()) if path.exists() else []
    seconds = sum(metrics.get("timing_s/step", 0.0) for metrics in steps)
    tests = [metrics["timing_s/testing"] for metrics in steps if "timing_s/testing" in metrics]
    spent = seconds if unit == SECONDS else max((m.get(f"experiment/num_{unit}", 0.0) for m in steps), default=0.0)
    if not spent:
        return None
    return Pace(folder.parent.parent.name, seconds / spent, float(np.mean(tests)) if tests else 0.0)


def duration(seconds: float) -> str:
    """Return a time in minutes, or in hours and minutes."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
