# SPDX-License-Identifier: Apache-2.0
"""Sums over a run's tables, which are read in pieces: by bin of steps, by a column's values, by metric, by problem.

    bins = StepBins(first=1, last=20_000)
    tally = StepTally(bins)
    for table in reader.batches("selection"):
        tally.add(Rows.of(table))

Steps share at most 400 bins, so that a tally's size does not depend on the log's. Sums by bin are numpy's bincount, not
queries of pyarrow.dataset: text columns have their codes already, and additions have the same order each time.

Shape legend: N rows of a piece, B bins, S steps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from verl_gradalign.log.selection_log import EXTRA, PICKS, SCHEMA

MAX_BINS = 400
MAX_VALUES = 250
MAX_METRICS = 3000
MAX_POINTS = 20_000
MAX_PENDING_ROWS = 1_000_000
OTHERS = "(other values)"
UNKNOWN = "(none)"
SCHEDULED = "scheduled"
"""The reason of selection.select for what a schedule has put on a step."""
AVERAGED = ("alignment", "score", "success_rate", "response_tokens")
FORECAST, UNIFORM = "forecast", "uniform"
"""The values of `pick`: of schedule forecast, where what was drawn uniformly stands for the pool."""
NUMBERS = ("score", "dot", "norm", "dot_error", "error_freedom", "success_rate", "response_tokens", "num_responses")


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
    """A piece of the selection table as arrays."""

    step_N: np.ndarray
    problem_id_N: np.ndarray
    is_kept_N: np.ndarray
    is_forecast_N: np.ndarray
    """Chosen by forecast before it was rolled out."""
    is_uniform_N: np.ndarray
    """Drawn uniformly beside those."""
    is_pool_N: np.ndarray
    """What there was to choose from: candidates, or what was drawn uniformly; not what a schedule has put on a step."""
    is_chosen_N: np.ndarray
    """What was kept of the candidates, or chosen by forecast."""
    numbers: dict[str, np.ndarray]
    """By name of NUMBERS, those of PICKS, and `alignment`, the cosine: float64 (N,), nan where not known."""
    texts: dict[str, tuple[np.ndarray, list[str]]]
    """By column of text: positions (N,) in the list of values that follows."""

    @classmethod
    def of(cls, table: pa.Table) -> Rows:
        numbers = {name: numbers_of(table[name]) for name in NUMBERS}
        freedom_N = numbers["error_freedom"]
        numbers["error_freedom"] = np.where(np.isfinite(freedom_N), freedom_N, numbers["num_responses"] - 1)
        numbers["alignment"] = per_norm(numbers["dot"], numbers["norm"])
        unknown_N = np.full(len(table), np.nan)
        for field in PICKS:
            if pa.types.is_floating(field.type):
                has_it = field.name in table.column_names
                numbers[field.name] = numbers_of(table[field.name]) if has_it else unknown_N
        columns = [n for n in table.column_names if n in ("reason", "data_source", "pick") or n.startswith(EXTRA)]
        texts = {name: codes_of(table[name]) for name in columns}
        is_kept_N = pc.fill_null(table["kept"], False).to_numpy(zero_copy_only=False).astype(bool)
        picks = texts.get("pick", (np.zeros(len(table), dtype=np.int64), [""]))
        is_forecast_N, is_uniform_N = _are(picks, FORECAST), _are(picks, UNIFORM)
        is_candidate_N = ~_are(texts["reason"], SCHEDULED)
        has_picks = bool(is_forecast_N.any() or is_uniform_N.any())
        return cls(
            step_N=table["step"].to_numpy(),
            problem_id_N=table["problem_id"].to_numpy(),
            is_kept_N=is_kept_N,
            is_forecast_N=is_forecast_N,
            is_uniform_N=is_uniform_N,
            is_pool_N=is_uniform_N if has_picks else is_candidate_N,
            is_chosen_N=is_kept_N & (is_forecast_N if has_picks else is_candidate_N),
            numbers=numbers,
            texts=texts,
        )

    def __len__(self) -> int:
        return len(self.step_N)


class StepTally:
    """Counts rows, and averages columns by bin: of the pool, and of what was chosen."""

    def __init__(self, bins: StepBins) -> None:
        self.bins = bins
        self.num_rows = self.num_kept = self.num_scored = 0
        self.steps: set[int] = set()
        self.has_rows_B = np.zeros(len(bins), dtype=bool)
        self._sums_and_counts = {key: np.zeros((2, len(bins))) for key in product(AVERAGED, (False, True))}

    def add(self, rows: Rows) -> None:
        self.num_rows += len(rows)
        self.num_kept += int(rows.is_kept_N.sum())
        self.num_scored += int(np.isfinite(rows.numbers["score"]).sum())
        self.steps.update(np.unique(rows.step_N).tolist())
        bin_N = self.bins.of(rows.step_N)
        self.has_rows_B[bin_N] = True
        for (name, of_kept), totals in self._sums_and_counts.items():
            value_N = rows.numbers[name]
            is_mine_N = np.isfinite(value_N) & (rows.is_chosen_N if of_kept else rows.is_pool_N)
            totals += _sums_and_counts(bin_N[is_mine_N], value_N[is_mine_N], len(self.bins))

    def means(self, name: str, of_kept: bool) -> np.ndarray:
        """Return a column's mean by bin (B,), nan where no row has it."""
        sum_B, count_B = self._sums_and_counts[name, of_kept]
        return np.where(count_B > 0, sum_B / np.maximum(count_B, 1), np.nan)

    def mean(self, name: str, of_kept: bool) -> float:
        """Return a column's mean over all rows, nan if none has it."""
        return _mean(*self._sums_and_counts[name, of_kept])


class ValueTally:
    """Counts the rows of the pool, and the chosen ones, by the value of a column of text and bin. Beyond 250 values are
    counted as one.

    `all_rows`: all rows, and the kept ones.
    """

    def __init__(self, bins: StepBins, all_rows: bool = False) -> None:
        self.bins = bins
        self._all_rows = all_rows
        self.values: dict[str, int] = {}
        self._counts = np.zeros((2, 0, len(bins)), dtype=np.int64)

    def add(self, rows: Rows, column: str) -> np.ndarray:
        """Count the rows, and return each row's value as its place in `values` (N,)."""
        code_N, names = rows.texts[column]
        place_N = np.array([self._place(name) for name in names], dtype=np.int64)[code_N]
        self._counts = np.pad(self._counts, ((0, 0), (0, len(self.values) - self._counts.shape[1]), (0, 0)))
        cell_N = place_N * len(self.bins) + self.bins.of(rows.step_N)
        everything = (np.full(len(rows), True), rows.is_kept_N)
        for of_kept, is_counted_N in enumerate(everything if self._all_rows else (rows.is_pool_N, rows.is_chosen_N)):
            count = np.bincount(cell_N[is_counted_N], minlength=self._counts[of_kept].size)
            self._counts[of_kept] += count.reshape(-1, len(self.bins))
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
    """A random part, the same each time, of the rows that have both of two columns of numbers."""

    def __init__(self, names: tuple[str, str] = ("success_rate", "score")) -> None:
        self._names = names
        self._random = np.random.default_rng(0)
        self._points = np.zeros((0, 4))

    def add(self, rows: Rows) -> None:
        key_N = self._random.random(len(rows))
        first_N, second_N = (rows.numbers[name] for name in self._names)
        is_known_N = np.isfinite(first_N) & np.isfinite(second_N)
        points = np.stack([column_N[is_known_N] for column_N in (key_N, first_N, second_N, rows.is_kept_N)], 1)
        self._points = np.concatenate([self._points, points])
        if len(self._points) > MAX_POINTS:  # of all rows so far, those with the smallest keys stay
            self._points = self._points[np.argsort(self._points[:, 0])[:MAX_POINTS]]

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return both columns, and whether kept."""
        return self._points[:, 1], self._points[:, 2], self._points[:, 3].astype(bool)


class ProblemSums:
    """Sums by problem over all steps in which it was a candidate. Pieces are summed again now and then, so memory
    follows the number of problems."""

    def __init__(self) -> None:
        self.is_cosine: bool | None = None
        """Whether `value` sums cosines; else dot products, of an estimator that gives no norms. None: neither yet."""
        self._pending: list[pa.Table] = []
        self._num_pending = 0
        self.add(Rows.of(SCHEMA.empty_table()), np.zeros(0, dtype=np.int64))  # so that there is always a table

    def add(self, rows: Rows, source_N: np.ndarray) -> None:
        """Add a piece of the selection table; `source_N` are its data sources as numbers."""
        dot_N, norm_N, value_N, error_N = (rows.numbers[name] for name in ("dot", "norm", "alignment", "dot_error"))
        has_dot_N = np.isfinite(dot_N)
        if self.is_cosine is None and has_dot_N.any():
            self.is_cosine = bool(np.isfinite(norm_N[has_dot_N]).any())
        value_N, error_N = (dot_N, error_N) if self.is_cosine is False else (value_N, per_norm(error_N, norm_N))
        is_measured_N = np.isfinite(value_N)
        has_error_N = is_measured_N & np.isfinite(error_N) & (error_N > 0)
        success_N = rows.numbers["success_rate"]
        value_N = np.where(is_measured_N, value_N, 0.0)
        columns = {
            "num_kept": rows.is_kept_N,
            "num_rated": np.isfinite(success_N),
            "success": np.where(np.isfinite(success_N), success_N, 0.0),
            "num_measured": is_measured_N,
            "value": value_N,
            "square": value_N**2,
            "num_negative": value_N < 0,
            "num_with_error": has_error_N,
            "value_with_error": np.where(has_error_N, value_N, 0.0),
            "variance": np.where(has_error_N, error_N, 0.0) ** 2,
            "freedom": np.where(has_error_N, np.nan_to_num(rows.numbers["error_freedom"]), 0.0),
        }
        floats = {name: column_N.astype(float) for name, column_N in columns.items()}
        self._pending.append(_by_problem(pa.table({"problem_id": rows.problem_id_N, "source": source_N, **floats})))
        self._num_pending += len(self._pending[-1])
        if self._num_pending > MAX_PENDING_ROWS:
            # What is put together counts again only as far as new rows come to it.
            self._pending, self._num_pending = [_by_problem(pa.concat_tables(self._pending))], 0

    def table(self) -> pa.Table:
        """Return a row per problem, ids ascending, its `source` and sums as columns."""
        return _by_problem(pa.concat_tables(self._pending)).sort_by("problem_id")


class Metrics:
    """A run's metrics whose names begin with one of `wanted`, whole: a number per step and metric is little."""

    def __init__(self, bins: StepBins, wanted: Sequence[str]) -> None:
        self.bins = bins
        self.steps: set[int] = set()
        self._wanted = tuple(wanted)
        self._pieces = defaultdict[str, list[tuple[np.ndarray, np.ndarray]]](list)

    @property
    def names(self) -> list[str]:
        return [name for name in self._pieces if self.count(name)]

    def add(self, table: pa.Table) -> None:
        """Add a piece of the metrics table (one chunk)."""
        step_N, value_N = table["step"].to_numpy(), numbers_of(table["value"])
        code_N, names = codes_of(table["name"])
        self.steps.update(np.unique(step_N).tolist())
        for code, name in enumerate(names):
            if name.startswith(self._wanted) and (name in self._pieces or len(self._pieces) < MAX_METRICS):
                is_mine_N = (code_N == code) & np.isfinite(value_N)
                self._pieces[name].append((step_N[is_mine_N], value_N[is_mine_N]))

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return every step and value of a metric, steps ascending; of a step that was written twice the last value."""
        pairs = sorted(dict(zip(*self._values(name), strict=True)).items())
        return np.array([step for step, _ in pairs], dtype=float), np.array([value for _, value in pairs], dtype=float)

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and means by bin, only of bins that have the metric."""
        sum_B, count_B = self._binned(name)
        is_there_B = count_B > 0
        return self.bins.steps[is_there_B], sum_B[is_there_B] / count_B[is_there_B]

    def mean(self, name: str) -> float:
        """Return the mean over all steps that have the metric, nan if none has."""
        return _mean(*self._binned(name))

    def total(self, name: str) -> float:
        """Return the sum over all steps, nan if no step has the metric."""
        return float(self._binned(name)[0].sum()) if self.count(name) else float("nan")

    def count(self, name: str) -> int:
        """Return the number of steps that have the metric."""
        return len(self._values(name)[0])

    def most(self, name: str) -> float:
        """Return the highest value, nan if there is none."""
        return float(self._values(name)[1].max()) if self.count(name) else float("nan")

    def _values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        steps, values = zip(*self._pieces.get(name, [(np.zeros(0, dtype=int), np.zeros(0))]), strict=True)
        return np.concatenate(steps), np.concatenate(values)

    def _binned(self, name: str) -> np.ndarray:
        step_S, value_S = self._values(name)
        return _sums_and_counts(self.bins.of(step_S), value_S, len(self.bins))


def _are(column: tuple[np.ndarray, list[str]], name: str) -> np.ndarray:
    """Return whether a column of text, as `codes_of` gives it, has this value (N,)."""
    code_N, names = column
    return np.array([each == name for each in names], dtype=bool)[code_N]


def per_norm(value_N: np.ndarray, norm_N: np.ndarray) -> np.ndarray:
    """Return dot products as cosines, nan where the gradient is zero or was not measured."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(norm_N > 0, value_N / norm_N, np.nan)


def numbers_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as float64, nan where it is null."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def codes_of(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return a text column as positions in a list of its values; null is a separate value."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if not pa.types.is_dictionary(array.type):
        array = pc.dictionary_encode(array.cast(pa.string()))
    names = [UNKNOWN if name is None else name for name in texts_of(array.dictionary)]
    code_N = pc.fill_null(array.indices, len(names)).to_numpy(zero_copy_only=False).astype(np.int64)
    return code_N, [*names, UNKNOWN] if array.null_count else names


def texts_of(column: pa.ChunkedArray | pa.Array) -> list[str | None]:
    """Return text as it stands, with the replacement character for bytes that are not text; None for null."""
    values = column.cast(pa.binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "replace") for value in values]


def _sums_and_counts(bin_N: np.ndarray, value_N: np.ndarray, num_bins: int) -> np.ndarray:
    return np.stack([np.bincount(bin_N, value_N, num_bins), np.bincount(bin_N, minlength=num_bins)])


def _mean(sum_B: np.ndarray, count_B: np.ndarray) -> float:
    return float(sum_B.sum() / count_B.sum()) if count_B.any() else float("nan")


def _by_problem(table: pa.Table) -> pa.Table:
    sums = [name for name in table.column_names if name not in ("problem_id", "source")]
    # One thread: the order of the additions, and so the last digit, is the same each time.
    grouped = table.group_by("problem_id", use_threads=False).aggregate(
        [("source", "max"), *((name, "sum") for name in sums)]
    )
    return grouped.rename_columns([name.removesuffix("_max").removesuffix("_sum") for name in grouped.column_names])
