# SPDX-License-Identifier: Apache-2.0
"""Many numbers of a problem made few: a projection fitted once and then held, and the results, kept by problem.

    measured = Projected("text", measure, pool_ids, num=32, seed=0)
    values_SK = measured.of(problem_ids, step)      # measures what is not there yet

Shape legend: S problems, D numbers measured of each, K numbers kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_gradalign.selection.features import narrow_prior

SAMPLE = 256
"""Problems that a projection is fitted on, at least, as far as the pool has them."""
PER_NUMBER = 2
"""Problems of the sample for each number kept, at least: fewer would shape it after chance."""
LARGEST = 4.0
"""Bound of a projected number, in standard deviations of the sample: no odd problem decides a regression."""
SPARE, NUM_ITERATIONS = 10, 8
"""Of the randomised decomposition: directions beside those wanted, and rounds of subspace iteration."""
CONSTANT = 1e-5
"""A spread that is rounding: as a share of a column's size, or of the largest direction's."""

Measure = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Projection:
    """Principal components of a sample, each with mean 0 and variance 1 over it."""

    mean_D: np.ndarray
    axes_DK: np.ndarray
    """float32, standardisation and whitening included."""

    @classmethod
    def fit(cls, values_SD: np.ndarray, num: int, seed: int, is_standardised: bool = True) -> Projection:
        """Return the projection to `num` numbers, or as many as the sample has directions for; possibly none.

        `is_standardised`: whether every column counts alike, whatever its spread.

        Source: randomised subspace iteration, Halko et al. 2011 (arXiv 0909.4061) sec. 4.5.
        """
        mean_D = values_SD.mean(axis=0, dtype=np.float64)
        centred_SD = (values_SD - mean_D).astype(np.float32)
        spread_D = np.sqrt(np.square(centred_SD).mean(axis=0, dtype=np.float64))
        varies_D = spread_D > CONSTANT * np.abs(mean_D)
        scale_D = np.where(varies_D, spread_D, 1) if is_standardised else np.ones_like(spread_D)
        factor_D = (varies_D / scale_D).astype(np.float32)
        direction_DK, deviation_K = _principal(centred_SD * factor_D, num, seed)
        num = min(num, len(values_SD) // PER_NUMBER, int((deviation_K > CONSTANT * deviation_K.max(initial=0)).sum()))
        axes_DK = factor_D[:, None] * direction_DK[:, :num] / deviation_K[:num]
        return cls(mean_D.astype(np.float32), axes_DK.astype(np.float32))

    def __call__(self, values_SD: np.ndarray) -> np.ndarray:
        """Return the projected numbers, float32 (problems, numbers), at most LARGEST from 0."""
        projected_SK = (values_SD.astype(np.float32) - self.mean_D) @ self.axes_DK
        return np.clip(projected_SK, -LARGEST, LARGEST)


def _principal(values_SD: np.ndarray, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest directions of centred values, (D, K), and the standard deviations along them, (K,)."""
    width = min(num + SPARE, *values_SD.shape)
    basis_SW = np.random.default_rng(seed).standard_normal((len(values_SD), width), dtype=np.float32)
    for _ in range(NUM_ITERATIONS):
        basis_SW = np.linalg.qr(values_SD @ (values_SD.T @ basis_SW))[0]
    _, size_W, direction_WD = np.linalg.svd(basis_SW.T @ values_SD, full_matrices=False)
    return direction_WD.T, size_W / np.sqrt(len(values_SD))


class Projected:
    """Projected numbers of problems, measured when they are first asked for, and kept.

    The projection is fitted on the first problems asked for, with others of the pool at random where these are few.
    About 100 bytes a problem that was asked for, and 4 to 6 a number; in the checkpoint 12, and 4.

    Args:
        name: as in forecast.features.
        measure: gives the numbers of problems, (problems, D).
        pool: ids of all problems.
        num: numbers kept of each, at most.
        seed: of the sample and of the decomposition.
        interval: steps after which a problem is measured anew. None: never.
        is_standardised: see `Projection.fit`.
    """

    def __init__(
        self,
        name: str,
        measure: Measure,
        pool: np.ndarray,
        num: int,
        seed: int,
        interval: int | None = None,
        is_standardised: bool = True,
    ) -> None:
        self._name, self._measure, self._pool, self._num, self._seed = name, measure, pool, num, seed
        self._interval, self._is_standardised = interval, is_standardised
        self._projection: Projection | None = None
        self._row_of: dict[int, int] = {}
        self._value_RK = np.zeros((0, 0), dtype=np.float32)
        """Of the problems in `_row_of`, with room for more."""
        self._step_R = np.zeros(0, dtype=np.int32)

    def of(self, problem_ids: np.ndarray, step: int) -> np.ndarray:
        """Return the problems' numbers, float64 (problems, K); K stays what it was in the first call.

        Raises: ValueError, naming the problem, if it cannot be measured.
        """
        missing = self._missing(problem_ids, step)
        if self._projection is None:
            missing = np.concatenate([missing, self._others(missing)])
        if len(missing):
            values_SD = self._checked(missing, np.asarray(self._measure(missing)))
            if self._projection is None:
                self._projection = Projection.fit(values_SD, self._num, self._seed, self._is_standardised)
            self._keep(missing, self._projection(values_SD), step)
        rows = [self._row_of[problem_id] for problem_id in problem_ids.tolist()]
        return self._value_RK[rows].astype(np.float64)

    @property
    def prior_K(self) -> np.ndarray:
        """Return the prior standard deviation of each number's weight; none before the first call."""
        return narrow_prior(self._value_RK.shape[1])

    def _missing(self, problem_ids: np.ndarray, step: int) -> np.ndarray:
        """Return the problems that are not kept, or for too long, each once."""

        def is_missing(problem_id: int) -> bool:
            row = self._row_of.get(problem_id)
            return row is None or (self._interval is not None and step - int(self._step_R[row]) >= self._interval)

        ids = dict.fromkeys(problem_ids.tolist())
        return np.array([problem_id for problem_id in ids if is_missing(problem_id)], dtype=np.int64)

    def _others(self, problem_ids: np.ndarray) -> np.ndarray:
        """Return more problems of the pool, at random, where there are few."""
        draws = np.random.default_rng(self._seed).choice(self._pool, min(SAMPLE, len(self._pool)), replace=False)
        others: np.ndarray = draws[~np.isin(draws, problem_ids)]
        return others[: max(0, SAMPLE - len(problem_ids))]

    def _checked(self, problem_ids: np.ndarray, values_SD: np.ndarray) -> np.ndarray:
        """Return the numbers measured. Raises ValueError, naming the problem, if one is not finite or D is another."""
        key, remedy = "gradalign.forecast.features", f"Remedy: take {self._name} out, or mend it"
        is_finite_S = np.isfinite(values_SD).all(axis=1)
        if not is_finite_S.all():
            problem_id = problem_ids[int(np.argmin(is_finite_S))]
            raise ValueError(f"{key}: {self._name} of problem {problem_id} is not finite. {remedy}.")
        if self._projection is not None and values_SD.shape[1] != len(self._projection.mean_D):
            now, before = values_SD.shape[1], len(self._projection.mean_D)
            raise ValueError(f"{key}: {self._name} gave {before} numbers a problem before, and {now} now. {remedy}.")
        return values_SD

    def _keep(self, problem_ids: np.ndarray, values_SK: np.ndarray, step: int) -> None:
        for problem_id in problem_ids.tolist():
            self._row_of.setdefault(problem_id, len(self._row_of))
        num, room = len(self._row_of), len(self._step_R)
        if num > room:
            # By half as much again: added one by one, each would copy all before it.
            grown = num + num // 2
            value_RK, step_R = np.zeros((grown, values_SK.shape[1]), np.float32), np.zeros(grown, np.int32)
            if room:
                value_RK[:room], step_R[:room] = self._value_RK, self._step_R
            self._value_RK, self._step_R = value_RK, step_R
        rows = [self._row_of[problem_id] for problem_id in problem_ids.tolist()]
        self._value_RK[rows], self._step_R[rows] = values_SK, step

    def state(self) -> dict[str, Any]:
        """Return the projection and what is kept, for the checkpoint: a resumed run has the same numbers."""
        if self._projection is None:
            return {}
        num = len(self._row_of)
        return {
            "mean": self._projection.mean_D,
            "axes": self._projection.axes_DK,
            "problem_ids": np.fromiter(self._row_of, dtype=np.int64, count=num),
            "values": self._value_RK[:num],
            "steps": self._step_R[:num],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        if not state:
            return
        self._projection = Projection(state["mean"], state["axes"])
        self._row_of = {problem_id: row for row, problem_id in enumerate(state["problem_ids"].tolist())}
        self._value_RK, self._step_R = state["values"].copy(), state["steps"].copy()
