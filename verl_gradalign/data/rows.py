# SPDX-License-Identifier: Apache-2.0
"""Rows of data sets, read one by one from a file, a folder or the Hugging Face hub, each with its place for messages.

It knows formats (jsonl, json, parquet, csv), not data sets: what the columns mean is said in `sources`. Text must be
UTF-8. In a folder whose file names or subfolders distinguish splits (train.jsonl, data/test-00000-of-00001.parquet),
only the files of the split asked for are read.

    for row in read_file(Path("gsm8k/train.jsonl")):
        row.text("question"), row.answer("answer")
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl_gradalign.data.chats import Turn, read_turns
from verl_gradalign.data.values import JSON_TEXT, MISSING, as_answer, as_text, clean_answer, parse_json_text

T = TypeVar("T")
UTF8_MARK = b"\xef\xbb\xbf"
SPLIT_NAMES = ("train", "test", "validation")


@dataclass(frozen=True)
class Row:
    """One row of a data set: where it stands ("train.jsonl, line 3"), its values by column, and what was repaired.

    The names of the repairs (`values.REPAIRS`) are added as values are read.
    """

    place: str
    values: Mapping[str, Any]
    repairs: set[str] = field(default_factory=set)

    def has(self, *names: str) -> bool:
        """Return whether one of the columns is there, whatever its value; upper and lower case are the same."""
        return bool(self._column(names))

    def value(self, *names: str) -> Any:
        """Return the value of the first of these columns that is there, or raise ValueError naming the place."""
        column = self._column(names)
        if column is None:
            columns = ", ".join(map(str, self.values)).encode("utf-8", "backslashreplace").decode()
            lacking = f"{self.place} lacks a column {' or '.join(map(repr, names))} (columns: {columns})"
            raise ValueError(f"{lacking}; rename the column or give the data set that the source is named after")
        return self.values[column]

    def text(self, *names: str) -> str:
        """Return that value as text (see `values.as_text`).

        Raises: ValueError naming the place if the column is missing, or empty, or neither text nor number.
        """
        return self._read(as_text, self.value(*names), names)

    def choice(self, value: Any, *names: str) -> str:
        """Return an item of that column as text; the words for a missing value may be one of several choices."""
        is_word = isinstance(value, str) and value.strip().casefold() in MISSING
        return value.strip() if is_word else self._read(as_text, value, names)

    def answer(self, *names: str) -> str:
        """Return that value as an answer (see `values.as_answer`).

        Raises: as `text`, and if nothing is left or several answers are given.
        """
        return self._read(as_answer, self.value(*names), names)

    def cleaned(self, text: str, *names: str) -> str:
        """Return an answer that was found in the columns, without dollar signs and boxes around it; raises as above."""
        return self._read(clean_answer, text, names)

    def turns(self, *names: str) -> tuple[Turn, ...]:
        """Return that value as the turns of a chat, what is asked last. Raises: ValueError naming the place."""
        return self._read(read_turns, self.value(*names), names)

    def inner(self, *names: str) -> "Row | None":
        """Return an object within the row as a row of its own, also one written as JSON text; None if it is null.

        Raises: ValueError naming the place if it is something else.
        """
        value = self.value(*names)
        if isinstance(value, str) and isinstance(parsed := parse_json_text(value), Mapping):
            value = parsed
            self.repairs.add(JSON_TEXT)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            why = f"{self.place} has {names[0]!r} of type {type(value).__name__}"
            raise ValueError(f"{why}; give an object, or leave the column out")
        return Row(self.place, value, self.repairs)

    def _read(self, read: Callable[[Any, str], tuple[T, set[str]]], value: Any, names: tuple[str, ...]) -> T:
        try:
            result, repairs = read(value, names[0])
        except ValueError as error:
            raise ValueError(f"{self.place} has {error}") from error
        self.repairs.update(repairs)
        return result

    def _column(self, names: tuple[str, ...]) -> str | None:
        by_lower_case = {str(column).lower(): column for column in self.values}
        by_lower_case |= {name: name for name in names if name in self.values}
        return next((by_lower_case[name] for name in names if name in by_lower_case), None)


def files_of(path: Path, split: str) -> list[Path]:
    """Return the files to read for a split: the file itself, or the folder's files of that split, sorted.

    A folder is searched with its subfolders. Where no name in it tells a split, all its files are meant.
    Raises: ValueError if nothing readable is there, or nothing of that split.
    """
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and _holds_problems(file.relative_to(path)))
    if not files:
        raise ValueError(f"{path} holds no {', '.join(READERS)} file; give a file or a folder of such files")
    named = {file: _split_named_by(file.relative_to(path)) for file in files}
    chosen = [file for file in files if named[file] == split or not any(named.values())]
    if not chosen:
        found = ", ".join(sorted({name for name in named.values() if name}))
        raise ValueError(f"{path} has files of {found} but none of {split}; give the file of {split} itself")
    return chosen


def _holds_problems(path: Path) -> bool:
    """Whether a file of a folder is meant as data: not what the hub's own tools put beside it."""
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix.lower() in READERS and not is_hidden and not path.name.startswith("dataset_info")


def _split_named_by(path: Path) -> str | None:
    for part in reversed(path.parts):
        for name in SPLIT_NAMES:
            if re.search(rf"^{name}(?![a-z])|[-_]{name}\.[a-z]+$", part.lower()):
                return name
    return None


def read_file(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, whose format follows from its ending; blank lines are passed over.

    Raises: ValueError naming file and line (or row) for an unknown ending, broken contents, or text that is not UTF-8.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} ends in {path.suffix!r}; give a file in one of the formats {', '.join(READERS)}")
    return reader(path)


def read_hub(hub_id: str, config: str | None, split: str) -> tuple[Iterator[Row], str]:
    """Return the rows of a data set on the Hugging Face hub and the fingerprint that `datasets` gives it.

    Raises: ValueError if it cannot be loaded, with the reason and how to do without the hub.
    """
    import datasets  # a second of import time, and only for the hub

    try:
        table = datasets.load_dataset(hub_id, config, split=split)
    except Exception as error:  # whatever the hub, the network or the data set's own layout makes it raise
        raise ValueError(
            f"{hub_id} is not here, and its split {split} cannot be loaded from the hub ({type(error).__name__}: "
            f"{error}); download its files and name their folder with --from NAME=FOLDER"
        ) from error
    rows = (Row(f"{hub_id} ({split}), row {number}", values) for number, values in enumerate(table, start=1))
    return rows, str(table._fingerprint)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            text = _decode(line.removeprefix(UTF8_MARK) if number == 1 else line, place)
            if text.strip():
                yield _row(place, _parse_json(text, place))


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, or one object, as in the folders that MATH came in."""
    contents = _parse_json(_read_text(path), str(path))
    if isinstance(contents, dict):
        yield Row(str(path), contents)
    elif isinstance(contents, list):
        yield from (_row(f"{path}, row {number}", values) for number, values in enumerate(contents, start=1))
    else:
        raise ValueError(f"{path} holds neither a JSON object nor a list of them; write one object per problem")


def _read_parquet(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = [(field.name, field.type) for field in file.schema_arrow if _has_short_floats(field.type)]
            for values in (values for batch in file.iter_batches() for values in batch.to_pylist()):
                number += 1
                values |= {name: _with_shortest_floats(values[name], kind) for name, kind in columns}
                yield Row(f"{path}, row {number}", values)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after row {number}, is not UTF-8 ({error}); write its text as UTF-8") from error
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        why = f"{path}, after row {number}, is not a readable parquet file ({error}); download it again"
        raise ValueError(why) from error


def _has_short_floats(kind: pa.DataType) -> bool:
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return True
    return any(_has_short_floats(kind.field(i).type) for i in range(kind.num_fields))


def _with_shortest_floats(value: Any, kind: pa.DataType) -> Any:
    """Return a value whose numbers of half or single precision are the ones that were written.

    As a Python number the single 12.3 is 12.300000190734863.
    """
    if value is None:
        return None
    if pa.types.is_float16(kind) or pa.types.is_float32(kind):
        return float(str(np.float16(value) if pa.types.is_float16(kind) else np.float32(value)))
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return {field.name: _with_shortest_floats(value[field.name], field.type) for field in fields}
    if isinstance(value, list) and not pa.types.is_map(kind):
        return [_with_shortest_floats(item, kind.field(0).type) for item in value]
    return value


def _read_csv(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    # Cells of solutions are longer than the module's limit of 128 KiB; the file's length is always enough.
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for number, values in enumerate(rows, start=1):
            place = f"{path}, row {number}"
            if None in values or None in values.values():
                raise ValueError(
                    f"{place}, has more or fewer cells than the header names; quote cells that hold commas"
                )
            yield Row(place, values)
    except csv.Error as error:
        raise ValueError(f"{path}, near line {rows.line_num}, is not CSV ({error}); mend the line") from error


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".csv": _read_csv}


def _read_text(path: Path) -> str:
    return _decode(path.read_bytes().removeprefix(UTF8_MARK), str(path))


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = "" if ", line " in place else f", line {data.count(bytes([10]), 0, error.start) + 1}"
        raise ValueError(f"{place}{line} is not UTF-8 ({error.reason}); save the file as UTF-8") from error


def _parse_json(text: str, place: str) -> Any:
    try:
        # Decimals as they are written: 12345678901234567.5 is no binary fraction.
        return json.loads(text, parse_float=Decimal, object_pairs_hook=_object)
    # ArithmeticError and ValueError: numbers of thousands of digits, and exponents of as many.
    except (ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); mend it or download the file again") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError if a key is there twice: which of the two was meant is not known."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return values


def _row(place: str, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{place} is not a JSON object; write one object with the columns per problem")
    return Row(place, values)
