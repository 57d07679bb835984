# SPDX-License-Identifier: Apache-2.0
"""The selection's state in a file: written whole or not at all, and refused where it was made for something else.

    save_state(path, identity, state)
    require_same(path, read_identity(path), identity)
    state = load_state(path)

The file is a .npz archive: arrays as they are, everything else as one JSON text.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from verl_gradalign.files import replacing

FORMAT = 1
TEXT = "text"
ZIP = b"PK\x03\x04"
REMEDY = "Remedy: delete the file to start the selection afresh from this checkpoint's weights"


def save_state(path: Path, identity: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write the state and what it belongs to. After a crash there is the old file or the new one, never half of one."""
    arrays: dict[str, np.ndarray] = {}
    text = {"format": FORMAT, "identity": dict(identity), "state": _without_arrays(state, arrays)}
    with replacing(path, is_durable=True) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **{TEXT: np.array(json.dumps(text))}, **arrays)  # type: ignore[arg-type]


def load_state(path: Path) -> dict[str, Any]:
    """Return the state. Raises ValueError, with the remedy, if the file is damaged or of another format."""
    with _opened(path) as archive:
        return _with_arrays(_text(path, archive)["state"], archive)


def read_identity(path: Path) -> dict[str, Any]:
    """Return what the state belongs to, without reading it. Raises ValueError as `load_state`."""
    with _opened(path) as archive:
        return _text(path, archive)["identity"]


def require_same(path: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise ValueError, naming every key that differs and both values, unless the identities are equal."""
    before, now = flat(saved), flat(current)
    differences = [
        f"{key} was {before.get(key, 'absent')!r}, is {now.get(key, 'absent')!r}"
        for key in sorted({*before, *now})
        if before.get(key, "absent") != now.get(key, "absent")
    ]
    if differences:
        raise ValueError(
            f"{path} holds the selection of another run: {'; '.join(differences)}. A resumed run would not select what "
            f"the unbroken one does. {REMEDY}, or go back to the earlier values."
        )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, keys joined by dots, values as JSON gives them back."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: json.loads(json.dumps(value))}
    return result


def _without_arrays(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """Return `value` with every array replaced by the name under which it is put into `arrays`."""
    if isinstance(value, np.ndarray):
        name = f"array_{len(arrays)}"
        arrays[name] = value
        return {"__array__": name}
    if isinstance(value, Mapping):
        return {key: _without_arrays(item, arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(item, arrays) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _with_arrays(value: Any, archive: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__array__"}:
            return archive[value["__array__"]]
        return {key: _with_arrays(item, archive) for key, item in value.items()}
    return [_with_arrays(item, archive) for item in value] if isinstance(value, list) else value


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


def _text(path: Path, archive: Any) -> dict[str, Any]:
    text = json.loads(str(archive[TEXT]))
    if text["format"] != FORMAT:
        raise ValueError(f"{path} has format {text['format']}, this version reads {FORMAT}. {REMEDY}.")
    return text
