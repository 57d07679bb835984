# SPDX-License-Identifier: Apache-2.0
"""A weighted mean that forgets: what came before counts less with everything that is added.

    size = RunningMean()
    size.add(values_P**2, keep=0.95)
    size.mean                     # nan before anything was added

Shape legend: P values.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass
class RunningMean:
    """The sum of weighted values, and of their weights."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, values_P: np.ndarray, weight_P: np.ndarray | float = 1.0, keep: float = 1.0) -> None:
        """Add values; what is there already counts `keep` times as much as before, from 0 to 1."""
        self.total = float(keep * self.total + np.sum(weight_P * values_P))
        self.weight = float(keep * self.weight + np.sum(np.broadcast_to(weight_P, np.shape(values_P))))

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight > 0 else math.nan

    def state(self) -> dict[str, float]:
        return asdict(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        self.total, self.weight = float(state["total"]), float(state["weight"])
