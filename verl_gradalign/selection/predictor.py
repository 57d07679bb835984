# SPDX-License-Identifier: Apache-2.0
"""The forecast of one quantity, y = s (x . w + u + e): this module knows e, others s (`scales`), w and u.

    predictor = Predictor(prior_F, num_problems, memory=20, is_scaled=True)
    predictor.learn(step, position_P, values_PF, y_P, error_P)
    mean_P, variance_P = predictor.predict(step, position_P, values_PF)

s is how large y is for this kind of problem, or 1: of a kind that is solved y is nearly always 0, and so is its error,
and what a direction's error makes of it. `regression` knows w, `own_part` u, in units of s.

The prior of w is in units of y's size without its noise, so nothing depends on the unit of y, and a narrow feature is
narrow beside what there is to explain: where single measurements are nearly all noise, a prior as wide as these would
let each feature's own noise choose. y^2 less the noise says how large y is without it only within an error, which is
added: the prior is wide at first.

The noise of e is the standard error that came with y, drawn half-way (of its square) to the typical one: errors are
measured from a few responses, and those that came out small by luck would count for too much (Smyth 2004 draws
variances to a common one likewise). What residuals vary beyond that is added to all of them.

Shape legend: P measurements of a step, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from verl_gradalign.selection.own_part import WINDOW, OwnParts
from verl_gradalign.selection.regression import Belief, Fit, Regression
from verl_gradalign.selection.running_mean import RunningMean
from verl_gradalign.selection.scales import NO_SIZE, Scales

OUTLIER = 6.0
"""Sizes of y beyond which a value, or an error, is drawn in to there: gradients spike, and one that is a hundred times
as large as the others would be all that is remembered."""
NORMAL = 1.4826
"""Standard deviation over median absolute value of normal numbers: the size of the very first values."""
LEAST_ERROR = 0.01
"""Sizes of y that any measurement is uncertain by: of equal responses the standard error is 0."""
MOMENTS = ("square", "noise", "error", "excess", "spread", "left_by_features", "left_by_all")


class Predictor:
    """What is known of one quantity of all problems, which are known here by their position.

    Args:
        prior_F: prior standard deviation of each feature's weight, in sizes of y.
        memory: steps after which a measurement weighs a third.
        is_scaled: whether kinds of problems differ in how large y is. If not, s is 1.
    """

    def __init__(self, prior_F: np.ndarray, num_problems: int, memory: float, is_scaled: bool = False) -> None:
        self.prior_F = prior_F
        self._scales = Scales(len(prior_F)) if is_scaled else None
        self.own = OwnParts(num_problems, memory)
        self._keep = 1 - 1 / memory
        self._regression = Regression(len(prior_F))
        self._moment = {name: RunningMean() for name in MOMENTS}
        """Of y^2, the measured part of it that is noise, standard errors, e^2 beyond these, all in units of s; and what
        is left of y^2 around a step's mean: at first, less what the features had forecast, less the own part too."""
        self._step = 0

    @property
    def is_known(self) -> bool:
        """Whether anything was learnt."""
        return self._moment["square"].mean > NO_SIZE

    @property
    def size(self) -> float:
        """Return the root mean square of y / s; nan where nothing is known."""
        return self._moment["square"].mean ** 0.5

    @property
    def prior_variance(self) -> float:
        """Return y^2 less its measured noise, and one standard error more."""
        square, noise = self._moment["square"], self._moment["noise"]
        error = square.mean * (2 / square.weight) ** 0.5
        return min(square.mean, max(0.0, square.mean - noise.mean) + error)

    def belief(self) -> Belief:
        """Return w, for features multiplied by their priors."""
        return self._regression.belief(self.prior_variance)

    def predict(self, step: int, position_P: np.ndarray, values_PF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and the variance of s (x . w + u): what a measurement without noise would be."""
        x_PF, belief = values_PF * self.prior_F, self.belief()
        (mean_P, variance_P), scale_P = self.own.predict(position_P, step), self._scale(x_PF)
        return scale_P * (belief.mean(x_PF) + mean_P), scale_P**2 * (belief.variance(x_PF) + variance_P)

    def draw(self, step: int, position_P: np.ndarray, values_PF: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return s (x . w~ + m): one w~ from the posterior for all, of each u the mean."""
        x_PF, (mean_P, _) = values_PF * self.prior_F, self.own.predict(position_P, step)
        return self._scale(x_PF) * (x_PF @ self.belief().draw(rng) + mean_P)

    def learn(
        self,
        step: int,
        position_P: np.ndarray,
        values_PF: np.ndarray,
        y_P: np.ndarray,
        error_P: np.ndarray,
        is_fresh: bool = True,
    ) -> None:
        """Learn a step's measurements, all finite, no problem twice.

        Args:
            error_P: standard errors, nan where they are not known.
            is_fresh: whether the direction is another one than that of the measurements before.
        """
        keep = self._keep ** max(0, step - self._step)
        x_PF = values_PF * self.prior_F
        scale_P = self._learn_scale(x_PF, y_P, keep)
        y_P, error_P = self._drawn_in(y_P / scale_P, error_P / scale_P)
        self._step = max(step, self._step)
        is_live_P = np.isfinite(error_P)
        self._moment["square"].add(y_P**2, keep=keep)
        self._moment["noise"].add(np.where(is_live_P, error_P, 0.0) ** 2, keep=keep)
        self._moment["error"].add(error_P[is_live_P], keep=keep)
        self._regression.discount(keep)
        if not self.is_known:
            return
        prior_variance = self.prior_variance
        if is_fresh:
            self._regression.begin_refresh(prior_variance)
        own_P, own_variance_P = self.own.predict(position_P, step)
        self._note_explained(scale_P * y_P, scale_P * self.belief().mean(x_PF), scale_P * own_P, keep)
        known_P, target_P = self._noise(error_P) + own_variance_P, y_P - own_P
        fit = self._regression.fit(x_PF, target_P, known_P + self._excess, prior_variance)
        self._note_excess(fit, known_P + self._excess, known_P)
        noise_P = known_P + self._excess
        fit = self._regression.fit(x_PF, target_P, noise_P, prior_variance)
        self._regression.learn(x_PF, target_P, noise_P, prior_variance)
        self.own.learn(position_P, step, fit.residual_P + own_P, fit.variance_P - own_variance_P)

    def summary(self) -> dict[str, float]:
        """Return what is known of the quantity as a whole. Shares are of forecasts made before the measurement."""
        spread, by_features, by_all = (self._moment[name].mean for name in MOMENTS[-3:])
        of_spread = 1 / spread if spread > 0 else math.nan
        unit = self._scales.size if self._scales else 1.0
        common = self._regression.common_variance(self.prior_variance) if self.is_known else math.nan
        return {
            "explained_features": (spread - by_features) * of_spread,
            "explained_problems": (by_features - by_all) * of_spread,
            "tau": unit * self.own.variance**0.5,
            "size": unit * self.size,
            "excess": unit * self._excess**0.5,
            "common": unit * common**0.5,
            "known": float(self.own.num_known),
        }

    def state(self) -> dict[str, Any]:
        return {
            "prior": self.prior_F,
            "step": self._step,
            "own": self.own.state(),
            "regression": self._regression.state(),
            "scales": self._scales.state() if self._scales else None,
            "moments": {name: moment.state() for name, moment in self._moment.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = state["step"]
        self.own.restore(state["own"])
        self._regression.restore(state["regression"])
        if self._scales:
            self._scales.restore(state["scales"])
        for name, moment in self._moment.items():
            moment.restore(state["moments"][name])

    @property
    def _excess(self) -> float:
        """Return the variance of e beyond the measured one."""
        return max(0.0, self._moment["excess"].mean) if self._moment["excess"].weight else 0.0

    def _scale(self, x_PF: np.ndarray) -> np.ndarray:
        """Return s of problems."""
        return np.ones(len(x_PF)) if self._scales is None else self._scales.of(x_PF)

    def _learn_scale(self, x_PF: np.ndarray, y_P: np.ndarray, keep: float) -> np.ndarray:
        """Return s as it was before these measurements, and learn from them."""
        if self._scales is None:
            return np.ones(len(y_P))
        is_first = not self._scales.is_known
        size = _size_of_first(y_P) if is_first else self._scales.size
        scale_P = np.full(len(y_P), size or 1.0) if is_first else self._scales.of(x_PF)
        self._scales.learn(x_PF, np.clip(y_P, -OUTLIER * size, OUTLIER * size), keep)
        return scale_P

    def _drawn_in(self, y_P: np.ndarray, error_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return values and errors, none beyond what is an outlier."""
        size = self.size if self.is_known else _size_of_first(y_P)
        return np.clip(y_P, -OUTLIER * size, OUTLIER * size), np.minimum(error_P, OUTLIER * size)

    def _noise(self, error_P: np.ndarray) -> np.ndarray:
        """Return the variance of e, as it was measured."""
        size, error = self.size, self._moment["error"].mean
        typical = size if math.isnan(error) else error
        error_P = np.where(np.isfinite(error_P), error_P, typical)
        return np.maximum((error_P**2 + typical**2) / 2, (LEAST_ERROR * size) ** 2)

    def _note_excess(self, fit: Fit, noise_P: np.ndarray, known_P: np.ndarray) -> None:
        """Note how much residuals vary beyond their known noise; they were fitted with `noise_P`."""
        beyond_P = fit.residual_P**2 * noise_P / fit.variance_P - known_P
        self._moment["excess"].add(beyond_P, keep=(1 - 1 / WINDOW) ** len(beyond_P))

    def _note_explained(self, y_P: np.ndarray, by_features_P: np.ndarray, own_P: np.ndarray, keep: float) -> None:
        """Note what is left of a step's spread around its mean: levels move with the direction, and rank nothing."""
        left = {
            "spread": y_P,
            "left_by_features": y_P - by_features_P,
            "left_by_all": y_P - by_features_P - own_P,
        }
        for name, left_P in left.items():
            self._moment[name].add((left_P - left_P.mean()) ** 2, keep=keep)


def _size_of_first(y_P: np.ndarray) -> float:
    """Return the size of the very first values: 0 of zeros alone."""
    return NORMAL * float(np.median(np.abs(y_P[y_P != 0]))) if y_P.any() else 0.0
