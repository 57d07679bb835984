# SPDX-License-Identifier: Apache-2.0
"""The prompts of data files as texts to compare: case, width and white space made equal, millions in seconds.

for text in prompt_texts(datasets.load_dataset(...), "prompt"):
    ...
"""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from verl_gradalign.data.identity import normalised


def prompt_texts(table: Any, column: str) -> Iterator[str]:
    """Yield the text of every row of a `datasets.Dataset`, all messages in one.

    Raises: ValueError that names the row, from 1 on, if it has no prompt.
    """
    if table._indices is not None:  # rows were selected: Arrow's columns still hold all of them
        table = table.flatten_indices()
    first = 1
    for chunk in table.data.column(column).chunks:
        if chunk.null_count:
            row = first + chunk.is_null().index(True).as_py()
            raise ValueError(f"row {row} has no {column} (null)")
        yield from (normalised(text) for text in _texts(chunk))
        first += len(chunk)


def is_plain_text(table: Any, column: str) -> bool:
    """Return whether every message of the prompts is text, and none is missing: no parts, no pictures."""
    contents = table.data.column(column)
    kind = contents.type
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type):
        if kind.value_type.get_field_index("content") < 0:
            return False
        contents = pa.chunked_array([pc.struct_field(chunk.flatten(), "content") for chunk in contents.chunks])
    is_text = pa.types.is_string(contents.type) or pa.types.is_large_string(contents.type)
    return bool(is_text and not contents.null_count)


def _texts(chunk: pa.Array) -> Iterator[str]:
    """Yield each row's messages, joined."""
    kind = chunk.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_struct(kind.value_type) or kind.value_type.get_field_index("content") < 0:
        yield from (_joined(value) for value in chunk.to_pylist())
        return
    contents = pc.struct_field(chunk.flatten(), "content").to_pylist()
    start = 0
    for length in pc.list_value_length(chunk).to_pylist():
        yield str(contents[start]) if length == 1 else " ".join(map(str, contents[start : start + length]))
        start += length


def _joined(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return " ".join(str(message.get("content") if isinstance(message, dict) else message) for message in prompt)
