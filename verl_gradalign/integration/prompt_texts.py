# SPDX-License-Identifier: Apache-2.0
"""The prompts of data files as texts to compare: case, width and white space made equal, millions in seconds.

for text in prompt_texts(datasets.load_dataset(...), "prompt"):
    ...
"""

import unicodedata
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


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


def normalised(text: str) -> str:
    """Return a text with case, width and white space made equal."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())
