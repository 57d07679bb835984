# SPDX-License-Identifier: Apache-2.0
"""Rows of trusted responses that outlive their step: in a partition of TransferQueue that nobody samples from.

copy_rows(batch, keys)                          # before verl clears them
save_rows(path, [keys_of_a_group, ...])
load_rows(path, [keys_of_a_group, ...])
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_gradalign.files import replacing
from verl_gradalign.integration.engine import taken_apart

PARTITION = "gradalign_trusted"
VERSION = 1
"""Of {"version", "rows": {key: {column: tensor, or images}}, "tags": {key: tag}}."""
REMEDY = "Remedy: restore the file, or delete gradalign.npz beside it to start the selection afresh"


def copy_rows(batch: KVBatchMeta, keys: Sequence[str]) -> KVBatchMeta:
    """Copy rows into the partition, with every column that a pass may read, and return what is known of the copies."""
    tag_of = dict(zip(batch.keys, batch.tags, strict=True))
    tags = [dict(tag_of[key]) for key in keys]
    _put(keys, _rows(tq.kv_batch_get(keys=list(keys), partition_id=batch.partition_id)), tags)
    return KVBatchMeta(keys=list(keys), tags=tags, partition_id=PARTITION)


def clear_rows(keys: Sequence[str]) -> None:
    """Remove rows from the partition."""
    if keys:
        tq.kv_clear(keys=list(keys), partition_id=PARTITION)


def save_rows(path: Path, groups: Iterable[Sequence[str]]) -> None:
    """Write the rows of each group of keys. After a crash there is the old file or the new one, never half of one.

    Units: some 80 bytes per token, and the images.
    """
    tag_of = (tq.kv_list(PARTITION) or {}).get(PARTITION, {})
    rows: dict[str, dict[str, Any]] = {}
    for keys in groups:
        rows |= zip(keys, _rows(tq.kv_batch_get(keys=list(keys), partition_id=PARTITION)), strict=True)
    content = {"version": VERSION, "rows": rows, "tags": {key: tag_of[key] for key in rows}}
    with replacing(path, is_durable=True) as unfinished, unfinished.open("wb") as stream:
        torch.save(content, stream)


def load_rows(path: Path, groups: Iterable[Sequence[str]]) -> None:
    """Put the rows of each group of keys into the partition, in the place of all that is there.

    Raises: ValueError, with the remedy, if the file is missing, damaged, of another version, or lacks a key.
    """
    content = _read(path)
    clear_rows(list((tq.kv_list(PARTITION) or {}).get(PARTITION, {})))
    for keys in groups:
        if missing := [key for key in keys if key not in content["rows"]]:
            raise ValueError(f"{path} lacks {len(missing)} of the trusted responses that are kept. {REMEDY}.")
        _put(keys, [content["rows"][key] for key in keys], [content["tags"][key] for key in keys])


def _read(path: Path) -> dict[str, Any]:
    try:
        # Mapped, not read: each row is copied once, into the partition.
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        version = content["version"]
    except Exception as error:  # torch and pickle raise nearly every kind, OSError too, depending on what is damaged
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read as trusted responses ({reason}). {REMEDY}.") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version!r}, this version reads {VERSION}. {REMEDY}.")
    return content


def _rows(data: TensorDict) -> list[dict[str, Any]]:
    """Return each row's columns, in tensors of their own."""
    columns = taken_apart(data)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [{name: _own(value) for name, value in row.items()} for row in rows]


def _own(value: Any) -> Any:
    """Return a copy: a row is a view of its whole column, which torch.save would write in its stead."""
    if isinstance(value, Mapping):
        return {name: _own(part) for name, part in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def _put(keys: Sequence[str], rows: Sequence[dict[str, Any]], tags: Sequence[dict[str, Any]]) -> None:
    fields = list_of_dict_to_tensordict(list(rows))
    tq.kv_batch_put(keys=list(keys), partition_id=PARTITION, fields=fields, tags=list(tags))
