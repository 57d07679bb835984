# SPDX-License-Identifier: Apache-2.0
"""What became of forecast and of randomly drawn picks: sums over the rows of a run with schedule forecast.

    forecast = ForecastTally(bins)
    forecast.add(Rows.of(table), source_N)
    forecast.lift, forecast.sources(names), forecast.starved(names)

A log of another schedule has no picks: nothing is summed, and `has_picks` is false.

Shape legend: N rows of a piece, B bins of steps, V data sources; 2 kinds of picks, forecast and uniform.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_gradalign.rank_correlation import MIN_RANKED, spearman
from verl_gradalign.report.tallies import PointSample, Rows, StepBins
from verl_gradalign.selection.lift_estimate import Lift, PickSums, estimate
from verl_gradalign.selection.starved import SourceCounts, StarvedSource, starved_sources

COUNTED, FORECASTS, FORECAST_SUM, OBSERVED, OBSERVED_SUM, OBSERVED_SQUARES = range(6)
"""Of a kind of picks: how many; with a forecast, and its sum; with an observation, its sum and that of squares."""


@dataclass(frozen=True)
class SourceRow:
    """A data source as the forecast and the measurements see it; what is not known is nan."""

    name: str
    share_uniform: float
    """Of the randomly drawn picks: about its share of the pool."""
    share_forecast: float
    """Of the forecast picks."""
    mean_forecast: float
    """Of its randomly drawn picks, a fair sample of the source."""
    mean_observed: float
    """What was measured of them."""
    error: float
    """Standard error of that mean."""
    num_observed: int
    chosen_observed: float
    """What was measured of its forecast picks."""


class ForecastTally:
    """Sums by bin of steps and by data source, and a sample of forecasts with what was measured."""

    def __init__(self, bins: StepBins) -> None:
        self._bins = bins
        self._sample = PointSample(("forecast_mean", "observed"))
        self._by_bin_K2B = np.zeros((2, 2, len(bins)))
        self._by_source_K6V = np.zeros((2, 6, 0))

    @property
    def has_picks(self) -> bool:
        return bool(self._by_source_K6V[:, COUNTED].any())

    def add(self, rows: Rows, source_N: np.ndarray) -> None:
        """Add a piece of the selection table; `source_N` are its data sources as numbers."""
        if not (rows.is_forecast_N.any() or rows.is_uniform_N.any()):
            return
        self._sample.add(rows)
        num_sources = max(self._by_source_K6V.shape[2], int(source_N.max()) + 1)
        grown = num_sources - self._by_source_K6V.shape[2]
        self._by_source_K6V = np.pad(self._by_source_K6V, ((0, 0), (0, 0), (0, grown)))
        bin_N, forecast_N, observed_N = (
            self._bins.of(rows.step_N), rows.numbers["forecast_mean"], rows.numbers["observed"]
        )  # fmt: skip
        for kind, is_mine_N in enumerate((rows.is_forecast_N, rows.is_uniform_N)):
            is_known_N = is_mine_N & np.isfinite(observed_N)
            has_forecast_N = is_mine_N & np.isfinite(forecast_N)
            known_N = np.where(is_known_N, observed_N, 0.0)
            columns = (is_mine_N, has_forecast_N, np.where(has_forecast_N, forecast_N, 0.0))
            for place, weight_N in enumerate((*columns, is_known_N, known_N, known_N**2)):
                self._by_source_K6V[kind, place] += np.bincount(source_N, weight_N, num_sources)
            for place, weight_N in enumerate((is_known_N, known_N)):
                self._by_bin_K2B[kind, place] += np.bincount(bin_N, weight_N, len(self._bins))

    @property
    def num_observed(self) -> tuple[int, int]:
        """How many forecast and uniform picks were measured."""
        forecast, uniform = self._by_bin_K2B[:, 0].sum(1).tolist()
        return int(forecast), int(uniform)

    @property
    def lift(self) -> Lift | None:
        """What forecast picks were worth beside uniform ones over the whole run; None where too few were measured."""
        (num_forecast_B, sum_forecast_B), (num_uniform_B, sum_uniform_B) = self._by_bin_K2B
        return estimate(PickSums(num_forecast_B, sum_forecast_B, num_uniform_B, sum_uniform_B))

    def spearman(self) -> tuple[float, int]:
        """Return the rank correlation of forecasts with what was measured later, and of how many; nan of too few."""
        forecast, observed, _ = self._sample.points()
        if len(forecast) < MIN_RANKED:
            return float("nan"), len(forecast)
        import torch

        return spearman(torch.from_numpy(forecast.copy()), torch.from_numpy(observed.copy())), len(forecast)

    def sources(self, names: Sequence[str]) -> list[SourceRow]:
        """Return a row per data source, the highest forecast first. `names`: by the numbers given to `add`."""
        forecast_6V, uniform_6V = self._by_source_K6V
        with np.errstate(divide="ignore", invalid="ignore"):
            share_uniform_V, share_forecast_V = (t[COUNTED] / t[COUNTED].sum() for t in (uniform_6V, forecast_6V))
            mean_V, count_V = uniform_6V[OBSERVED_SUM] / uniform_6V[OBSERVED], uniform_6V[OBSERVED]
            spread_V = np.maximum(uniform_6V[OBSERVED_SQUARES] / count_V - mean_V**2, 0) * count_V / (count_V - 1)
            columns = (
                share_uniform_V,
                share_forecast_V,
                uniform_6V[FORECAST_SUM] / uniform_6V[FORECASTS],
                mean_V,
                np.where(count_V > 1, np.sqrt(spread_V / count_V), np.nan),
                count_V.astype(int),
                forecast_6V[OBSERVED_SUM] / forecast_6V[OBSERVED],
            )
        rows = [SourceRow(*row) for row in zip(names, *(column_V.tolist() for column_V in columns), strict=False)]
        return sorted(rows, key=lambda row: (np.isnan(row.mean_forecast), -row.mean_forecast))

    def starved(self, names: Sequence[str]) -> list[StarvedSource]:
        """Return the sources that the forecast hardly picked from, by their share of the randomly drawn picks."""
        forecast_V, uniform_6V = self._by_source_K6V[0, COUNTED], self._by_source_K6V[1]
        counted = zip(forecast_V, uniform_6V[COUNTED], uniform_6V[OBSERVED], uniform_6V[OBSERVED_SUM], strict=True)
        counts = {
            name: SourceCounts(int(forecast), int(uniform), int(measured), float(total))
            for name, (forecast, uniform, measured, total) in zip(names, counted, strict=False)
        }
        total = max(1.0, uniform_6V[COUNTED].sum())
        return starved_sources(counts, {name: count.num_uniform / total for name, count in counts.items()})
