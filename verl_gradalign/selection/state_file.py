# SPDX-License-Identifier: Apache-2.0
"""The selection's state in a file: written whole or not at all, and refused where it was made for something else.

    save_state(path, identity, state)
    require_same(path, read_identity(path), identity)
    state = load_state(path)

The file is a .npz archive: arrays as they are, everything else as one JSON text.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from verl_gradalign.files import replacing

FORMAT = 1
TEXT, ARRAY = "text", "__array__"
ZIP = b"PK\x03\x04"
REMEDY = "Remedy: delete the file to start the selection afresh from this checkpoint's weights"


def save_state(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state and what it belongs to. After a crash there is the old file or the new one, never half of one."""
    arrays: dict[str, np.ndarray] = {}

    def without_arrays(value: Any) -> Any:
        """Return what stands in the text for a value that JSON does not know: for an array, its name in `arrays`."""
        if isinstance(value, np.ndarray):
            name = f"array_{len(arrays)}"
            arrays[name] = value
            return {ARRAY: name}
        if isinstance(value, np.generic):
            return value.item()
        raise TypeError(f"a {type(value).__name__} cannot be part of a state")

    text = json.dumps({"format": FORMAT, "identity": identity, "state": state}, default=without_arrays)
    with replacing(path, is_durable=True) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **{TEXT: np.array(text)}, **arrays)  # type: ignore[arg-type]


def load_state(path: Path) -> dict[str, Any]:
    """Return the state. Raises ValueError, with the remedy, if the file is damaged or of another format."""
    with _opened(path) as archive:
        return _text(path, archive, lambda value: archive[value[ARRAY]] if value.keys() == {ARRAY} else value)["state"]


def read_identity(path: Path) -> dict[str, Any]:
    """Return what the state belongs to, without reading it. Raises ValueError as `load_state`."""
    with _opened(path) as archive:
        return _text(path, archive)["identity"]


def require_same(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ValueError, naming every key that differs and both values, unless the identities are equal."""
    if different := differences(saved, current):
        raise ValueError(
            f"{path} holds the selection of another run: {'; '.join(different)}. A resumed run would not select what "
            f"the unbroken one does. {REMEDY}, or go back to the earlier values."
        )


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return, for every key whose value is another one now, the key and both values."""
    before, now = flat(saved), flat(current)
    return [
        f"{key} was {before.get(key, 'absent')!r}, is {now.get(key, 'absent')!r}"
        for key in sorted({*before, *now})
        if before.get(key, "absent") != now.get(key, "absent")
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots, values as JSON gives them back."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: json.loads(json.dumps(value))}
    return result


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yield the archive at a path; whatever is wrong with it becomes a ValueError with the remedy."""
    try:
        with path.open("rb") as file:
            if file.read(len(ZIP)) != ZIP:  # numpy would take it for a pickle
                raise zipfile.BadZipFile("not a .npz archive")
        with np.load(path, allow_pickle=False) as archive:
            yield archive
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}). {REMEDY}.") from error


def _text(path: Path, archive: Any, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    text = json.loads(str(archive[TEXT]), object_hook=object_hook)
    if text["format"] != FORMAT:
        raise ValueError(f"{path} has format {text['format']}, this version reads {FORMAT}. {REMEDY}.")
    return text
