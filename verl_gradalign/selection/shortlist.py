# SPDX-License-Identifier: Apache-2.0
"""Uniform draws from the problems that are not resting, in time that does not grow with the pool but for one glance.

    draws = RestingPool(num_problems, rest=5)
    position_S = draws.draw(rng, step, 512)
    draws.note(position_S[:128], step)         # these were picked, and rest

Shape legend: A all problems, S drawn ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

NONE = np.zeros(0, dtype=np.int64)


class RestingPool:
    """When each problem was last picked, 4 bytes a problem, touched only then.

    Args:
        rest: steps between two steps that a problem is picked in, 0 or more.
    """

    def __init__(self, num_problems: int, rest: int) -> None:
        self._picked_A = np.zeros(num_problems, dtype=np.int32)
        """Step that it was last picked in; 0: never."""
        self._rest = rest

    def draw(self, rng: np.random.Generator, step: int, num: int, without: np.ndarray = NONE) -> np.ndarray:
        """Return `num` distinct problems, in random order, none of `without`; fewer if there are no more.

        Uniform among those awake; where these are too few, all of them and those that rest longest.
        """
        resting = self.resting(step)
        barred = np.union1d(resting, without)
        num_awake = len(self._picked_A) - len(barred)
        place_S = rng.choice(num_awake, min(num, num_awake), replace=False)
        # barred[k] - k awake problems stand before barred[k], so the one at a place comes after all k with no more.
        awake_S = place_S + np.searchsorted(barred - np.arange(len(barred)), place_S, side="right")
        if len(awake_S) == num:
            return awake_S
        tired = rng.permutation(np.setdiff1d(resting, without))
        tired = tired[np.argsort(self._picked_A[tired], kind="stable")]
        return rng.permutation(np.concatenate([awake_S, tired[: num - len(awake_S)]]))

    def note(self, position_S: np.ndarray, step: int) -> None:
        """Let these rest from `step` on."""
        self._picked_A[position_S] = step

    def resting(self, step: int) -> np.ndarray:
        """Return the problems that may not be picked in `step`, ascending."""
        return np.flatnonzero(self._picked_A >= max(step - self._rest, 1))

    def state(self) -> dict[str, Any]:
        picked = np.flatnonzero(self._picked_A)
        return {"position": picked.astype(np.int32), "step": self._picked_A[picked]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._picked_A = np.zeros_like(self._picked_A)
        self._picked_A[state["position"]] = state["step"]
