# SPDX-License-Identifier: Apache-2.0
"""What earlier selections saw of each problem: how often it was scored, and the mean of its scores.

    record = ProblemRecord(num_problems)
    score_P = record.shrunk(problem_id_P, score_P, shrinkage=0.5)
    record.add(problem_id_P, score_P)

Shape legend: P problems of a selection, A all problems of the train files.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ProblemRecord"]

COLUMNS = {"count": np.int32, "mean": np.float64}


class ProblemRecord:
    """Running statistics by row of the train files. 12 bytes a problem."""

    def __init__(self, num_problems: int) -> None:
        self._columns = {name: np.zeros(num_problems, dtype=dtype) for name, dtype in COLUMNS.items()}

    def __len__(self) -> int:
        return len(self.count_A)

    @property
    def count_A(self) -> np.ndarray:
        """Times each problem was given a finite score, int32."""
        return self._columns["count"]

    @property
    def mean_A(self) -> np.ndarray:
        """Mean of each problem's scores, 0 where there are none."""
        return self._columns["mean"]

    def add(self, problem_id_P: np.ndarray, score_P: np.ndarray) -> None:
        """Note a selection's scores, each problem once. Scores that are not finite are left out."""
        is_known_P = np.isfinite(score_P)
        ids, score_P = problem_id_P[is_known_P], score_P[is_known_P]
        self._columns["count"][ids] += 1
        self._columns["mean"][ids] += (score_P - self.mean_A[ids]) / self.count_A[ids]

    def shrunk(self, problem_id_P: np.ndarray, score_P: np.ndarray, shrinkage: float) -> np.ndarray:
        """Return each score drawn to the mean of the problem's k earlier ones, by shrinkage * k / (k + 1).

        With shrinkage 1 that is the running mean. Problems never scored before, and scores that are not finite, stay.
        """
        if shrinkage == 0:
            return score_P
        count_P = self.count_A[problem_id_P]
        weight_P = shrinkage * count_P / (count_P + 1)
        return np.where(np.isfinite(score_P), (1 - weight_P) * score_P + weight_P * self.mean_A[problem_id_P], score_P)

    def state(self) -> dict[str, Any]:
        """Return the columns, for the checkpoint."""
        return dict(self._columns)

    def restore(self, state: dict[str, Any]) -> None:
        """Take the columns of a checkpoint; earlier versions wrote more.

        Raises: ValueError if they are of another number of problems.
        """
        for name, dtype in COLUMNS.items():
            values = np.asarray(state[name], dtype=dtype)
            if values.shape != self.count_A.shape:
                raise ValueError(f"the record holds {len(values)} problems, the train files {len(self)}")
            self._columns[name] = values.copy()
