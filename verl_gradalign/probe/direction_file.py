# SPDX-License-Identifier: Apache-2.0
"""A direction as one file that any number of ranks and any kind of sharding can read.

It holds whole parameters by their names in the unwrapped model, so that a run goes on from it after it was stopped. It
does not decide when to save, nor where; and it does not store for which trusted set the direction was made.

    with leave_no_trace(module):
        save_direction(module, direction, path, is_writer=rank == 0)
        direction = load_direction(module, path)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from verl_gradalign.files import replacing
from verl_gradalign.probe.direction import Direction, require_same_shards
from verl_gradalign.probe.gradient import trainable_parameters
from verl_gradalign.probe.sharding import DirectionGather, Placement, trainable_placements

__all__ = ["load_direction", "save_direction"]

VERSION = 1
"""Of the layout {"version", "numbers": {field of Direction: its value}, "tensors": {parameter: its direction}}. Readers
ignore numbers they do not know and take defaults for those that are missing; raise it where that would be wrong."""
REMEDY = "delete the file to make a new direction"


def save_direction(module: nn.Module, direction: Direction, path: Path, is_writer: bool) -> None:
    """Write the direction to `path`, replacing what is there. Collective over the shard group; call it while sharded.

    Parameters are gathered one at a time, under FSDP1 one flat parameter at a time. Only the writer keeps them, in CPU
    memory until the file is complete; the other ranks return before that. Where the direction has no gradient of a
    parameter, zeros are written. The file replaces the old one as a whole: a run killed meanwhile leaves the old one,
    and at most a file with `.unfinished` after its name.

    Units: the file and the writer's CPU memory take 4 bytes per trainable parameter in float32, 8 in float64.
    Raises: RuntimeError if the direction was made for other parameters or shards; OSError on the writer if it cannot
        write.
    """
    gather = DirectionGather(module, direction, next(module.parameters()).device)
    tensors = {}
    for name, placement in _named_placements(module).items():
        whole = gather(placement)
        if is_writer:
            # A copy: what was gathered can be a view of a whole layer, which would be written in its stead.
            tensors[name] = whole.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if is_writer:
        numbers = {field.name: getattr(direction, field.name) for field in fields(Direction) if field.name != "shards"}
        _write({"version": VERSION, "numbers": numbers, "tensors": tensors}, path)


def load_direction(module: nn.Module, path: Path) -> Direction:
    """Return the direction in the file as this rank's shards; call it while sharded. No rank waits for another.

    The shards are as `compute_direction` makes them in this module, whatever it was saved from: in number, order,
    shape, dtype and device, with zeros in padding. Every rank maps the file and copies its own shards only. The values
    are not checked for damage, which would take reading the whole file on every rank.

    Raises: FileNotFoundError without the file; ValueError if it is not a complete direction, or is one of other
        parameters than are trainable in `module`, with the remedy.
    """
    content = _read(path)
    placements = _named_placements(module)
    _require_same_parameters(placements, content["tensors"], path)
    parameters = [parameter for _, parameter in trainable_parameters(module)]
    shards: list[Tensor | None] = [None] * len(parameters)
    for name, placement in placements.items():
        index, whole = placement.parameter, content["tensors"][name]
        parameter = parameters[index]
        if placement.handle is None:
            shards[index] = _copy_like(parameter, _local_part(parameter, whole))
        elif placement.handle._use_orig_params:
            piece, _ = _flat_piece(placement, whole)
            # A rank without any of a parameter has no gradient of it.
            shards[index] = None if piece is None else _copy_like(parameter, piece.view(parameter.shape))
        else:
            flat = shards[index]
            if flat is None:
                flat = shards[index] = torch.zeros_like(parameter, requires_grad=False)
            piece, offset = _flat_piece(placement, whole)
            if piece is not None:
                flat[offset : offset + piece.numel()] = piece
    known = {field.name for field in fields(Direction)} - {"shards"}
    numbers = {name: value for name, value in content["numbers"].items() if name in known}
    direction = Direction(shards=tuple(shards), **numbers)
    require_same_shards(module, direction)
    return direction


def _named_placements(module: nn.Module) -> dict[str, Placement]:
    """Return one placement of each trainable parameter, by a name that is the same under every kind of sharding."""
    uses: dict[tuple[int, int], list[Placement]] = {}
    for placement in trainable_placements(module):
        uses.setdefault(placement.identity, []).append(placement)
    # One name of a tied parameter, whatever the order of its uses.
    return {min(use.name for use in of_one): of_one[0] for of_one in uses.values()}


def _write(content: dict[str, Any], path: Path) -> None:
    with replacing(path, is_durable=True) as unfinished, unfinished.open("wb") as stream:
        torch.save(content, stream)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb"):
        pass  # a file that is missing or forbidden is not a damaged one
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch and pickle raise nearly every kind, OSError too, depending on what is damaged
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} cannot be read as a direction ({reason}); {REMEDY}") from error
    if not isinstance(content, dict) or "version" not in content:
        raise ValueError(f"{path} cannot be read as a direction (it has no version); {REMEDY}")
    if content["version"] != VERSION:
        raise ValueError(f"{path} has version {content['version']!r}, but version {VERSION} is needed; {REMEDY}")
    tensors, numbers = content.get("tensors"), content.get("numbers")
    are_tensors = isinstance(tensors, dict) and all(isinstance(tensor, Tensor) for tensor in tensors.values())
    if not are_tensors or not isinstance(numbers, dict) or not isinstance(numbers.get("norm"), float):
        raise ValueError(f"{path} cannot be read as a direction (it lacks the norm or the tensors); {REMEDY}")
    return content


def _require_same_parameters(placements: Mapping[str, Placement], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError, naming the first culprit, unless the file has the model's trainable parameters."""
    for name, placement in placements.items():
        if name not in tensors:
            raise ValueError(f"{name} is trainable, but {path} has no direction for it; {REMEDY}")
        shape = tensors[name].shape
        if shape != placement.shape:
            raise ValueError(
                f"{name} has shape {tuple(placement.shape)}, but its direction in {path} has {tuple(shape)}; {REMEDY}"
            )
    for name in tensors:
        if name not in placements:
            raise ValueError(f"{path} has a direction for {name}, which is no trainable parameter; {REMEDY}")


def _local_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Return this rank's part of `whole` if it is sharded as `parameter` is, as a view."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, part = parameter.device_mesh, whole
    for axis, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Shard:  # a subclass would be cut in another order
            raise RuntimeError(f"a direction cannot be cut as {placement} of {parameter.placements} asks for")
        chunks = part.chunk(mesh.size(axis), placement.dim)
        rank = mesh.get_local_rank(axis)
        part = chunks[rank] if rank < len(chunks) else part.narrow(placement.dim, 0, 0)
    return part


def _flat_piece(placement: Placement, whole: Tensor) -> tuple[Tensor | None, int]:
    """Return what this rank's shard of an FSDP1 flat parameter has of `whole`, and where in the shard that begins."""
    where = placement.handle.flat_param._shard_param_infos[placement.view]
    if not where.in_shard:
        return None, 0
    return whole.flatten()[where.intra_param_start_idx : where.intra_param_end_idx + 1], where.offset_in_shard


def _copy_like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Return a copy of `part` with the parameter's dtype, on its device; the file's memory is not kept."""
    return part.to(parameter.device, parameter.dtype, copy=True, memory_format=torch.contiguous_format)
