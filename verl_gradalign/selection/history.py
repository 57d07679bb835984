# SPDX-License-Identifier: Apache-2.0
"""What earlier selections saw of each problem: how often it was scored, and the mean of its scores.

    record = ProblemRecord(num_problems)
    score_P = record.shrunk(problem_id_P, score_P, shrinkage=0.5)
    record.add(problem_id_P, score_P)

Shape legend: P problems of a selection, A all problems of the train files.
"""

from typing import Any

import numpy as np


class ProblemRecord:
    """Running statistics by row of the train files, 12 bytes a problem."""

    def __init__(self, num_problems: int) -> None:
        self.count_A = np.zeros(num_problems, dtype=np.int32)
        """Times each problem was given a finite score."""
        self.mean_A = np.zeros(num_problems, dtype=np.float64)
        """Mean of each problem's scores, 0 where there are none."""

    def add(self, problem_id_P: np.ndarray, score_P: np.ndarray) -> None:
        """Note a selection's scores, each problem once. Scores that are not finite are left out."""
        is_known_P = np.isfinite(score_P)
        ids, score_P = problem_id_P[is_known_P], score_P[is_known_P]
        self.count_A[ids] += 1
        self.mean_A[ids] += (score_P - self.mean_A[ids]) / self.count_A[ids]

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
        return {"count": self.count_A, "mean": self.mean_A}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the columns of a checkpoint; earlier versions wrote more.

        Raises: ValueError if they are of another number of problems.
        """
        num, expected = len(state["count"]), len(self.count_A)
        if num != expected:
            raise ValueError(f"the record holds {num} problems, the train files {expected}")
        self.count_A, self.mean_A = np.array(state["count"], np.int32), np.array(state["mean"], np.float64)
