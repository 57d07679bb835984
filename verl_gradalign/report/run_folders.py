# SPDX-License-Identifier: Apache-2.0
"""Where the logs of runs are: a log's own folder, a run's folder, or any folder above several runs.

for run in find_runs(["outputs/cosine", "outputs/random"]):
    print(run.name, run.folder)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_gradalign.log.parts import NAME

__all__ = ["RunFolder", "find_runs"]

LOG_FOLDER = "gradalign"
MAX_DEPTH = 6
NOT_SEARCHED = ("earlier-", "global_step_", ".")
"""Beginnings of the names of folders that hold no log of their own: earlier runs, checkpoints, hidden ones."""


@dataclass(frozen=True)
class RunFolder:
    """A run's log, and a name that tells it from the others."""

    name: str
    folder: Path


def find_runs(places: Sequence[str | Path]) -> list[RunFolder]:
    """Return the logs at or below the places, in the order given, each once.

    Raises: ValueError that names a place that is not there or holds no log.
    """
    folders = dict[Path, None]()
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"RUN_DIR {place} does not exist. Remedy: give the folder of a run, or one above several.")
        found = list(_logs_below(place))
        if not found:
            raise ValueError(
                f"RUN_DIR {place} holds no selection log (<step>.parquet files in a folder {LOG_FOLDER}). Remedy: give "
                "the run's trainer.default_local_dir, or gradalign.log.dir if it was set; a run that has not finished "
                "its first step has no log yet."
            )
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    return [RunFolder(name, folder) for name, folder in zip(_names(list(folders)), folders, strict=True)]


def holds_log(folder: Path) -> bool:
    """Return whether parts of a log are in the folder, be they damaged."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return any(NAME.fullmatch(name) or NAME.fullmatch(name.replace(".damaged", ".parquet")) for name in names)


def _logs_below(place: Path) -> Iterator[Path]:
    if holds_log(place):
        yield place
    elif holds_log(place / LOG_FOLDER):
        yield place / LOG_FOLDER
    else:
        for parent, subfolders, _ in os.walk(place):
            here = Path(parent)
            is_deep = len(here.relative_to(place).parts) >= MAX_DEPTH
            subfolders[:] = [] if is_deep else sorted(n for n in subfolders if not n.startswith(NOT_SEARCHED))
            logs = [name for name in subfolders if holds_log(here / name)]
            yield from (here / name for name in logs)
            subfolders[:] = [name for name in subfolders if name not in logs]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest endings of the paths, whole folders, that differ from each other."""
    parts = [folder.parent.parts if folder.name == LOG_FOLDER else folder.parts for folder in folders]
    for length in range(1, max((len(p) for p in parts), default=0) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
