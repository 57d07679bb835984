# SPDX-License-Identifier: Apache-2.0
"""What a log says of each problem, summed over all steps in which it was a candidate.

    sums = ProblemSums()
    for rows in pieces:
        sums.add(rows, source_N)
    problems = sums.problems()

Shape legend: N rows of a piece, P problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from verl_gradalign.report.tallies import Rows, alignment

__all__ = ["ProblemSums", "Problems"]

MAX_PENDING_ROWS = 1_000_000

SUMMED = (
    "num_seen",
    "num_kept",
    "num_rated",
    "success",
    "num_measured",
    "value",
    "square",
    "num_negative",
    "num_with_error",
    "value_with_error",
    "variance",
    "freedom",
)


@dataclass(frozen=True)
class Problems:
    """One entry per problem, ids ascending: sums over its rows."""

    is_cosine: bool
    """Whether `value` sums cosines; else dot products, of an estimator that gives no norms."""
    problem_id_P: np.ndarray
    source_P: np.ndarray
    """Place of its data source among the values of the run."""
    sums: dict[str, np.ndarray]
    """By name of SUMMED, each (P,)."""

    def __len__(self) -> int:
        return len(self.problem_id_P)


class ProblemSums:
    """Adds up rows by problem. Pieces are put together now and then, so memory follows the number of problems."""

    def __init__(self) -> None:
        self._is_cosine: bool | None = None
        self._pending: list[pa.Table] = []
        self._num_pending = 0

    def add(self, rows: Rows, source_N: np.ndarray) -> None:
        """Add a piece of the selection table; `source_N` are its data sources as numbers."""
        value_N, error_N = self._values(rows)
        is_measured_N = np.isfinite(value_N)
        has_error_N = is_measured_N & np.isfinite(error_N) & (error_N > 0)
        is_rated_N = np.isfinite(rows.success_rate_N)
        known_N = np.where(is_measured_N, value_N, 0.0)
        columns = {
            "num_seen": np.ones(len(rows)),
            "num_kept": rows.is_kept_N.astype(float),
            "num_rated": is_rated_N.astype(float),
            "success": np.where(is_rated_N, rows.success_rate_N, 0.0),
            "num_measured": is_measured_N.astype(float),
            "value": known_N,
            "square": known_N**2,
            "num_negative": (known_N < 0).astype(float),
            "num_with_error": has_error_N.astype(float),
            "value_with_error": np.where(has_error_N, known_N, 0.0),
            "variance": np.where(has_error_N, error_N, 0.0) ** 2,
            "freedom": np.where(has_error_N, np.nan_to_num(rows.freedom_N), 0.0),
        }
        table = pa.table({"problem_id": rows.problem_id_N, "source": source_N, **columns})
        self._pending.append(_summed(table))
        self._num_pending += len(self._pending[-1])
        if self._num_pending > MAX_PENDING_ROWS:
            self._put_together()

    def problems(self) -> Problems:
        """Return what was added up so far."""
        self._put_together()
        if not self._pending:
            none = np.zeros(0)
            return Problems(True, none.astype(int), none.astype(int), dict.fromkeys(SUMMED, none))
        table = self._pending[0].sort_by("problem_id")
        columns = {name: table[name].to_numpy() for name in ("problem_id", "source", *SUMMED)}
        return Problems(self._is_cosine is not False, columns.pop("problem_id"), columns.pop("source"), columns)

    def _values(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and their standard errors; dot products where the estimator gives no norms."""
        has_dot_N = np.isfinite(rows.dot_N)
        if self._is_cosine is None and has_dot_N.any():
            self._is_cosine = bool(np.isfinite(rows.norm_N[has_dot_N]).any())
        if self._is_cosine is False:
            return rows.dot_N, rows.dot_error_N
        return alignment(rows.dot_N, rows.norm_N), alignment(rows.dot_error_N, rows.norm_N)

    def _put_together(self) -> None:
        if len(self._pending) > 1:
            self._pending = [_summed(pa.concat_tables(self._pending))]
        # What is put together counts again only as far as new rows come to it.
        self._num_pending = 0


def _summed(table: pa.Table) -> pa.Table:
    sums = table.group_by("problem_id").aggregate([("source", "max"), *((name, "sum") for name in SUMMED)])
    names = {"source_max": "source", **{f"{name}_sum": name for name in SUMMED}}
    return sums.rename_columns([names.get(name, name) for name in sums.column_names])
