# SPDX-License-Identifier: Apache-2.0
"""Means of metrics over a log's metrics table, which is read in pieces.

    tally = MetricTally(bins, wanted=("gradalign/", "timing_s/"))
    for rows in reader.batches("metrics"):
        tally.add(rows)
    steps, values = tally.curve("gradalign/reliability/scores")

Shape legend: N rows of a piece, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from verl_gradalign.report.tallies import StepBins, codes_of, numbers_of

__all__ = ["MetricTally"]

MAX_METRICS = 3000
VALIDATION = "val-core/"
"""Begins the names of metrics that are few, so every point of theirs is kept."""


class MetricTally:
    """Means of metrics by bin, and the extremes of each. Other names than wanted are passed over."""

    def __init__(self, bins: StepBins, wanted: Sequence[str]) -> None:
        self.bins = bins
        self.steps: set[int] = set()
        self._wanted = tuple(wanted)
        self._place_of: dict[str, int] = {}
        self._sums = np.zeros((0, len(bins)))
        self._counts = np.zeros((0, len(bins)))
        self._extremes = np.zeros((0, 2))
        self._points: dict[str, dict[int, float]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._place_of)

    def add(self, rows: pa.Table) -> None:
        """Add a piece of the metrics table (one chunk)."""
        step_N, value_N = rows["step"].to_numpy(), numbers_of(rows["value"])
        code_N, names = codes_of(rows["name"])
        self.steps.update(np.unique(step_N).tolist())
        place_of = np.array([self._place(name) for name in names], dtype=np.int64)
        self._grow()
        place_N = place_of[code_N]
        is_mine_N = (place_N >= 0) & np.isfinite(value_N)
        place_N, step_N, value_N, code_N = (a[is_mine_N] for a in (place_N, step_N, value_N, code_N))
        cell = (place_N, self.bins.of(step_N))
        np.add.at(self._sums, cell, value_N)
        np.add.at(self._counts, cell, 1.0)
        np.minimum.at(self._extremes[:, 0], place_N, value_N)
        np.maximum.at(self._extremes[:, 1], place_N, value_N)
        for code, name in enumerate(names):
            if name.startswith(VALIDATION):
                is_this_N = code_N == code
                self._points.setdefault(name, {}).update(zip(step_N[is_this_N], value_N[is_this_N], strict=True))

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and means by bin, only of bins that have the metric."""
        if name not in self._place_of:
            return np.zeros(0), np.zeros(0)
        place = self._place_of[name]
        is_there_B = self._counts[place] > 0
        return self.bins.steps[is_there_B], self._sums[place, is_there_B] / self._counts[place, is_there_B]

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return every step and value of a validation's metric, steps ascending."""
        pairs = sorted(self._points.get(name, {}).items())
        return np.array([step for step, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)

    def mean(self, name: str) -> float:
        """Return the mean over all steps that have the metric, nan if none has."""
        place = self._place_of.get(name)
        if place is None or not self._counts[place].sum():
            return float("nan")
        return float(self._sums[place].sum() / self._counts[place].sum())

    def total(self, name: str) -> float:
        """Return the sum over all steps, nan if no step has the metric."""
        place = self._place_of.get(name)
        return float(self._sums[place].sum()) if place is not None and self._counts[place].sum() else float("nan")

    def count(self, name: str) -> int:
        """Return the number of steps that have the metric."""
        place = self._place_of.get(name)
        return 0 if place is None else int(self._counts[place].sum())

    def most(self, name: str) -> float:
        """Return the highest value, nan if there is none."""
        return float(self._extremes[self._place_of[name], 1]) if self.count(name) else float("nan")

    def _place(self, name: str) -> int:
        if name not in self._place_of:
            if not name.startswith(self._wanted) or len(self._place_of) >= MAX_METRICS:
                return -1
            self._place_of[name] = len(self._place_of)
        return self._place_of[name]

    def _grow(self) -> None:
        missing = len(self._place_of) - len(self._sums)
        if missing:
            self._sums = np.pad(self._sums, ((0, missing), (0, 0)))
            self._counts = np.pad(self._counts, ((0, missing), (0, 0)))
            self._extremes = np.concatenate([self._extremes, np.tile([np.inf, -np.inf], (missing, 1))])
