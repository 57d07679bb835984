# SPDX-License-Identifier: Apache-2.0
"""schedule=forecast for the trainer: which problems a step rolls out, and what the forecast learns of them.

    forecasting.prepare(step, ())              # before `step`, while the actor is free: features of its shortlist
    draw = forecasting.draw(step)
    metrics = forecasting.observe(step, observations)

Draws as `selection.curriculum.Curriculum` does. A problem that was drawn is pending until it is observed, which in an
asynchronous run may be some steps later.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.features import ProblemFeatures
from verl_gradalign.integration.prompts import PromptTable
from verl_gradalign.selection.curriculum import Draw
from verl_gradalign.selection.forecast import Forecaster
from verl_gradalign.selection.groups import Group
from verl_gradalign.selection.lift import LiftMeter
from verl_gradalign.types import Observations, Picks

UNKNOWN = (np.nan, np.nan, True)


class Forecasting:
    """The forecast of a run, its features, and the meter of what it brings.

    Args:
        config: the `gradalign` block.
        pool: the problems of the train files.
        batch_size: problems that a step rolls out.
        features: what problems are known by.
    """

    def __init__(self, config: GradAlignConfig, pool: PromptTable, batch_size: int, features: ProblemFeatures) -> None:
        self._forecaster = Forecaster(config, pool.problem_ids, batch_size)
        self._lift = LiftMeter(config)
        self._features, self._pool, self._batch_size = features, pool, batch_size
        self._pending: dict[int, tuple[float, float, bool]] = {}
        """Forecast mean and deviation of a problem that was drawn, and whether it was drawn uniformly."""

    def prepare(self, step: int, problem_ids: Sequence[int]) -> None:
        """Make the features of the step's shortlist, and of these problems; later calls find them made."""
        wanted = np.concatenate([np.asarray(problem_ids, np.int64), self._forecaster.shortlist(step)])
        self._features.of(np.unique(wanted), step)

    def draw(self, step: int) -> Draw:
        """Return what `step` rolls out. Called once per step, in ascending order."""
        shortlist = self._forecaster.shortlist(step)
        picks = self._forecaster.pick(step, shortlist, self._features.of(shortlist, step), self._batch_size)
        return Draw(self._noted(picks), self._batch_size)

    def refill(self, num: int) -> tuple[int, ...]:
        """Return further problems of the present draw; fewer if it then holds every problem there is."""
        return self._noted(self._forecaster.further(num))

    def _noted(self, picks: Picks) -> tuple[int, ...]:
        ids = picks.problem_id_P.tolist()
        columns = (picks.mean_P.tolist(), picks.deviation_P.tolist(), picks.is_uniform_P.tolist())
        self._pending.update(zip(ids, zip(*columns, strict=True), strict=True))
        return tuple(ids)

    def picks_of(self, groups: Sequence[Group]) -> Picks:
        """Return what was forecast of the groups' problems when they were drawn."""
        ids = [group.problem.problem_id for group in groups]
        mean_P, deviation_P, is_uniform_P = zip(*(self._pending.get(i, UNKNOWN) for i in ids), strict=True)
        return Picks(np.array(ids, np.int64), np.array(mean_P), np.array(deviation_P), np.array(is_uniform_P, bool))

    def observe(self, step: int, picks: Picks, observations: Observations, sources: Sequence[str]) -> dict[str, float]:
        """Learn from a step's measurements, and return the metrics of the forecast."""
        self._lift.add(step, picks, observations, sources)
        self._forecaster.observe(step, observations, self._features.of(observations.problem_id_P, step))
        for problem_id in observations.problem_id_P.tolist():
            self._pending.pop(problem_id, None)
        return {**self._forecaster.summary(), **self._lift.metrics()}

    def state(self) -> dict[str, Any]:
        """Return all that the next draws depend on."""
        pending = [[problem_id, *values] for problem_id, values in self._pending.items()]
        parts = {"forecaster": self._forecaster, "lift": self._lift, "features": self._features}
        return {"pending": pending, **{name: part.state() for name, part in parts.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises: ValueError if it is that of another pool."""
        self._pending = {int(i): (mean, deviation, is_uniform) for i, mean, deviation, is_uniform in state["pending"]}
        self._forecaster.restore(state["forecaster"])
        self._lift.restore(state["lift"])
        self._features.restore(state["features"])
