# SPDX-License-Identifier: Apache-2.0
"""Reads what wandb wrote in an offline run."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, RECORD_HEADER = 32_768, 7, 7
WHOLE, LAST = 1, 4


def records(folder: Path) -> Iterator[Any]:
    """The records of an offline run's file: LevelDB's log format, in blocks; wandb itself reads it in Go."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, at, pieces = path.read_bytes(), FILE_HEADER, b""
    while at + RECORD_HEADER <= len(content):
        if BLOCK - at % BLOCK < RECORD_HEADER:
            at += BLOCK - at % BLOCK  # the rest of a block that no header fits in is padding
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + RECORD_HEADER])
        pieces += content[at + RECORD_HEADER : at + RECORD_HEADER + length]
        at += RECORD_HEADER + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(pieces)
            pieces = b""
            yield record


def history(folder: Path) -> dict[int, dict[str, Any]]:
    """What an offline run holds, by step."""
    rows: dict[int, dict[str, Any]] = {}
    for record in records(folder):
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.setdefault(items["_step"], {}).update(items)
    return rows
