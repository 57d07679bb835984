# SPDX-License-Identifier: Apache-2.0
"""Sums over a selection table that is read in pieces: by step, by a column's values, and a random part of the rows.

Steps are put together in at most 400 bins, so that a tally's size does not depend on the log's.

    bins = StepBins(first=1, last=20_000)
    tally = StepTally(bins)
    for rows in reader.batches("selection"):
        tally.add(Rows.of(rows))

Shape legend: N rows of a piece, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from verl_gradalign.log.selection_log import EXTRA

__all__ = [
    "MetricTally",
    "PointSample",
    "Rows",
    "StepBins",
    "StepTally",
    "ValueTally",
    "alignment",
    "codes_of",
    "numbers_of",
    "texts_of",
]

MAX_BINS = 400
MAX_VALUES = 250
OTHERS = "(other values)"
UNKNOWN = "(none)"
SCHEDULED = "scheduled"
"""The reason of selection.select for what a schedule has put on a step."""


@dataclass(frozen=True)
class StepBins:
    """Neighbouring steps that are counted together."""

    first: int
    last: int

    @property
    def width(self) -> int:
        return -(-(self.last - self.first + 1) // MAX_BINS)

    def __len__(self) -> int:
        return -(-(self.last - self.first + 1) // self.width)

    def of(self, step_N: np.ndarray) -> np.ndarray:
        """Return the bins of steps."""
        return np.clip((step_N - self.first) // self.width, 0, len(self) - 1)

    @property
    def steps(self) -> np.ndarray:
        """The middle of each bin; the step itself where each has its own."""
        first_B = self.first + self.width * np.arange(len(self))
        return (first_B + np.minimum(first_B + self.width - 1, self.last)) / 2


@dataclass(frozen=True)
class Rows:
    """A piece of the selection table as arrays. nan: not known."""

    step_N: np.ndarray
    problem_id_N: np.ndarray
    is_kept_N: np.ndarray
    is_candidate_N: np.ndarray
    """Else put on the step by a schedule, so there was nothing to choose."""
    score_N: np.ndarray
    dot_N: np.ndarray
    norm_N: np.ndarray
    dot_error_N: np.ndarray
    freedom_N: np.ndarray
    """Degrees of freedom that dot_error is estimated with."""
    success_rate_N: np.ndarray
    tokens_N: np.ndarray
    num_responses_N: np.ndarray
    texts: dict[str, tuple[np.ndarray, list[str]]]
    """By column of text: positions (N,) in the list of values that follows."""

    @classmethod
    def of(cls, rows: pa.Table) -> Rows:
        score, dot, norm, error, freedom, rate, tokens, responses = (numbers_of(rows[name]) for name in NUMBERS)
        texts = {
            name: codes_of(rows[name])
            for name in rows.column_names
            if name in ("reason", "data_source") or name.startswith(EXTRA)
        }
        return cls(
            step_N=rows["step"].to_numpy(),
            problem_id_N=rows["problem_id"].to_numpy(),
            is_kept_N=pc.fill_null(rows["kept"], False).to_numpy(zero_copy_only=False).astype(bool),
            is_candidate_N=_is_candidate(texts, len(rows)),
            score_N=score,
            dot_N=dot,
            norm_N=norm,
            dot_error_N=error,
            freedom_N=np.where(np.isfinite(freedom), freedom, responses - 1),
            success_rate_N=rate,
            tokens_N=tokens,
            num_responses_N=responses,
            texts=texts,
        )

    def __len__(self) -> int:
        return len(self.step_N)


def _is_candidate(texts: dict[str, tuple[np.ndarray, list[str]]], size: int) -> np.ndarray:
    if "reason" not in texts:
        return np.ones(size, dtype=bool)
    code_N, names = texts["reason"]
    return np.array([name != SCHEDULED for name in names], dtype=bool)[code_N]


NUMBERS = ("score", "dot", "norm", "dot_error", "error_freedom", "success_rate", "response_tokens", "num_responses")


def texts_of(column: pa.ChunkedArray | pa.Array) -> list[str]:
    """Return text as it stands, with the replacement character for bytes that are not text."""
    values = column.cast(pa.binary()).to_pylist()
    return [UNKNOWN if value is None else value.decode("utf-8", "replace") for value in values]


class StepTally:
    """Counts and sums by bin, of all candidates and of the kept ones among them."""

    def __init__(self, bins: StepBins) -> None:
        self.bins = bins
        self.num_rows = 0
        self.num_kept = 0
        self.num_scored = 0
        self.steps: set[int] = set()
        self._sums: dict[tuple[str, bool], np.ndarray] = {}
        self._counts: dict[tuple[str, bool], np.ndarray] = {}

    def add(self, rows: Rows) -> None:
        self.num_rows += len(rows)
        self.num_kept += int(rows.is_kept_N.sum())
        self.num_scored += int(np.isfinite(rows.score_N).sum())
        self.steps.update(np.unique(rows.step_N).tolist())
        bin_N = self.bins.of(rows.step_N)
        self._add("rows", False, bin_N, np.ones(len(rows)))
        columns = {
            "alignment": alignment(rows.dot_N, rows.norm_N),
            "score": rows.score_N,
            "success_rate": rows.success_rate_N,
            "tokens": rows.tokens_N,
            "num_responses": rows.num_responses_N,
        }
        for name, value_N in columns.items():
            is_known_N = np.isfinite(value_N) & rows.is_candidate_N
            self._add(name, False, bin_N[is_known_N], value_N[is_known_N])
            is_known_N &= rows.is_kept_N
            self._add(name, True, bin_N[is_known_N], value_N[is_known_N])

    def means(self, name: str, of_kept: bool) -> np.ndarray:
        """Return a column's mean by bin (B,), nan where no row has it."""
        none = np.zeros(len(self.bins))
        counts = self._counts.get((name, of_kept), none)
        return np.where(counts > 0, self._sums.get((name, of_kept), none) / np.maximum(counts, 1), np.nan)

    @property
    def has_rows(self) -> np.ndarray:
        """Return whether a bin has any row (B,)."""
        return np.isfinite(self.means("rows", of_kept=False))

    def mean(self, name: str, of_kept: bool) -> float:
        """Return a column's mean over all rows, nan if none has it."""
        counts = self._counts.get((name, of_kept))
        total = 0.0 if counts is None else float(counts.sum())
        return float(self._sums[name, of_kept].sum()) / total if total else float("nan")

    def _add(self, name: str, of_kept: bool, bin_N: np.ndarray, value_N: np.ndarray) -> None:
        key, size = (name, of_kept), len(self.bins)
        self._sums[key] = self._sums.get(key, 0.0) + np.bincount(bin_N, value_N, size)
        self._counts[key] = self._counts.get(key, 0.0) + np.bincount(bin_N, minlength=size)


def alignment(dot_N: np.ndarray, norm_N: np.ndarray) -> np.ndarray:
    """Return cosines, nan where the gradient is zero or was not measured."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norm_N > 0, dot_N / norm_N, np.nan)


class ValueTally:
    """Counts rows and kept rows by the value of a column of text and bin. Beyond 250 values they are counted as one.

    `all_rows`: also those that a schedule has put on a step.
    """

    def __init__(self, bins: StepBins, all_rows: bool = False) -> None:
        self.bins = bins
        self._all_rows = all_rows
        self.values: dict[str, int] = {}
        self._counts = np.zeros((2, 0, len(bins)), dtype=np.int64)

    def add(self, rows: Rows, column: str) -> np.ndarray:
        """Count the rows, and return each row's value as its place in `values` (N,)."""
        if column not in rows.texts:
            return np.zeros(len(rows), dtype=np.int64)
        code_N, names = rows.texts[column]
        place_of = np.array([self._place(name) for name in names], dtype=np.int64)
        missing = len(self.values) - self._counts.shape[1]
        if missing:
            self._counts = np.pad(self._counts, ((0, 0), (0, missing), (0, 0)))
        place_N = place_of[code_N]
        cell_N = place_N * len(self.bins) + self.bins.of(rows.step_N)
        size = len(self.values) * len(self.bins)
        is_mine_N = np.ones(len(rows), dtype=bool) if self._all_rows else rows.is_candidate_N
        for group, is_counted_N in enumerate((is_mine_N, is_mine_N & rows.is_kept_N)):
            self._counts[group] += np.bincount(cell_N[is_counted_N], minlength=size).reshape(-1, len(self.bins))
        return place_N

    def counts(self, of_kept: bool) -> dict[str, np.ndarray]:
        """Return the number of rows by value and bin (B,), the most frequent value first."""
        order = np.argsort(-self._counts[0].sum(1), kind="stable")
        names = list(self.values)
        return {names[place]: self._counts[int(of_kept), place] for place in order}

    def _place(self, name: str) -> int:
        if name not in self.values and len(self.values) >= MAX_VALUES:
            name = OTHERS
        return self.values.setdefault(name, len(self.values))


class PointSample:
    """A random part, the same each time, of the rows that have a score and a success rate."""

    def __init__(self, size: int = 20_000) -> None:
        self._size = size
        self._random = np.random.default_rng(0)
        self._threshold = 1.0
        self._points = np.zeros((0, 4))

    def add(self, rows: Rows) -> None:
        key_N = self._random.random(len(rows))
        is_mine_N = (key_N < self._threshold) & np.isfinite(rows.score_N) & np.isfinite(rows.success_rate_N)
        columns = (key_N, rows.success_rate_N, rows.score_N, rows.is_kept_N)
        self._points = np.concatenate([self._points, np.stack([c[is_mine_N] for c in columns], 1)])
        if len(self._points) > 2 * self._size:
            self._cut()

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return success rates, scores, and whether kept."""
        self._cut()
        return self._points[:, 1], self._points[:, 2], self._points[:, 3].astype(bool)

    def _cut(self) -> None:
        if len(self._points) > self._size:
            self._points = self._points[np.argsort(self._points[:, 0])[: self._size]]
            self._threshold = float(self._points[-1, 0])


def numbers_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as float64, nan where it is null."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def codes_of(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return a text column as positions in a list of its values; null is a value of its own."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if not pa.types.is_dictionary(array.type):
        array = pc.dictionary_encode(array.cast(pa.string()))
    names = texts_of(array.dictionary)
    code_N = pc.fill_null(array.indices, len(names)).to_numpy(zero_copy_only=False).astype(np.int64)
    return code_N, [*names, UNKNOWN] if array.null_count else names


MAX_METRICS = 3000
VALIDATION = "val-core/"
"""Begins the names of metrics that are few, so every point of theirs is kept."""


class MetricTally:
    """Means of metrics by bin, and the extremes of each. Other names than wanted are passed over."""

    def __init__(self, bins: StepBins, wanted: Sequence[str]) -> None:
        self.bins = bins
        self.steps: set[int] = set()
        self._wanted = tuple(wanted)
        self._place_of: dict[str, int] = {}
        self._sums = np.zeros((0, len(bins)))
        self._counts = np.zeros((0, len(bins)))
        self._extremes = np.zeros((0, 2))
        self._points: dict[str, dict[int, float]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._place_of)

    def add(self, rows: pa.Table) -> None:
        """Add a piece of the metrics table (one chunk)."""
        step_N, value_N = rows["step"].to_numpy(), numbers_of(rows["value"])
        code_N, names = codes_of(rows["name"])
        self.steps.update(np.unique(step_N).tolist())
        place_of = np.array([self._place(name) for name in names], dtype=np.int64)
        self._grow()
        place_N = place_of[code_N]
        is_mine_N = (place_N >= 0) & np.isfinite(value_N)
        place_N, step_N, value_N, code_N = (a[is_mine_N] for a in (place_N, step_N, value_N, code_N))
        cell = (place_N, self.bins.of(step_N))
        np.add.at(self._sums, cell, value_N)
        np.add.at(self._counts, cell, 1.0)
        np.minimum.at(self._extremes[:, 0], place_N, value_N)
        np.maximum.at(self._extremes[:, 1], place_N, value_N)
        for code, name in enumerate(names):
            if name.startswith(VALIDATION):
                is_this_N = code_N == code
                self._points.setdefault(name, {}).update(zip(step_N[is_this_N], value_N[is_this_N], strict=True))

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and means by bin, only of bins that have the metric."""
        if name not in self._place_of:
            return np.zeros(0), np.zeros(0)
        place = self._place_of[name]
        is_there_B = self._counts[place] > 0
        return self.bins.steps[is_there_B], self._sums[place, is_there_B] / self._counts[place, is_there_B]

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return every step and value of a validation's metric, steps ascending."""
        pairs = sorted(self._points.get(name, {}).items())
        return np.array([step for step, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)

    def mean(self, name: str) -> float:
        """Return the mean over all steps that have the metric, nan if none has."""
        place = self._place_of.get(name)
        if place is None or not self._counts[place].sum():
            return float("nan")
        return float(self._sums[place].sum() / self._counts[place].sum())

    def total(self, name: str) -> float:
        """Return the sum over all steps, nan if no step has the metric."""
        place = self._place_of.get(name)
        return float(self._sums[place].sum()) if place is not None and self._counts[place].sum() else float("nan")

    def count(self, name: str) -> int:
        """Return the number of steps that have the metric."""
        place = self._place_of.get(name)
        return 0 if place is None else int(self._counts[place].sum())

    def most(self, name: str) -> float:
        """Return the highest value, nan if there is none."""
        return float(self._extremes[self._place_of[name], 1]) if self.count(name) else float("nan")

    def _place(self, name: str) -> int:
        if name not in self._place_of:
            if not name.startswith(self._wanted) or len(self._place_of) >= MAX_METRICS:
                return -1
            self._place_of[name] = len(self._place_of)
        return self._place_of[name]

    def _grow(self) -> None:
        missing = len(self._place_of) - len(self._sums)
        if missing:
            self._sums = np.pad(self._sums, ((0, missing), (0, 0)))
            self._counts = np.pad(self._counts, ((0, missing), (0, 0)))
            self._extremes = np.concatenate([self._extremes, np.tile([np.inf, -np.inf], (missing, 1))])
