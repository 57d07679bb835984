# SPDX-License-Identifier: Apache-2.0
"""When two rows are the same problem: the same text and the same images, videos and sounds.

Text is compared with letter case, width and white space made equal; media by their bytes, or by their path where there
are no bytes. The same picture in another file format counts as another one.

    problem_identity([{"role": "user", "content": "1 + 1?"}], [[{"bytes": b"...", "path": None}]])
"""

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from verl_gradalign.data.values import is_empty

MEDIA_KEYS = {"image_key": "images", "video_key": "videos", "audio_key": "audios"}
"""verl's keys of columns that are shown with a prompt, and their defaults."""
ROWS_READ_TOGETHER = 256
"""Rows with images take a megabyte and more each."""


def problem_identity(prompt: Any, media: Iterable[Any] = ()) -> str:
    """Return the text by which problems are compared: the prompt's, and a hash of each thing that is shown with it.

    `prompt` is text or a list of messages; `media` are the values of the row's media columns, in a fixed order.
    Raises: ValueError with the reason, as what follows "<row> has".
    """
    if prompt is None or (isinstance(prompt, str | Sequence) and not prompt):
        raise ValueError("no prompt")
    texts, shown = [], []
    messages: Any = [{"content": prompt}] if isinstance(prompt, str) else prompt
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, Sequence) and not isinstance(content, bytes):
            for part in content:
                is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
                texts.append(part["text"]) if is_text else shown.append(_hash(part))
        else:
            raise ValueError("a prompt that is no list of messages with role and content")
    # An empty column and a missing one are the same; which column something stands in is not.
    shown += [f"{place} {_hash(value)}" for place, value in enumerate(media) if not is_empty(value)]
    return "\n".join([normalised(" ".join(texts)), *shown])


@lru_cache(maxsize=1 << 15)  # the hub's DAPO-Math-17k holds every problem 100 times
def normalised(text: str) -> str:
    """Return a text with case, width and white space made equal."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def _hash(value: Any) -> str:
    digest = blake2b(digest_size=16)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Feed a nested value to a hash: of a picture its bytes, however the file was called, else its path."""
    if isinstance(value, Mapping):
        named = {key: item for key, item in value.items() if item is not None}
        if "bytes" in named or set(named) == {"path"}:
            _feed(digest, named.get("bytes", named.get("path")))
            return
        for key in sorted(named, key=str):
            digest.update(f"{key}=".encode())
            _feed(digest, named[key])
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode() + data)
