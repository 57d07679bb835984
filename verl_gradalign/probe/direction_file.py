# SPDX-License-Identifier: Apache-2.0
"""A direction as one file per rank, with this rank's shards: beside verl's own, which lie on each rank's machine.

    with leave_no_trace(module):
        save_direction(module, direction, rank_file(folder, rank, world_size))
        direction = load_direction(module, rank_file(folder, rank, world_size))

No rank needs another's file, or another's disk. As with verl's weights, only the model sharded in the same way reads
them. It does not decide when to save, nor where; and it does not store for which trusted set the direction was made.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from verl_gradalign.files import replacing
from verl_gradalign.probe.direction import Direction, mapped, require_same_shards
from verl_gradalign.probe.fsdp import local_part, shard_layout
from verl_gradalign.probe.gradient import trainable_parameters

VERSION = 2
"""Of {"version", "numbers": {field of Direction: its value}, "layout": fsdp.shard_layout, "shards": {parameter: tensor
or None}}. Readers ignore numbers they do not know and take defaults for those that are missing; raise it where that
would be wrong. Version 1 was one file of whole parameters, `WHOLE`, which rank 0 wrote and all ranks read."""
WHOLE = "gradalign_direction.pt"
RANK_FILE = re.compile(r"gradalign_direction_world_size_(\d+)_rank_(\d+)\.pt")
REMEDY = "Remedy: delete the checkpoint's gradalign_direction files to make a new direction"


def rank_file(folder: Path, rank: int, world_size: int) -> Path:
    """Return where a rank's shards lie in the folder of the actor's checkpoint, named as verl names its own."""
    return folder / f"gradalign_direction_world_size_{world_size}_rank_{rank}.pt"


def has_direction(folder: Path, rank: int, world_size: int) -> bool:
    """Return whether this rank can see its shards.

    Raises: ValueError if there are only files of another number of ranks, or of an earlier version.
    """
    if rank_file(folder, rank, world_size).exists():
        return True
    if (folder / WHOLE).exists():
        needed = f"version {VERSION}, one file per rank, is needed"
        remedy = f"{REMEDY}, or resume with the verl-gradalign that wrote it"
        raise ValueError(f"{folder / WHOLE} has version 1, one file for all ranks, but {needed}. {remedy}")
    for path, match in _rank_files(folder):
        if int(match[1]) != world_size:
            remedy = f"{REMEDY}, or resume on {match[1]} ranks, as verl's own checkpoint asks for"
            raise ValueError(f"{path} was written by one of {match[1]} ranks, but {world_size} ranks run now. {remedy}")
    return False


def remove_directions(folder: Path, rank: int, world_size: int) -> None:
    """Remove what earlier runs saved in the folder. Each rank removes its part, so that none waits for another."""
    (folder / WHOLE).unlink(missing_ok=True)
    for path, match in _rank_files(folder):
        # By rank: another rank may have written its own file already.
        if int(match[2]) % world_size == rank:
            path.unlink(missing_ok=True)


def save_direction(module: nn.Module, direction: Direction, path: Path) -> None:
    """Write this rank's shards to `path`, replacing what is there; call it while sharded. No rank waits for another.

    The file replaces the old one as a whole: a run killed meanwhile leaves the old one, and at most a file with
    `.unfinished` after its name.

    Units: 4 bytes per trainable number of this rank in float32, 8 in float64.
    Raises: RuntimeError if the direction was made for other parameters or shards; OSError if it cannot write.
    """
    require_same_shards(module, direction)
    numbers = {field.name: getattr(direction, field.name) for field in fields(Direction) if field.name != "shards"}
    # Clones: a shard can be a view of a larger tensor, which torch.save would write in its stead.
    clones = mapped(lambda shard: shard.detach().cpu().clone(), direction.shards)
    shards = {name: clone for (name, _), clone in zip(trainable_parameters(module), clones, strict=True)}
    content = {"version": VERSION, "numbers": numbers, "layout": shard_layout(module), "shards": shards}
    with replacing(path, is_durable=True) as unfinished, unfinished.open("wb") as stream:
        torch.save(content, stream)


def load_direction(module: nn.Module, path: Path) -> Direction:
    """Return the direction in this rank's file; call it while sharded. No rank waits for another.

    The shards are on the parameters' device, in their dtype. The values are not checked for damage.

    Raises: FileNotFoundError without the file; ValueError, with the remedy, if it is not a complete direction, or was
        saved of other parameters, or of other parts of them, than this rank has in `module`.
    """
    content = _read(path)
    _require_same_layout(shard_layout(module), content["layout"], path)
    shards: list[Tensor | None] = []
    for name, parameter in trainable_parameters(module):
        if name not in content["shards"]:
            raise _unreadable(path, f"it lacks the shard of {name}")
        saved, local = content["shards"][name], local_part(parameter)
        if saved is not None and saved.shape != local.shape:
            raise _unreadable(path, f"{name} has shape {tuple(saved.shape)}")
        # A copy: the file's memory is not kept.
        shards.append(None if saved is None else saved.to(local.device, local.dtype, copy=True))
    known = {field.name for field in fields(Direction)} - {"shards"}
    return Direction(tuple(shards), **{name: value for name, value in content["numbers"].items() if name in known})


def _rank_files(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """Return every rank's file in the folder, with its world size and rank."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(path, match) for path in paths if (match := RANK_FILE.fullmatch(path.name))]


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb"):
        pass  # a file that is missing or forbidden is not a damaged one
    try:
        # Mapped, not read: each shard is copied once, to the device where it belongs.
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch and pickle raise nearly every kind, OSError too, depending on what is damaged
        raise _unreadable(path, f"{type(error).__name__}: {error}".splitlines()[0]) from error
    if not isinstance(content, dict) or "version" not in content:
        raise _unreadable(path, "it has no version")
    if content["version"] != VERSION:
        raise ValueError(f"{path} has version {content['version']!r}, but version {VERSION} is needed. {REMEDY}")
    shards, layout, numbers = content.get("shards"), content.get("layout"), content.get("numbers")
    are_shards = isinstance(shards, dict) and all(isinstance(shard, Tensor | None) for shard in shards.values())
    has_norm = isinstance(numbers, dict) and isinstance(numbers.get("norm"), float)
    if not (are_shards and has_norm and isinstance(layout, dict)):
        raise _unreadable(path, "it lacks the norm, layout or shards")
    return content


def _unreadable(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} cannot be read as a direction ({reason}). {REMEDY}")


def _require_same_layout(current: Mapping[str, str], saved: Mapping[str, str], path: Path) -> None:
    """Raise ValueError, naming the first parameter that differs, unless this rank holds the same parts of the same."""
    for name in (*current, *saved):
        if name not in saved:
            raise ValueError(f"{name} is trainable, but {path} has no direction for it. {REMEDY}")
        if name not in current:
            raise ValueError(f"{path} has a direction for {name}, which is no trainable parameter. {REMEDY}")
        if saved[name] != current[name]:
            raise ValueError(f"this rank has of {name} {current[name]}, but in {path} {saved[name]}. {REMEDY}")
