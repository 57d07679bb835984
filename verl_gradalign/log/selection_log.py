# SPDX-License-Identifier: Apache-2.0
"""The selection log: what a run chose among, what it kept and why, as Parquet that any reader opens meanwhile.

Three tables in one folder, each in parts (`parts.py`): `selection`, a row per candidate and step; `samples`, texts of
the problems that a person would want to see; `metrics`, a row per step and metric. Every file carries the run's
configuration and versions in its metadata.

    table = read_selection_log("checkpoints/project/run/gradalign")
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_gradalign.log.parts import PartedTable, conform, parts_of

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of the tables below. 1 had `selection` alone, without what tells errors, and without metadata."""

METADATA_KEY = b"gradalign"
"""Of every file's metadata: {"format": FORMAT, "versions": {package: version}, "config": verl's whole configuration}"""

EXTRA = "extra_info."
"""Before the name of a column that `gradalign.log.columns` asks for."""

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("problem_id", pa.int64()),  # row in the train files
        ("data_source", pa.string()),
        ("score", pa.float64()),  # null: not scored
        ("dot", pa.float64()),
        ("norm", pa.float64()),
        ("dot_error", pa.float64()),  # standard error of dot over the responses; null: not known
        ("error_freedom", pa.float64()),  # degrees of freedom that it is estimated with
        ("success_rate", pa.float64()),  # null: nothing was generated
        ("num_responses", pa.int64()),
        ("response_tokens", pa.float64()),  # mean of the responses
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # selection.select.REASONS
    ]
)
PICKS = pa.schema(
    [
        ("pick", pa.string()),  # select.FORECAST or UNIFORM; "": not picked, as in a refill
        ("forecast_mean", pa.float64()),  # what was forecast before it was rolled out
        ("forecast_deviation", pa.float64()),
        ("observed", pa.float64()),  # what the forecast learnt from it: the score, 0 of a dead group; null: nothing
    ]
)
"""Further columns of the selection, with schedule forecast."""
SAMPLES = pa.schema(
    [
        ("step", pa.int64()),
        ("problem_id", pa.int64()),
        ("prompt", pa.string()),
        ("answer", pa.string()),  # the ground truth that rewards are computed with
        ("response", pa.string()),
        ("reward", pa.float64()),
        ("num_tokens", pa.int64()),  # of the response
    ]
)
METRICS = pa.schema([("step", pa.int64()), ("name", pa.string()), ("value", pa.float64())])
TABLES = ("selection", "samples", "metrics")


class SelectionLog:
    """Writes the log of one run.

    Args:
        folder: of all parts; made when the first is written.
        columns: further columns of the selection, from the problems' `extra_info`, as text.
        about: {"versions": ..., "config": ...} of the run, for the metadata.
        steps_per_part: steps that are merged into one file.
        max_bytes: of the whole folder; beyond it the oldest steps are dropped. None: no limit.
        has_picks: whether the selection has the columns of `PICKS`.
    """

    def __init__(
        self,
        folder: str | Path,
        columns: Sequence[str] = (),
        about: Mapping[str, Any] | None = None,
        steps_per_part: int = 100,
        max_bytes: int | None = None,
        has_picks: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.columns = tuple(columns)
        self._max_bytes = max_bytes
        metadata = {METADATA_KEY: json.dumps({"format": FORMAT, **(about or {})}, default=str).encode()}
        schemas = dict(zip(TABLES, (_with_further(columns, has_picks), SAMPLES, METRICS), strict=True))
        self._tables = {name: PartedTable(folder, name, schemas[name], steps_per_part, metadata) for name in TABLES}

    def begin(self, step: int) -> None:
        """Get ready to write the steps after `step`: what an earlier run wrote of them is removed.

        At step 0 that would be the whole log of another run, so it is set aside in a folder beside the parts.
        """
        if step > 0:
            for table in self._tables.values():
                table.truncate(step)
        elif parts := [part.path for name in TABLES for part in parts_of(self.folder, name)]:
            number = next(n for n in count(1) if not (self.folder / f"earlier-{n}").exists())
            place = self.folder / f"earlier-{number}"
            place.mkdir()
            for path in parts:
                path.rename(place / path.name)
            logger.warning("%s holds the log of an earlier run, which was not resumed: moved to %s", self.folder, place)

    def write(self, step: int, columns: Mapping[str, Any]) -> Path:
        """Write one step's selection (SCHEMA, PICKS; nan: null), replacing an earlier one, and return its path."""
        path = self._tables["selection"].write(step, columns)
        self._tidy(step)
        return path

    def write_samples(self, step: int, columns: Mapping[str, Any]) -> None:
        """Write texts of a step's problems (as in SAMPLES)."""
        self._tables["samples"].write(step, columns)

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a step's metrics."""
        columns = {"step": [step] * len(metrics), "name": list(metrics), "value": list(map(float, metrics.values()))}
        self._tables["metrics"].write(step, columns)

    def _tidy(self, step: int) -> None:
        """Merge parts, and drop the oldest steps beyond the limit."""
        for table in self._tables.values():
            table.merge()
        if self._max_bytes is None:
            return
        parts = [(part, table) for name, table in self._tables.items() for part in parts_of(self.folder, name)]
        sizes = {part: part.path.stat().st_size for part, _ in parts}
        excess = sum(sizes.values()) - self._max_bytes
        for part, table in sorted(parts, key=lambda pair: pair[0].last):
            if excess <= 0 or part.last >= step:
                return
            logger.warning(
                "%s is larger than gradalign.log.max_gb allows: steps %d to %d of its %s are dropped",
                *(self.folder, part.first, part.last, table.name),
            )
            table.remove(part)
            excess -= sizes[part]


def read_selection_log(folder: str | Path) -> pa.Table:
    """Return a log's selections as one table, steps ascending. Raises FileNotFoundError if there is none.

    `log_reader.LogReader` reads all tables, also damaged ones, in pieces.
    """
    parts = parts_of(folder, "selection")
    if not parts:
        raise FileNotFoundError(f"no selection log in {folder}: the run has not finished a step, or wrote elsewhere")
    tables = [pq.read_table(part.path) for part in parts]
    extra = dict.fromkeys(name for table in tables for name in table.column_names if name.startswith(EXTRA))
    has_picks = any(PICKS.names[0] in table.column_names for table in tables)
    schema = _with_further([name.removeprefix(EXTRA) for name in extra], has_picks)
    return pa.concat_tables([conform(table, schema) for table in tables])


def _with_further(columns: Iterable[str], has_picks: bool) -> pa.Schema:
    extra = [pa.field(EXTRA + name, pa.string()) for name in columns]
    return pa.schema([*SCHEMA, *(PICKS if has_picks else ()), *extra])
