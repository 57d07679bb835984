# SPDX-License-Identifier: Apache-2.0
"""The selection log: one row per candidate and step, as Parquet parts that any reader opens while the run goes on.

table = read_selection_log("checkpoints/project/run/gradalign")
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("problem_id", pa.int64()),  # row in the train files
        ("data_source", pa.string()),
        ("score", pa.float64()),  # null: not scored
        ("dot", pa.float64()),
        ("norm", pa.float64()),
        ("success_rate", pa.float64()),  # null: nothing was generated
        ("num_responses", pa.int64()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # selection.select.REASONS
    ]
)


class SelectionLog:
    """Writes one part per step, each complete or absent: parts are renamed into place."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def write(self, step: int, columns: Mapping[str, Any]) -> Path:
        """Write one step's columns (as in SCHEMA; nan: null), replacing an earlier part, and return the part's path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"selection-{step:08d}.parquet"
        unfinished = path.with_suffix(".unfinished")
        arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in SCHEMA]
        pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), unfinished)
        os.replace(unfinished, path)
        return path


def read_selection_log(folder: str | Path) -> pa.Table:
    """Return all parts of a log as one table, steps ascending. Raises FileNotFoundError if there is none."""
    parts = sorted(Path(folder).glob("selection-*.parquet"))
    if not parts:
        raise FileNotFoundError(f"no selection log in {folder}: the run has not finished a step, or wrote elsewhere")
    return pa.concat_tables([pq.read_table(part, schema=SCHEMA) for part in parts])
