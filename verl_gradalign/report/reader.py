# SPDX-License-Identifier: Apache-2.0
"""A log's tables, batch by batch, with a list of all that could not be read. Never more than a batch is in memory.

    reader = LogReader("checkpoints/project/run/gradalign")
    for rows in reader.batches("selection", SELECTION):
        ...
    print(reader.warnings())

It reads while the run goes on: parts that are merged meanwhile are found again, and no row is given twice.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verl_gradalign.log.parts import Part, conform, parts_of
from verl_gradalign.log.selection_log import EXTRA, FORMAT, METADATA_KEY, METRICS, PICKS, SAMPLES, SCHEMA

TABLES = {"selection": SCHEMA, "samples": SAMPLES, "metrics": METRICS}
REQUIRED = {"selection": ("step", "problem_id"), "samples": ("step", "problem_id"), "metrics": ("step", "name")}
BATCH_ROWS = 1 << 17
BATCH_BYTES = 1 << 26
MAX_NAMED = 5


class LogReader:
    """Reads one log. Rows without a step, problem or name are left out and counted."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.abouts: list[dict[str, Any]] = []
        """What the parts' metadata say of the run, oldest first; one entry for each time it changed."""
        self._damaged: dict[str, str] = {}
        self._absent = Counter[tuple[str, str]]()
        self._num_parts = 0
        self._num_without_metadata = 0
        self._num_bad_rows = 0

    def batches(self, table: str, having: pa.Array | None = None) -> Iterator[pa.Table]:
        """Yield the rows of a table in pieces of one chunk: the columns of its schema, repeated text as dictionaries,
        and for `selection` the further columns that a part has. `having`: only rows of these problems."""
        done: set[Part] = set()
        for _ in range(2):  # a second time for what was merged while this was reading
            has_vanished = False
            for part in parts_of(self.folder, table):
                if part in done:
                    continue
                read = {p.first for p in done if not p.is_merged} if part.is_merged else set()
                try:
                    yield from self._rows(part, table, having, read)
                    done.add(part)
                except FileNotFoundError:
                    has_vanished = True
                except (OSError, pa.ArrowException, ValueError) as error:
                    done.add(part)
                    why = " ".join(str(error).split()) or type(error).__name__
                    self._damaged[part.path.name] = why if len(why) <= 160 else why[:157] + "..."
            if not has_vanished:
                return

    def warnings(self) -> list[str]:
        """Return a sentence on each kind of thing that was missing or unreadable so far."""
        found = []
        if self._damaged:
            named = _listed([f"{name} ({why})" for name, why in self._damaged.items()], "; ")
            found.append(f"{_count(len(self._damaged), 'part')} of the log cannot be read whole: {named}.")
        if set_aside := sorted(path.name for path in self.folder.glob("*.damaged")):
            found.append(f"The run itself found parts damaged and set them aside: {_listed(set_aside, ', ')}.")
        for (table, column), number in self._absent.items():
            parts_have = f"{_count(number, 'part')} of {table} {'has' if number == 1 else 'have'}"
            found.append(f"{parts_have} no column {column}: its values are unknown there.")
        if self._num_bad_rows:
            found.append(f"Left out: {_count(self._num_bad_rows, 'row')} without step, problem or name.")
        newest = max((about["format"] for about in self.abouts), default=FORMAT)
        if newest > FORMAT:
            found.append(
                f"The log has format {newest}, newer than the {FORMAT} that this release knows: what it has in "
                "addition is not shown. Remedy: upgrade verl-gradalign."
            )
        if self._num_without_metadata:
            parts = f"{_count(self._num_without_metadata, 'part')} of {self._num_parts:,}"
            found.append(
                f"Nothing is said of the run's configuration and versions in {parts}: written by an older release, or "
                "by another program."
            )
        return found

    def _rows(self, part: Part, table: str, having: pa.Array | None, read: set[int]) -> Iterator[pa.Table]:
        """Yield a part's rows, but for the steps in `read`."""
        schema = TABLES[table]
        with part.path.open("rb") as source:  # so that a part that has gone is distinguished from one that is damaged
            footer = pq.read_schema(source)
            types = dict(zip(schema.names, schema.types, strict=True))
            types |= _further(footer) if table == "selection" else {}
            texts = [name for name in types if name in footer.names and pa.types.is_string(types[name])]
            lacking = [name for name in REQUIRED[table] if name not in footer.names]
            if lacking:
                raise ValueError(f"it has no column {' or '.join(lacking)}")
            file = pq.ParquetFile(source, read_dictionary=texts if table != "samples" else [])
            self._absent.update((table, name) for name in schema.names if name not in footer.names)
            self._note(footer.metadata)
            if having is not None and not pc.any(pc.is_in(file.read(["problem_id"])["problem_id"], having)).as_py():
                return
            there = [name for name in types if name in footer.names]
            for batch in file.iter_batches(batch_size=_rows_at_once(file), columns=there):
                coded = {f.name: f.type for f in batch.schema if pa.types.is_dictionary(f.type)}
                texts_as_read = {name: coded[name] for name in coded if types[name] == pa.string()}
                rows = conform(pa.Table.from_batches([batch]), pa.schema(types | texts_as_read))
                is_good = pc.and_(*(pc.is_valid(rows[name]) for name in REQUIRED[table]))
                self._num_bad_rows += len(rows) - (pc.sum(is_good).as_py() or 0)
                if read:
                    is_good = pc.and_(is_good, pc.invert(pc.is_in(rows["step"], pa.array(sorted(read), pa.int64()))))
                if having is not None:
                    is_good = pc.and_(is_good, pc.is_in(rows["problem_id"], having))
                yield (rows if pc.all(is_good).as_py() else rows.filter(is_good)).combine_chunks()

    def _note(self, metadata: Mapping[bytes, bytes] | None) -> None:
        """Remember what a part's metadata say of the run."""
        self._num_parts += 1
        try:
            about = json.loads((metadata or {}).get(METADATA_KEY, b""))
            about = {**about, "format": int(about.get("format", FORMAT))}
        except (ValueError, TypeError, AttributeError):
            self._num_without_metadata += 1
            return
        if about not in self.abouts:
            self.abouts.append(about)


def _further(footer: pa.Schema) -> dict[str, pa.DataType]:
    """Return the columns that a part of the selection has in addition, with their types."""
    picks = {field.name: field.type for field in PICKS if field.name in footer.names}
    return picks | {name: pa.string() for name in footer.names if name.startswith(EXTRA)}


def _rows_at_once(file: pq.ParquetFile) -> int:
    """Return how many rows make a batch of a bounded number of bytes."""
    groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    bytes_per_row = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1.0)
    return int(min(BATCH_ROWS, max(1, BATCH_BYTES // max(1.0, bytes_per_row))))


def _listed(names: Sequence[str], separator: str) -> str:
    more = f"{'; and' if separator == '; ' else ' and'} {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return separator.join(names[:MAX_NAMED]) + more


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
