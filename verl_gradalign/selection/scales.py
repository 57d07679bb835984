# SPDX-License-Identifier: Apache-2.0
"""How large a quantity is for different kinds of problems: its root mean square, as far as features tell it.

    scales = Scales(num_features)
    scale_P = scales.of(x_PF)
    scales.learn(x_PF, y_P, keep=0.95)

A kind that is solved has scores of 0 nearly always, one that is learnt now has scores a hundred times as large, and so
have their errors. A forecast that takes all for equally noisy believes the first to be as uncertain as the second, and
explores it for ever.

log s^2 is linear in the features: s^2 is a mean of squares, whose relative error is the same for small ones and large
ones. One Newton step of that model for each step's measurements (McCullagh and Nelder 1989, ch. 8: gamma, log link).

Shape legend: P measurements, F features, each multiplied by its prior width.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from verl_gradalign.selection.regression import Information, belief_of, information_of, nothing
from verl_gradalign.selection.running_mean import RunningMean

PRIOR_VARIANCE = 4.0
"""Of a kind's log s^2: a factor of seven is one standard deviation."""
NOISE = 8.0
"""Variance of a square around its mean, in squares of the mean: 2 for normal numbers, and gradients have long tails."""
MOST = 8.0
"""A square this many times as large as expected counts as that, and not more."""
NO_SIZE = 1e-100
"""A mean of y^2 below which there is nothing to compare with: of zeros alone, or after thousands of steps of them."""
LEAST = 0.03
"""Scale of a kind, at least, in sizes of all: one that is all zeros may wake up."""
FASTER = 3
"""How many times as fast as the rest sizes are forgotten: they are known from fewer values, and a source that was
repaired is found again the sooner."""


class Scales:
    """The root mean square by features, and of all."""

    def __init__(self, num_features: int) -> None:
        self._square = RunningMean()
        self._information = nothing(num_features)

    @property
    def size(self) -> float:
        """Return the root mean square of all; nan before anything was learnt."""
        return self._square.mean**0.5

    @property
    def is_known(self) -> bool:
        """Whether anything but zeros was learnt."""
        return self._square.mean > NO_SIZE

    def of(self, x_PF: np.ndarray) -> np.ndarray:
        """Return the scale of problems with these features."""
        log_P = belief_of(self._information, PRIOR_VARIANCE).mean(x_PF)
        return self.size * np.maximum(np.exp(log_P / 2), LEAST)

    def learn(self, x_PF: np.ndarray, y_P: np.ndarray, keep: float) -> None:
        """Learn a step's values; what else is remembered counts `keep` times as much with them as before."""
        self._square.add(y_P**2, keep=keep)
        self._information = self._information.scaled(keep**FASTER)
        if not self.is_known:
            return
        scale_P = self.of(x_PF)
        surprise_P = np.minimum((y_P / scale_P) ** 2 - 1, MOST)
        target_P = 2 * np.log(scale_P / self.size) + surprise_P
        self._information += information_of(x_PF, target_P, np.full(len(y_P), NOISE))

    def state(self) -> dict[str, Any]:
        return {"square": self._square.state(), "information": self._information.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._square.restore(state["square"])
        self._information = Information.restored(state["information"])
