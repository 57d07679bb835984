# SPDX-License-Identifier: Apache-2.0
"""Bayesian linear regression that forgets, and that does not take one wrong direction for many measurements.

The model of a measurement made along the direction of refresh r:  y = x . (w + eta_r) + e,  e ~ N(0, noise),
w ~ N(0, prior_variance I),  eta_r ~ N(0, omega^2 I): the features arrive multiplied by their prior widths.

Why eta: y is <g, v> and v has an error, the same one in everything that is measured along it. A gradient's product
with that error is, as far as the features know the gradient, linear in them: an error of w that all measurements of a
refresh share, and that no number of them averages out. With A = X' R^-1 X, what a refresh says of w is therefore worth
(A^-1 + omega^2 I)^-1 = A (I + omega^2 A)^-1, at most 1 / omega^2 in any direction, and not A, which grows with the
batch. eta has the shape of the prior, as nothing is known of v's error but that it may be of any kind of problem.
omega^2 is measured: by how much a refresh's estimate differs from what the earlier ones said, beyond the noise of both.

    regression.discount(0.95)
    regression.begin_refresh()
    fit = regression.fit(x_PF, y_P, noise_P, prior_variance)   # changes nothing
    regression.learn(x_PF, y_P, noise_P, prior_variance)
    belief = regression.belief(prior_variance)

Shape legend: P measurements of a step, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.linalg import inv, solve

from verl_gradalign.selection.running_mean import RunningMean

PRIOR_SHARE_KNOWN = 0.1
"""omega^2 is measured where the earlier refreshes left no more than this share of the prior variance: where they left
more, the prior's own error would be taken for agreement."""
FIRST_COMMON_SHARE = 0.25
"""omega^2 over the prior variance before it was measured, with the weight of one rough value: the first direction may
be a wrong one, and what it said is remembered as long as what the others say."""
LEAST_OWN = 1e-9
"""Share of a measurement that its own fit leaves to it, at least: rounding must not make it 0."""


@dataclass(frozen=True)
class Belief:
    """w, as far as it is known."""

    mean_F: np.ndarray
    covariance_FF: np.ndarray

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return one w from the posterior."""
        return self.mean_F + np.linalg.cholesky(self.covariance_FF) @ rng.standard_normal(len(self.mean_F))

    def mean(self, x_PF: np.ndarray) -> np.ndarray:
        return x_PF @ self.mean_F

    def variance(self, x_PF: np.ndarray) -> np.ndarray:
        return ((x_PF @ self.covariance_FF) * x_PF).sum(axis=1)


@dataclass(frozen=True)
class Fit:
    """How a step's measurements look beside each other."""

    residual_P: np.ndarray
    """y less what everything else, this step's other measurements included, says of it."""
    variance_P: np.ndarray
    """What that residual's variance should be, the measurement's own noise included."""


@dataclass(frozen=True)
class Information:
    """What measurements say of w: the inverse of a covariance, and its product with the estimate."""

    matrix_FF: np.ndarray
    vector_F: np.ndarray

    def __add__(self, other: Information) -> Information:
        return Information(self.matrix_FF + other.matrix_FF, self.vector_F + other.vector_F)

    def scaled(self, factor: float) -> Information:
        return Information(factor * self.matrix_FF, factor * self.vector_F)

    def with_common_error(self, variance: float) -> Information:
        """Return what is left of it when all of it shares one error of w, of this variance in every direction."""
        shrink_FF = np.eye(len(self.vector_F)) + variance * self.matrix_FF
        return Information(_symmetric(solve(shrink_FF, self.matrix_FF)), solve(shrink_FF, self.vector_F))

    def state(self) -> dict[str, np.ndarray]:
        return {"matrix": self.matrix_FF, "vector": self.vector_F}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Information:
        return cls(np.asarray(state["matrix"]), np.asarray(state["vector"]))


def nothing(num_features: int) -> Information:
    return Information(np.zeros((num_features, num_features)), np.zeros(num_features))


def information_of(x_PF: np.ndarray, y_P: np.ndarray, noise_P: np.ndarray) -> Information:
    weighted_PF = x_PF / noise_P[:, None]
    return Information(_symmetric(weighted_PF.T @ x_PF), weighted_PF.T @ y_P)


class Regression:
    """The information of all refreshes so far; that of the present one apart, as its common error counts once."""

    def __init__(self, num_features: int) -> None:
        self._past, self._present = nothing(num_features), nothing(num_features)
        self._common = RunningMean()

    def discount(self, keep: float) -> None:
        """Let everything known count `keep` times as much: w moves with the policy."""
        self._past, self._present = self._past.scaled(keep), self._present.scaled(keep)
        self._common = RunningMean(keep * self._common.total, keep * self._common.weight)

    def common_variance(self, prior_variance: float) -> float:
        """Return omega^2."""
        first = RunningMean()
        first.add(np.array([FIRST_COMMON_SHARE * prior_variance]), prior_variance**-2)
        total, weight = first.total + self._common.total, first.weight + self._common.weight
        return max(0.0, total / weight)

    def begin_refresh(self, prior_variance: float) -> None:
        """Take what comes as measured along another direction than what came before."""
        self._past += self._present.with_common_error(self.common_variance(prior_variance))
        self._present = nothing(len(self._past.vector_F))

    def belief(self, prior_variance: float) -> Belief:
        """Return w after all that was learnt."""
        common = self.common_variance(prior_variance)
        return belief_of(self._past + self._present.with_common_error(common), prior_variance)

    def fit(self, x_PF: np.ndarray, y_P: np.ndarray, noise_P: np.ndarray, prior_variance: float) -> Fit:
        """Return each measurement's residual from the fit of all others, and the variance it should have."""
        belief = belief_of(self._past, prior_variance)
        common_FF = self.common_variance(prior_variance) * np.eye(len(belief.mean_F))
        before_FF = inv(belief.covariance_FF + common_FF)
        step = self._present + information_of(x_PF, y_P, noise_P)
        covariance_FF = _symmetric(inv(before_FF + step.matrix_FF))
        mean_F = covariance_FF @ (before_FF @ belief.mean_F + step.vector_F)
        leverage_P = Belief(mean_F, covariance_FF).variance(x_PF) / noise_P
        is_own_P = np.maximum(1 - leverage_P, LEAST_OWN)
        return Fit((y_P - x_PF @ mean_F) / is_own_P, noise_P / is_own_P)

    def learn(self, x_PF: np.ndarray, y_P: np.ndarray, noise_P: np.ndarray, prior_variance: float) -> None:
        """Add a step's measurements, which are along the present refresh's direction."""
        if not self._present.matrix_FF.any():
            self._note_common(x_PF, y_P, noise_P, prior_variance)
        self._present += information_of(x_PF, y_P, noise_P)

    def state(self) -> dict[str, Any]:
        parts = {"past": self._past.state(), "present": self._present.state()}
        return {**parts, "common": self._common.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._past, self._present = (Information.restored(state[name]) for name in ("past", "present"))
        self._common.restore(state["common"])

    def _note_common(self, x_PF: np.ndarray, y_P: np.ndarray, noise_P: np.ndarray, prior_variance: float) -> None:
        """Compare a refresh's own estimate with the earlier ones', in directions in which measurements are independent.

        Along an eigenvector of A with eigenvalue a the difference has the variance 1 / a + P + omega^2, P being what
        the earlier ones leave open. Weighted by 1 / variance^2, as values that are squares of a normal error should be.
        """
        belief = belief_of(self._past, prior_variance)
        surprise = information_of(x_PF, y_P - belief.mean(x_PF), noise_P)
        a_F, axes_FF = np.linalg.eigh(surprise.matrix_FF)
        open_F = belief.variance(axes_FF.T)
        is_known_F = (a_F > 1 / prior_variance) & (open_F <= PRIOR_SHARE_KNOWN * prior_variance)
        a_K, expected_K = a_F[is_known_F], 1 / a_F[is_known_F] + open_F[is_known_F]
        difference_K = (axes_FF.T @ surprise.vector_F)[is_known_F] / a_K
        variance_K = expected_K + self.common_variance(prior_variance)
        self._common.add(difference_K**2 - expected_K, variance_K**-2.0)


def belief_of(information: Information, prior_variance: float) -> Belief:
    """Return what is known of w, by the information and the prior."""
    precision_FF = information.matrix_FF + np.eye(len(information.vector_F)) / prior_variance
    covariance_FF = _symmetric(inv(precision_FF))
    return Belief(covariance_FF @ information.vector_F, covariance_FF)


def _symmetric(matrix_FF: np.ndarray) -> np.ndarray:
    """Return the matrix without the rounding that makes it differ from its transpose."""
    return (matrix_FF + matrix_FF.T) / 2
