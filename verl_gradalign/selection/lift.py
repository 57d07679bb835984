# SPDX-License-Identifier: Apache-2.0
"""A meter that tells, while a run goes on, whether its forecast pays. It chooses nothing and measures nothing.

    meter = LiftMeter(config, pool={"math": 9000, "code": 1000})
    floor = meter.effective_floor(config.forecast.floor)      # before a step's picks
    meter.add(step, picks, observations, sources)             # once they were measured
    metrics |= meter.metrics()

The uniform part of every batch is a sample of the pool, so no other run is needed (`lift_estimate`). Forecasts are
compared with what was measured before it was learnt from, so their rank correlation is out of sample.

Shape legend: P picks of a step, N picks in the window, S its steps.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.rank_correlation import MIN_RANKED, spearman
from verl_gradalign.selection.lift_estimate import ENOUGH, Lift, PickSums, estimate
from verl_gradalign.selection.starved import SourceCounts, StarvedSource, starved_sources
from verl_gradalign.types import Observations, Picks

logger = logging.getLogger(__name__)

WINDOW = 256
"""Measured picks of the scarcer kind that the window holds: the policy moves, so old ones are of another forecast."""
MIN_STEPS, MAX_STEPS = 20, 500
MAX_ROWS = 50_000
PROBE_SHARE = 0.125
"""Of a batch, still chosen by forecast while all others are drawn uniformly: so that a lift can show again."""
REMEDY = (
    "Remedy: gradalign.forecast.on_no_lift=uniform draws uniformly until a lift shows; a forecast gets better by what "
    "distinguishes problems (gradalign.log.columns, gradalign.forecast.features) and by a steadier direction "
    "(gradalign.direction.part, gradalign.direction.replay)"
)
COLUMNS: dict[str, Any] = {
    "step": np.int64,
    "problem_id": np.int64,
    "mean": np.float64,  # forecast
    "value": np.float64,  # measured; nan: not yet, or nothing was learnt of it
    "is_uniform": np.bool_,
    "source": np.int32,  # place in the list of names
}


class LiftMeter:
    """Keeps the latest picks with what was measured of them.

    Args:
        config: the `gradalign` block.
        pool: number of problems by source.
    """

    def __init__(self, config: GradAlignConfig, pool: Mapping[str, int]) -> None:
        self._config = config.forecast
        total = max(1, sum(pool.values()))
        self._shares = {name: count / total for name, count in pool.items()}
        self._place_of = {name: place for place, name in enumerate(pool)}
        self._rows = {name: np.zeros(0, kind) for name, kind in COLUMNS.items()}
        self._of_step: dict[str, float] = {}
        self._num_since_judged = np.zeros(2, dtype=np.int64)
        self._is_uniform = False
        self._said: bool | None = None

    def add(self, step: int, picks: Picks, observations: Observations, sources: Sequence[str]) -> None:
        """Note a step's picks, their sources, and what was measured meanwhile.

        Observations are matched by problem id with the latest pick that waits for one, in whichever step it was made;
        those of other problems are left out, and so are values that are not finite.
        """
        places = [self._place_of.setdefault(name, len(self._place_of)) for name in sources]
        new = {
            "step": np.full(len(picks.problem_id_P), step),
            "problem_id": picks.problem_id_P,
            "mean": picks.mean_P,
            "value": np.full(len(picks.problem_id_P), np.nan),
            "is_uniform": picks.is_uniform_P,
            "source": np.array(places, dtype=np.int32),
        }
        self._rows = {name: np.concatenate([self._rows[name], new[name]]).astype(COLUMNS[name]) for name in COLUMNS}
        self._observe(observations)
        is_forecast_P = ~picks.is_uniform_P
        self._of_step = {
            "forecast/picks": float(is_forecast_P.sum()),
            "forecast/uniform": float(picks.is_uniform_P.sum()),
            "forecast/floor": self.effective_floor(self._config.floor),
        }
        if is_forecast_P.any():
            self._of_step["forecast/mean"] = float(picks.mean_P[is_forecast_P].mean())
            self._of_step["forecast/deviation"] = float(picks.deviation_P[is_forecast_P].mean())
        self._forget()
        self._judge(step)

    @property
    def lift(self) -> Lift | None:
        """What forecast picks were worth beside uniform ones; None while too few were measured."""
        rows = self._rows
        is_known_N = np.isfinite(rows["value"])
        _, place_N = np.unique(rows["step"][is_known_N], return_inverse=True)
        value_N, is_uniform_N = rows["value"][is_known_N], rows["is_uniform"][is_known_N]
        num_steps = int(place_N.max(initial=-1)) + 1
        sums = []
        for is_mine_N in (~is_uniform_N, is_uniform_N):
            sums.append(np.bincount(place_N[is_mine_N], minlength=num_steps))
            sums.append(np.bincount(place_N[is_mine_N], value_N[is_mine_N], minlength=num_steps))
        return estimate(PickSums(*sums))

    @property
    def pays(self) -> bool | None:
        """Whether forecast picks are worth more than uniform ones; None: not enough is known yet."""
        lift = self.lift
        return None if lift is None else lift.pays

    @property
    def spearman(self) -> float:
        """Rank correlation of forecasts with what was measured of the same problems; nan where there are too few."""
        is_known_N = np.isfinite(self._rows["value"]) & np.isfinite(self._rows["mean"])
        if is_known_N.sum() < MIN_RANKED:
            return float("nan")
        mean_N, value_N = (torch.from_numpy(self._rows[name][is_known_N]) for name in ("mean", "value"))
        return spearman(mean_N, value_N)

    @property
    def starved(self) -> list[StarvedSource]:
        """The sources that the forecast has hardly picked from over the window, once that is `MIN_STEPS` long."""
        if len(np.unique(self._rows["step"])) < MIN_STEPS:
            return []
        num, source_N, is_uniform_N = len(self._place_of), self._rows["source"], self._rows["is_uniform"]
        is_measured_N = is_uniform_N & np.isfinite(self._rows["value"])
        counts = [
            np.bincount(source_N[is_mine_N], minlength=num).tolist()
            for is_mine_N in (~is_uniform_N, is_uniform_N, is_measured_N)
        ]
        sums = np.bincount(source_N[is_measured_N], self._rows["value"][is_measured_N], minlength=num).tolist()
        columns = zip(self._place_of, *counts, sums, strict=True)
        of_source = {name: SourceCounts(*values) for name, *values in columns}
        return starved_sources(of_source, self._shares)

    def effective_floor(self, configured: float) -> float:
        """Return the share of a batch to draw uniformly: as configured, or nearly all of it while the forecast does not
        pay and forecast.on_no_lift=uniform."""
        return max(configured, 1 - PROBE_SHARE) if self._is_uniform else configured

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the step that was added last, and of the window."""
        values, lift, correlation = dict(self._of_step), self.lift, self.spearman
        values["forecast/starved"] = float(len(self.starved))
        if not np.isnan(correlation):
            values["forecast/spearman"] = correlation
        if lift is not None:
            values["forecast/difference"] = lift.difference
            values |= {"forecast/difference_low": lift.difference_low, "forecast/difference_high": lift.difference_high}
            if lift.has_ratio:
                values |= {"forecast/lift": lift.ratio, "forecast/lift_low": lift.low, "forecast/lift_high": lift.high}
        return values

    def state(self) -> dict[str, Any]:
        """Return what later steps depend on, for the checkpoint."""
        return {
            "names": list(self._place_of),
            "rows": dict(self._rows),
            "num_since_judged": self._num_since_judged,
            "is_uniform": self._is_uniform,
            "said": self._said,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self._place_of = {name: place for place, name in enumerate(state["names"])}
        self._rows = {name: np.array(state["rows"][name], kind) for name, kind in COLUMNS.items()}
        self._num_since_judged = np.array(state["num_since_judged"], np.int64)
        self._is_uniform, self._said = state["is_uniform"], state["said"]

    def _observe(self, observations: Observations) -> None:
        """Fill in what was measured of picks that wait for it."""
        rows = self._rows
        is_known_P = np.isfinite(observations.value_P)
        value_of = dict(
            zip(observations.problem_id_P[is_known_P].tolist(), observations.value_P[is_known_P], strict=True)
        )
        waiting = np.flatnonzero(
            np.isnan(rows["value"]) & np.isin(rows["problem_id"], observations.problem_id_P[is_known_P])
        )
        for place in waiting[::-1]:  # of a problem's picks the latest
            value = value_of.pop(int(rows["problem_id"][place]), None)
            if value is not None:
                rows["value"][place] = value
                self._num_since_judged[int(rows["is_uniform"][place])] += 1

    def _forget(self) -> None:
        """Drop the oldest steps beyond the window."""
        step_N, is_uniform_N = self._rows["step"], self._rows["is_uniform"]
        steps_S, place_N = np.unique(step_N, return_inverse=True)
        is_known_N = np.isfinite(self._rows["value"])
        after = []
        for is_mine_N in (is_known_N & is_uniform_N, is_known_N & ~is_uniform_N, np.full(len(step_N), True)):
            count_S = np.bincount(place_N[is_mine_N], minlength=len(steps_S))
            after.append(count_S[::-1].cumsum()[::-1] - count_S)  # in the steps that follow
        num_after_S = np.arange(len(steps_S))[::-1]
        is_full_S = (np.minimum(*after[:2]) >= WINDOW) | (after[2] >= MAX_ROWS) | (num_after_S >= MAX_STEPS)
        is_kept_S = ~(is_full_S & (num_after_S >= MIN_STEPS))
        self._keep(is_kept_S[place_N])

    def _judge(self, step: int) -> None:
        """Say whether the forecast pays, and switch, whenever enough new picks of both kinds were measured.

        Not in every step: of many looks at one window one is favourable by chance. After a switch the window begins
        anew, so what made the switch does not count against the next.
        """
        if self._num_since_judged.min() < ENOUGH:
            return
        lift = self.lift
        if lift is None or lift.pays is None:
            return
        self._num_since_judged[:] = 0
        if lift.pays != self._said:
            level, remedy = (logging.INFO, "") if lift.pays else (logging.WARNING, f" {REMEDY}.")
            logger.log(level, "step %d: %s%s", step, lift.in_words(), remedy)
        self._said = lift.pays
        if self._config.on_no_lift == "uniform" and lift.pays == self._is_uniform:
            self._is_uniform = not lift.pays
            self._keep(self._rows["step"] > step)
            now = "choosing by forecast again"
            if self._is_uniform:
                now = "drawing all but a few problems uniformly (gradalign.forecast.on_no_lift=uniform)"
            logger.warning("step %d: %s", step, now)

    def _keep(self, is_kept_N: np.ndarray) -> None:
        self._rows = {name: column_N[is_kept_N] for name, column_N in self._rows.items()}
