# SPDX-License-Identifier: Apache-2.0
"""Does a forecast pay? What its picks were worth beside randomly drawn ones, from sums by step. Pure functions.

    lift = estimate(PickSums(num_forecast_S, sum_forecast_S, num_uniform_S, sum_uniform_S))
    lift.ratio, lift.low, lift.high, lift.pays
    print(lift.in_words())

Forecast and uniform picks of *one step* are compared, and the steps are the sample: the policy moves from step to step,
the share of uniform picks may change, and the error of a step's direction is common to all that it measured. If L is
the true ratio, then w (mean of the forecast picks - L x mean of the uniform ones) has mean zero in every step, whatever
the step's weight w; the interval holds every L that a t-test over the steps does not reject. That is Fieller's interval
with the covariance between both means. (Of a direction that is held for several steps the error is common to these, and
not accounted for.) It is bounded only where the mean of the uniform picks is clearly above zero;
elsewhere a ratio means nothing and the difference of the means is said. Both agree on the question that decides: the
ratio's interval holds 1 exactly where the difference's holds 0.

Source: Fieller 1954, Some problems in interval estimation. Coverage: tests/unit/test_lift.py.

Shape legend: S steps, K blocks of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from verl_gradalign.student import Z_90, student_t

MIN_BLOCKS = 10
"""Below it a spread over steps says little."""
MIN_PROBLEMS = 24
"""Of each kind, measured; below it no lift is given."""
ENOUGH = 96
"""Of each kind: from here on an interval that contains 1 means that the forecast does not pay."""
CLEARLY_SMALL = 1.5
"""A lift that a forecast is worth its trouble for: an interval that ends below it rules out that it pays much."""


@dataclass(frozen=True)
class PickSums:
    """How many picks of each kind were measured in each step, and the sum of what was measured of them."""

    num_forecast_S: np.ndarray
    sum_forecast_S: np.ndarray
    num_uniform_S: np.ndarray
    sum_uniform_S: np.ndarray

    @property
    def num_forecast(self) -> int:
        return int(self.num_forecast_S.sum())

    @property
    def num_uniform(self) -> int:
        return int(self.num_uniform_S.sum())

    def blocks(self) -> PickSums:
        """Return the sums of as few neighbouring steps each as have picks of both kinds; what is left over is added to
        the last block."""
        starts, start, pending = [], 0, np.zeros(2)
        for place, counts in enumerate(zip(self.num_forecast_S, self.num_uniform_S, strict=True)):
            pending = pending + counts
            if pending.all():
                starts.append(start)
                start, pending = place + 1, np.zeros(2)
        columns = (self.num_forecast_S, self.sum_forecast_S, self.num_uniform_S, self.sum_uniform_S)
        if not starts:
            return PickSums(*(column[:0] for column in columns))
        return PickSums(*(np.add.reduceat(np.asarray(column, dtype=float), starts) for column in columns))


@dataclass(frozen=True)
class Lift:
    """What forecast picks were worth beside uniform ones, with 90% intervals."""

    num_forecast: int
    """Forecast picks that were measured."""
    num_uniform: int
    mean_forecast: float
    """Score."""
    mean_uniform: float
    difference: float
    """mean_forecast - mean_uniform."""
    difference_low: float
    difference_high: float
    ratio: float
    """mean_forecast / mean_uniform; with its interval nan where the uniform picks' mean is not clearly above zero."""
    low: float
    high: float

    @property
    def pays(self) -> bool | None:
        """Whether forecast picks are worth more than uniform ones; None: too few were measured to deny it."""
        if self.difference_low > 0:
            return True
        return False if min(self.num_forecast, self.num_uniform) >= ENOUGH else None

    @property
    def has_ratio(self) -> bool:
        return not math.isnan(self.ratio)

    def in_words(self) -> str:
        """Return one sentence with the numbers."""
        counts = f"{self.num_forecast:,} and {self.num_uniform:,} problems"
        if self.has_ratio:
            what, value = f"score {self.ratio:.2f} times as high as randomly drawn ones", "1"
            interval = f"90% interval {self.low:.2f} to {self.high:.2f}"
        else:
            more = "higher" if self.difference >= 0 else "lower"
            what, value = f"score {abs(self.difference):.3g} {more} than randomly drawn ones", "0"
            interval = (
                f"90% interval of the difference {self.difference_low:.3g} to {self.difference_high:.3g}; the mean of "
                "the randomly drawn ones is not clearly above zero"
            )
        if self.pays:
            return f"The forecast pays: problems it chose {what} ({interval}; {counts})."
        if self.difference_high < 0:
            return f"The forecast chooses worse than chance: problems it chose {what} ({interval}; {counts})."
        if self.pays is None:
            beginning = "Whether the forecast pays cannot be said yet"
        elif self.has_ratio and self.high < CLEARLY_SMALL:
            beginning = "The forecast does not pay here"
        else:
            beginning = "It does not show that the forecast pays"
        chance = f"the interval holds {value}, so that may be chance"
        return f"{beginning}: problems it chose {what}; {chance} ({interval}; {counts})."


def estimate(sums: PickSums) -> Lift | None:
    """Return the lift over the steps, None while too little was measured to give one."""
    blocks = sums.blocks()
    num_blocks, scarcer = len(blocks.num_forecast_S), min(sums.num_forecast, sums.num_uniform)
    if num_blocks < MIN_BLOCKS or scarcer < MIN_PROBLEMS:
        return None
    # The weight under which the difference of two means has the least variance.
    weight_K = 1 / (1 / blocks.num_forecast_S + 1 / blocks.num_uniform_S)
    weight_K = weight_K / weight_K.mean()
    forecast_K = weight_K * blocks.sum_forecast_S / blocks.num_forecast_S
    uniform_K = weight_K * blocks.sum_uniform_S / blocks.num_uniform_S
    mean_forecast, mean_uniform = float(forecast_K.mean()), float(uniform_K.mean())
    width = float(student_t(np.array(num_blocks - 1.0), Z_90))
    covariance_22 = np.cov(forecast_K, uniform_K) / num_blocks * width**2
    difference = mean_forecast - mean_uniform
    half = math.sqrt(max(0.0, covariance_22[0, 0] - 2 * covariance_22[0, 1] + covariance_22[1, 1]))
    low, high = _ratio_interval(mean_forecast, mean_uniform, covariance_22)
    ratio = mean_forecast / mean_uniform if not math.isnan(low) else math.nan
    return Lift(
        sums.num_forecast, sums.num_uniform, mean_forecast, mean_uniform,
        difference, difference - half, difference + half, ratio, low, high,
    )  # fmt: skip


def _ratio_interval(top: float, bottom: float, covariance_22: np.ndarray) -> tuple[float, float]:
    """Return where (top - L bottom)^2 is at most its variance times the squared half width; nan if that is no bounded
    interval of a positive `bottom`."""
    square = bottom**2 - covariance_22[1, 1]
    if bottom <= 0 or square <= 0:
        return math.nan, math.nan
    middle = top * bottom - covariance_22[0, 1]
    root = math.sqrt(max(0.0, middle**2 - square * (top**2 - covariance_22[0, 0])))
    return float((middle - root) / square), float((middle + root) / square)
