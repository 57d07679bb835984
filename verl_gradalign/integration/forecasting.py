# SPDX-License-Identifier: Apache-2.0
"""schedule=forecast for the trainer: which problems a step rolls out, and what the forecast learns of them.

    forecasting.prepare(step)                  # before `step`, while the actor is free: features of its shortlist
    draw = forecasting.draw(step)
    metrics = forecasting.observe(step, picks, observations, sources)

Draws as `selection.curriculum.Curriculum` does. What was forecast of a problem travels with it (`in_flight.py`): in an
asynchronous run it is observed some steps after it was drawn.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.features import ProblemFeatures
from verl_gradalign.integration.prompts import PromptTable
from verl_gradalign.selection.curriculum import Draw
from verl_gradalign.selection.forecast import Forecaster
from verl_gradalign.selection.lift import LiftMeter
from verl_gradalign.types import Observations, Picks


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
        self.picks: Picks | None = None
        """Of the latest draw."""

    def prepare(self, step: int) -> None:
        """Make the features of the step's shortlist, before `draw` asks for them."""
        self._features.of(self._forecaster.shortlist(step), step)

    def draw(self, step: int, num_others: int = 0) -> Draw:
        """Return what `step` rolls out; `num_others` places of its batch are taken. Called once per step, ascending."""
        shortlist, num = self._forecaster.shortlist(step), self._batch_size - num_others
        floor = self._lift.effective_floor(self._config.forecast.floor)
        self.picks = self._forecaster.pick(step, shortlist, self._features.of(shortlist, step), num, floor)
        return Draw(tuple(self.picks.problem_id_P.tolist()), num)

    def refill(self, num: int) -> tuple[int, ...]:
        """Return further problems of the present draw, without a forecast; fewer if it then holds all there are."""
        return tuple(self._forecaster.further(num).tolist())

    def observe(
        self, step: int, picks: Picks, observations: Observations, sources: Sequence[str], is_fresh: bool
    ) -> dict[str, float]:
        """Learn from a step's measurements, and return the metrics of the forecast.

        `sources` are the picks'; `is_fresh`: whether they were measured along a new direction.
        """
        self._lift.add(step, picks, observations, sources)
        self._forecaster.observe(step, observations, is_fresh)
        return {**{f"forecast/{name}": v for name, v in self._forecaster.summary().items()}, **self._lift.metrics()}

    def state(self) -> dict[str, Any]:
        """Return all that the next draws depend on."""
        return {
            "forecaster": self._forecaster.state(),
            "lift": self._lift.state(),
            "features": self._features.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises: ValueError if it is that of another pool."""
        self._forecaster.restore(state["forecaster"])
        self._lift.restore(state["lift"])
        self._features.restore(state["features"])
