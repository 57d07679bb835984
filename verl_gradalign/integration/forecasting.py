# SPDX-License-Identifier: Apache-2.0
"""schedule=forecast for the trainer: which problems a step rolls out, and what the forecast learns of them.

    forecasting.prepare(step)                  # before `step`, while the actor is free: features of its shortlist
    draw = forecasting.draw(step)
    metrics = forecasting.observe(step, picks, observations, sources)

Draws as `selection.curriculum.Curriculum` does. What was forecast of a problem is remembered until it is observed,
which in an asynchronous run may be some steps later.
"""

from collections import Counter
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

# Of a problem that no forecast chose, as what replaces a filtered group beyond the shortlist: it shows no lift.
UNKNOWN = (float("nan"), float("nan"), False)


class Forecasting:
    """The forecast of a run, its features, and the meter of what it brings.

    Args:
        config: the `gradalign` block.
        pool: the problems of the train files.
        batch_size: problems that a step trains on.
        features: what problems are known by.
    """

    def __init__(self, config: GradAlignConfig, pool: PromptTable, batch_size: int, features: ProblemFeatures) -> None:
        self._config, self._batch_size, self._features = config, batch_size, features
        self._forecaster = Forecaster(config, pool.problem_ids, batch_size)
        self._lift = LiftMeter(config, Counter(pool.values("data_source")))
        self._forecast_of: dict[int, tuple[float, float, bool]] = {}
        """Mean and deviation of a problem that was drawn, and whether it was drawn uniformly."""

    def prepare(self, step: int) -> None:
        """Make the features of the step's shortlist, before `draw` asks for them."""
        self._features.of(self._forecaster.shortlist(step), step)

    def draw(self, step: int, num_others: int = 0) -> Draw:
        """Return what `step` rolls out; `num_others` places of its batch are taken. Called once per step, ascending."""
        shortlist, num = self._forecaster.shortlist(step), self._batch_size - num_others
        floor = self._lift.effective_floor(self._config.forecast.floor)
        picks = self._forecaster.pick(step, shortlist, self._features.of(shortlist, step), num, floor)
        ids = picks.problem_id_P.tolist()
        columns = (picks.mean_P.tolist(), picks.deviation_P.tolist(), picks.is_uniform_P.tolist())
        self._forecast_of.update(zip(ids, zip(*columns, strict=True), strict=True))
        return Draw(tuple(ids), num)

    def refill(self, num: int) -> tuple[int, ...]:
        """Return further problems of the present draw; fewer if it then holds every problem there is."""
        return tuple(self._forecaster.further(num).tolist())

    def picks_of(self, groups: Sequence[Group]) -> Picks:
        """Return what was forecast of the groups' problems when they were drawn."""
        ids = [group.problem.problem_id for group in groups]
        of_P = [self._forecast_of.get(problem_id, UNKNOWN) for problem_id in ids]
        mean_P, deviation_P = (np.array([of[column] for of in of_P], dtype=np.float64) for column in (0, 1))
        return Picks(np.array(ids, np.int64), mean_P, deviation_P, np.array([of[2] for of in of_P], dtype=bool))

    def observe(
        self, step: int, picks: Picks, observations: Observations, sources: Sequence[str], is_fresh: bool
    ) -> dict[str, float]:
        """Learn from a step's measurements, and return the metrics of the forecast.

        `is_fresh`: whether they were measured along a new direction.
        """
        self._lift.add(step, picks, observations, sources)
        self._forecaster.observe(step, observations, is_fresh)
        for problem_id in picks.problem_id_P.tolist():
            self._forecast_of.pop(problem_id, None)
        return {**{f"forecast/{name}": v for name, v in self._forecaster.summary().items()}, **self._lift.metrics()}

    def state(self) -> dict[str, Any]:
        """Return all that the next draws depend on."""
        forecast_of = [[problem_id, *values] for problem_id, values in self._forecast_of.items()]
        return {
            "forecast_of": forecast_of,
            "forecaster": self._forecaster.state(),
            "lift": self._lift.state(),
            "features": self._features.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises: ValueError if it is that of another pool."""
        self._forecast_of = {int(problem_id): tuple(values) for problem_id, *values in state["forecast_of"]}
        self._forecaster.restore(state["forecaster"])
        self._lift.restore(state["lift"])
        self._features.restore(state["features"])
