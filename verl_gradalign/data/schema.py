# SPDX-License-Identifier: Apache-2.0
"""The rows that verl trains and tests on, and the parquet files that hold them."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

EXTRA_INFO = [("index", pa.int64()), ("split", pa.string()), ("family", pa.string()), ("corrupted", pa.bool_())]
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        ("extra_info", pa.struct(EXTRA_INFO)),
    ]
)
# Prepared data sets also say where each problem came from.
PREPARED_SCHEMA = SCHEMA.set(4, pa.field("extra_info", pa.struct([*EXTRA_INFO, ("source", pa.string())])))


def make_row(
    data_source: str,
    prompt: str,
    ability: str,
    answer: str,
    context: Sequence[Mapping[str, str]] = (),
    **extra_info: Any,
) -> dict[str, Any]:
    """Return one problem as a row of SCHEMA, or of PREPARED_SCHEMA if `extra_info` has its source; index is from 0.

    `context`: the messages before what is asked.
    """
    return {
        "data_source": data_source,
        "prompt": [*context, {"role": "user", "content": prompt}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": extra_info,
    }


def write_rows(rows: Sequence[dict[str, Any]], path: Path, schema: pa.Schema = SCHEMA) -> Path:
    """Write rows to a parquet file, making its folder if need be, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return path


def draw_corrupted(num: int, share: float, rng: random.Random) -> list[bool]:
    """Return `num` flags of which round(share * num) are True, at random places.

    Raises: ValueError if the share is not within 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"corrupted_share={share} must lie within 0 and 1; choose a share of the pool")
    flags = [position < round(share * num) for position in range(num)]
    rng.shuffle(flags)
    return flags
