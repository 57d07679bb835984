# SPDX-License-Identifier: Apache-2.0
"""What a problem's score is beyond what its features say: u ~ N(0, tau^2), one scalar Kalman filter a problem.

A problem's filter is kept as the mean of its residuals and that mean's standard error, which do not depend on tau^2, so
that what was measured while tau^2 was still unknown is not lost. Both age: each step takes a part of the information.

tau^2 is the mean product of a problem's residual with the mean of its earlier ones, less a standard error: what is
alike in both is the problem's own. (The variance of the residuals less their known noise would do too, but it takes
for the problem's own whatever the noise has that its estimate has not.) So it is 0 until problems are met again, and
stays there where they do not differ.

Shape legend: P problems of a step, A all problems.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from verl_gradalign.selection.running_mean import RunningMean

WINDOW = 500
"""Repeated measurements that moments are taken from: one more lets the earlier ones count 1 / 500 less."""


class OwnParts:
    """12 bytes a problem, touched only once it is measured.

    Args:
        memory: steps after which a residual weighs a third.
    """

    def __init__(self, num_problems: int, memory: float) -> None:
        self._mean_A = np.zeros(num_problems, dtype=np.float32)
        self._sharpness_A = np.zeros(num_problems, dtype=np.float32)
        """1 / standard error of the mean; 0 where nothing was measured. (Its square may leave float32.)"""
        self._seen_A = np.zeros(num_problems, dtype=np.int32)
        """Step of the last measurement; 0: none."""
        self._keep = 1 - 1 / memory
        self._products, self._squares = RunningMean(), RunningMean()
        """Of residuals with earlier ones, and the squares of the weighted products, for the mean's standard error."""
        self.num_known = 0
        """Problems measured at least once."""

    @property
    def variance(self) -> float:
        """Return tau^2."""
        if not self._products.weight:
            return 0.0
        return max(0.0, self._products.mean - self._squares.total**0.5 / self._products.weight)

    def predict(self, position_P: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each u's mean and variance."""
        if self.variance == 0:
            return np.zeros(len(position_P)), np.zeros(len(position_P))
        precision_P = self._precision(position_P, step)
        variance_P = 1 / (precision_P + 1 / self.variance)
        return variance_P * precision_P * self._mean_A[position_P], variance_P

    def learn(self, position_P: np.ndarray, step: int, residual_P: np.ndarray, noise_P: np.ndarray) -> None:
        """Note residuals, u included, and the variance of what else is in them. Each problem once."""
        precision_P, mean_P = self._precision(position_P, step), self._mean_A[position_P].astype(np.float64)
        keep = (1 - 1 / WINDOW) ** np.count_nonzero(precision_P)
        weight_P, product_P = precision_P / noise_P, residual_P * mean_P
        self._products.add(product_P, weight_P, keep)
        self._squares.add((weight_P * product_P) ** 2, keep=keep**2)
        total_P = precision_P + 1 / noise_P
        self.num_known += int(np.count_nonzero(self._seen_A[position_P] == 0))
        self._mean_A[position_P] = (precision_P * mean_P + residual_P / noise_P) / total_P
        self._sharpness_A[position_P] = np.sqrt(total_P)
        self._seen_A[position_P] = step

    def state(self) -> dict[str, Any]:
        """Return the problems measured so far; the others have nothing to keep."""
        known = np.flatnonzero(self._seen_A)
        columns = {"mean": self._mean_A, "sharpness": self._sharpness_A, "seen": self._seen_A}
        kept = {name: column_A[known] for name, column_A in columns.items()}
        return {
            "position": known.astype(np.int32),
            **kept,
            **{name: moment.state() for name, moment in self._moments.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        known, num_problems = state["position"], len(self._seen_A)
        self._mean_A = np.zeros(num_problems, dtype=np.float32)
        self._sharpness_A, self._seen_A = np.zeros_like(self._mean_A), np.zeros(num_problems, dtype=np.int32)
        for column_A, name in ((self._mean_A, "mean"), (self._sharpness_A, "sharpness"), (self._seen_A, "seen")):
            column_A[known] = state[name]
        self.num_known = len(known)
        for name, moment in self._moments.items():
            moment.restore(state[name])

    @property
    def _moments(self) -> dict[str, RunningMean]:
        return {"products": self._products, "squares": self._squares}

    def _precision(self, position_P: np.ndarray, step: int) -> np.ndarray:
        """Return what is known of each u without tau^2, as 1 / variance, aged to `step`."""
        age_P = np.maximum(step - self._seen_A[position_P], 0)
        return self._keep**age_P * self._sharpness_A[position_P].astype(np.float64) ** 2
