# SPDX-License-Identifier: Apache-2.0
"""A table that grows by a step at a time, as Parquet parts that any reader opens while it grows.

    table = PartedTable(folder, "selection", schema, steps_per_part=100, metadata={b"gradalign": b"..."})
    table.write(step, columns)
    table.merge()

A part is complete or absent: it is written beside its place and renamed. A step is a separate part until
`steps_per_part` of them are merged into one; a merged part hides its members, should they still be there.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verl_gradalign.files import replacing

logger = logging.getLogger(__name__)

# <table>-<step>.parquet, or <table>-<first step>-<last step>.parquet
NAME = re.compile(r"(?P<table>[a-z]+)-(?P<first>\d{8,})(?:-(?P<last>\d{8,}))?\.parquet")


@dataclass(frozen=True)
class Part:
    """One file of a table, and the steps it covers."""

    path: Path
    first: int
    last: int

    @property
    def is_merged(self) -> bool:
        return self.last > self.first

    def hides(self, other: Part) -> bool:
        """Return whether this part was merged of the other one."""
        return self.is_merged and self != other and self.first <= other.first and other.last <= self.last


def parts_of(folder: str | Path, table: str) -> list[Part]:
    """Return the parts that hold a table's rows, steps ascending; members of a merged part are left out."""
    parts, reached = [], -1
    for part in _all_parts(folder, table):
        if part.last > reached:
            parts.append(part)
        if part.is_merged:
            reached = max(reached, part.last)
    return parts


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the rows with the columns of the schema: others are left out, missing ones null."""
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def replace_table(rows: pa.Table, path: Path) -> Path:
    """Write a Parquet file that is complete or, as before, absent or the old one; return its path."""
    with replacing(path, path.with_suffix(".unfinished")) as unfinished:
        pq.write_table(rows, unfinished)
    return path


class PartedTable:
    """Writes one table. A step may be written again until it is merged; the last writing counts.

    Args:
        folder: where the parts are; made when the first is written.
        name: of the table, lower-case letters.
        schema: of its columns, `step` among them.
        steps_per_part: steps that are merged into one file.
        metadata: of every file.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        schema: pa.Schema,
        steps_per_part: int = 100,
        metadata: Mapping[bytes, bytes] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.name = name
        self.schema = schema.with_metadata(dict(metadata or {}))
        self._steps_per_part = steps_per_part

    def write(self, step: int, columns: Mapping[str, Any]) -> Path:
        """Write a step's rows (columns as in the schema; nan: null) and return where they are."""
        arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in self.schema]
        return self._write(step, step, pa.Table.from_arrays(arrays, schema=self.schema))

    def merge(self) -> None:
        """Merge the steps that have separate parts, if there are enough of them."""
        singles = [part for part in parts_of(self.folder, self.name) if not part.is_merged]
        if len(singles) < max(2, self._steps_per_part):
            return
        rows = pa.concat_tables([self._read(part) for part in singles])
        self._write(singles[0].first, singles[-1].last, rows)
        for part in singles:
            part.path.unlink(missing_ok=True)

    def truncate(self, step: int) -> None:
        """Remove the rows of all later steps: a resumed run writes them again."""
        for part in parts_of(self.folder, self.name):
            if part.last <= step:
                continue
            rows = self._read(part) if part.first <= step else None
            self._remove_members(part)
            if rows is not None:
                # Hidden by the whole part until that is gone, so no moment shows too few rows, or rows twice.
                self._write(part.first, step, rows.filter(pc.field("step") <= step))
            part.path.unlink(missing_ok=True)

    def remove(self, part: Part) -> None:
        """Remove a part with all its rows."""
        self._remove_members(part)
        part.path.unlink(missing_ok=True)

    def _read(self, part: Part) -> pa.Table:
        """Return a part's rows; of a damaged one none: it is renamed, as a log must not stop a run."""
        try:
            return conform(pq.read_table(part.path), self.schema)
        except (OSError, pa.ArrowException) as error:
            place = part.path.with_suffix(".damaged")
            said = "%s cannot be read (%s): it is kept as %s, and its steps are missing"
            logger.warning(said, part.path, error, place)
            part.path.rename(place)
            return self.schema.empty_table()

    def _write(self, first: int, last: int, rows: pa.Table) -> Path:
        steps = f"{first:08d}" if first == last else f"{first:08d}-{last:08d}"
        return replace_table(rows, self.folder / f"{self.name}-{steps}.parquet")

    def _remove_members(self, merged: Part) -> None:
        """Remove what was left of a merged part's members by a run that was killed at that moment."""
        for part in _all_parts(self.folder, self.name):
            if merged.hides(part):
                part.path.unlink()


def _all_parts(folder: str | Path, table: str) -> list[Part]:
    """Return all complete files of a table, a merged part before its members."""
    named = [(path, NAME.fullmatch(path.name)) for path in Path(folder).glob(f"{table}-*.parquet")]
    found = [Part(path, int(m["first"]), int(m["last"] or m["first"])) for path, m in named if m]
    return sorted(found, key=lambda part: (part.first, -part.last))
