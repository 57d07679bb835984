# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are complete or absent, their hashes, and JSON without nan.

with replacing(Path("state.npz")) as unfinished:
    np.savez(unfinished.open("wb"), **arrays)
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HASH_CHUNK_BYTES = 1 << 20


@contextmanager
def replacing(path: Path, unfinished: Path | None = None, is_durable: bool = False) -> Iterator[Path]:
    """Yield a place beside `path` to write to, which becomes `path` at the end of the body, and vanishes if it fails.

    A process that is killed meanwhile leaves the old file, and at most `unfinished` (`path` with `.unfinished` after
    its name), which the next writing replaces. `is_durable`: the same when the machine crashes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished or path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        if is_durable:
            # Before the rename: else a crash of the machine can leave the new name with incomplete data.
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a text file that is complete or, as before, absent or the old one."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that becomes `path` at the end of the body, and vanishes if it fails.

    What a killed process left of it is removed first. Raises: OSError if `path` is there by then, and not empty.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def hash_file(path: Path) -> str:
    """Return the file's SHA-256 as hexadecimal text: for people, who compare it with published ones."""
    return _hashed(path, hashlib.sha256())


def file_fingerprint(path: Path) -> str:
    """Return a short hash of a file's bytes: what the identity of a run holds."""
    return _hashed(path, hashlib.blake2b(digest_size=8))


def _hashed(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def without_nan(value: Any) -> Any:
    """Return nested values with null for numbers that are not finite: JSON knows neither nan nor infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
