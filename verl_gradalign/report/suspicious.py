# SPDX-License-Identifier: Apache-2.0
"""Problems whose alignment is persistently negative, or is not there although it could have been seen.

Each problem's mean alignment m over its occurrences has a standard error, from the finite number of its responses. A
problem that was met once has an error of one degree of freedom where only halves of its responses were compared, so its
variance is drawn to the run's mean, which counts as PRIOR_FREEDOM degrees more: problems of a run are about alike in
this, and one that is taken for exact by chance is not suspicious for it.

The 95% interval (Student's t) lies below zero: `negative`. It contains zero, but not the typical alignment of the pool:
`noise-like`, what a coin-flip reward looks like. Any other is in order, or not measured well enough to say.

    suspects = find_suspects(sums, sources)
    print(suspects.table["problem_id"], suspects.expected_by_chance)

Shape legend: P problems, M measured problems.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from verl_gradalign.report.tallies import ProblemSums
from verl_gradalign.student import Z_95, student_t

PRIOR_FREEDOM = 4
"""Of the mean variance of a run's problems, in a problem's own: a normal-gamma prior, fixed instead of fitted.
Source: Smyth 2004, Linear models and empirical Bayes methods, eq. 3."""
MIN_REPEATS = 3
NEGATIVE = "negative"
NOISE_LIKE = "noise-like"


@dataclass(frozen=True)
class Suspects:
    """What was found, and how much of it would be found in a pool without fault."""

    is_cosine: bool
    typical: float
    """Median alignment of the measured problems; nan of none."""
    expected_by_chance: float
    """How many would look suspicious if problems lay below the typical alignment only as far as others lie above it,
    by their own differences and by measurement error."""
    mean_M: np.ndarray
    """Mean alignments of all problems whose alignment and standard error are known."""
    table: pa.Table
    """A row per suspect, the farthest from the typical alignment first; columns as in the summary. `kind`: negative or
    noise-like; `distance`: (m - typical) / standard error, below zero, drawn in where the error is poorly known."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def num_measured(self) -> int:
        return len(self.mean_M)

    @property
    def unit(self) -> str:
        return "cosine" if self.is_cosine else "dot product"

    @property
    def num_negative(self) -> int:
        return self.table["kind"].to_pylist().count(NEGATIVE)

    @property
    def negative_if_none_aligned(self) -> float:
        """How many would look negative if no problem were aligned at all."""
        return 0.025 * self.num_measured


def find_suspects(sums: ProblemSums, sources: Sequence[str]) -> Suspects:
    """Return the suspicious ones among the problems. `sources`: the data sources' names, by the numbers in `sums`."""
    problems = sums.table()
    columns = {name: column.to_numpy() for name, column in zip(problems.column_names, problems.columns, strict=True)}
    mean_P, error_P, width_P = _estimates(columns)
    is_measured_P = np.isfinite(error_P)
    mean, error, width = (a[is_measured_P] for a in (mean_P, error_P, width_P))
    typical = float(np.median(mean)) if len(mean) else float("nan")
    low, high = mean - width * error, mean + width * error
    is_negative = high < 0
    is_noise = (typical > 0) & (low <= 0) & (high >= 0) & (high < typical)
    # In standard errors as a normal distribution has them: a small error that is poorly known counts for less.
    distance = (mean - max(typical, 0.0)) / (error * width / Z_95) if len(mean) else mean
    chosen = np.flatnonzero(is_negative | is_noise)
    chosen = chosen[np.argsort(distance[chosen], kind="stable")]
    found = {name: column_P[is_measured_P][chosen] for name, column_P in columns.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        success_rate = found["success"] / found["num_rated"]
    table = {
        "problem_id": found["problem_id"],
        "kind": pa.array(np.where(is_negative[chosen], NEGATIVE, NOISE_LIKE), pa.string()),
        "data_source": pa.array(sources, pa.string()).take(pa.array(found["source"])),
        "alignment": mean[chosen],
        "standard_error": error[chosen],
        "low": low[chosen],
        "high": high[chosen],
        "distance": distance[chosen],
        "num_measured": found["num_measured"].astype(int),
        "num_negative": found["num_negative"].astype(int),
        "success_rate": success_rate,
        "num_kept": found["num_kept"].astype(int),
    }
    expected = _expected(typical, mean, error, width)
    return Suspects(sums.is_cosine is not False, typical, expected, mean, pa.table(table))


def _estimates(sums: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each problem's mean alignment, its standard error (nan: not known), and the interval's half width in it.

    From the errors of single occurrences where they are known, else from the spread of at least three occurrences.
    """
    k_P, e_P, own_freedom_P = sums["num_measured"], sums["num_with_error"], sums["freedom"]
    with np.errstate(divide="ignore", invalid="ignore"):
        has_error_P = (e_P > 0) & (own_freedom_P > 0)
        common = sums["variance"].sum() / e_P.sum()
        known_P = PRIOR_FREEDOM * common + own_freedom_P * sums["variance"] / e_P
        from_errors_P = np.sqrt(known_P / (PRIOR_FREEDOM + own_freedom_P) / e_P)
        mean_P = np.where(has_error_P, sums["value_with_error"] / e_P, sums["value"] / k_P)
        spread_P = np.maximum(sums["square"] - sums["value"] ** 2 / k_P, 0) / (k_P - 1)
        is_repeated_P = (k_P >= MIN_REPEATS) & (spread_P > 0)
        from_spread_P = np.where(is_repeated_P, np.sqrt(spread_P / k_P), np.nan)
        error_P = np.where(has_error_P, from_errors_P, from_spread_P)
        freedom_P = np.where(has_error_P, PRIOR_FREEDOM + own_freedom_P, np.maximum(k_P - 1, 2))
        return mean_P, error_P, student_t(freedom_P)


def _expected(typical: float, mean: np.ndarray, error: np.ndarray, width: np.ndarray) -> float:
    """Return the expected number of suspects if the upper half of the alignments were mirrored at the typical one."""
    if not len(error) or not typical > 0:
        return 0.025 * len(error)
    # The estimated error makes it Student's t, which the interval's own width brings back to the normal, nearly.
    variance = (error * width / Z_95) ** 2
    is_above = mean >= typical
    own = max(0.0, float(np.mean((mean[is_above] - typical) ** 2 - variance[is_above])))
    spread = np.sqrt(variance + own)
    # Means up to here are suspicious: negative, or with an interval that leaves the typical alignment out and is not
    # wholly above zero.
    bound = np.maximum(np.minimum(typical - width * error, width * error), -width * error)
    return float(_normal((bound - typical) / spread).sum())


def _normal(z: np.ndarray) -> np.ndarray:
    """Return the normal distribution function, interpolated in a table: numpy has none, and errors are below 1e-6."""
    grid = np.linspace(-9, 9, 3601)
    table = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in grid])
    return np.interp(z, grid, table)
