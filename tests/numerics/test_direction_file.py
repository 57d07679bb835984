# SPDX-License-Identifier: Apache-2.0
"""A direction comes back from its file bit for bit, or is refused with the remedy; a new file never costs the old one.

Sharded modules: tests/distributed/test_direction_file.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.numerics.models import make_model
from tests.numerics.problems import TEMPERATURE, draw_problem, tabulate
from verl_gradalign.probe.direction import Direction, compute_direction, require_same_shards
from verl_gradalign.probe.direction_file import load_direction, save_direction
from verl_gradalign.probe.gradient import leave_no_trace, trainable_parameters
from verl_gradalign.probe.plain_engine import PlainEngine

REMEDY = "delete the file to make a new direction"
HEADER_BYTES = 20_000
"""More than a file of a few dozen tensors has beside their values."""


def make_direction(model: nn.Module) -> Direction:
    rows, shares = tabulate([draw_problem([3, 2], seed=0)])
    with leave_no_trace(model):
        return compute_direction(PlainEngine(model, rows, TEMPERATURE), shares)


def save(model: nn.Module, direction: Direction, path: Path) -> None:
    save_direction(model, direction, path, is_writer=True)


def require_equal(actual: Direction, expected: Direction) -> None:
    # As text, because nan equals nan there.
    assert repr(replace(actual, shards=())) == repr(replace(expected, shards=()))
    assert len(actual.shards) == len(expected.shards)
    for found, wanted in zip(actual.shards, expected.shards, strict=True):
        assert found is not None and wanted is not None
        assert (found.dtype, found.shape, found.is_contiguous()) == (wanted.dtype, wanted.shape, True)
        assert found.numpy().tobytes() == wanted.contiguous().numpy().tobytes()


@pytest.fixture(scope="module")
def direction(model: nn.Module) -> Direction:
    return make_direction(model)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "direction.pt"


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "lora", "norms-frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_comes_back_bit_for_bit(name: str, dtype: torch.dtype, path: Path) -> None:
    model = make_model(name).to(dtype)
    direction = make_direction(model)
    save(model, direction, path)
    loaded = load_direction(model, path)
    require_equal(loaded, direction)
    require_same_shards(model, loaded)


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_a_degenerate_direction_comes_back_degenerate(model: nn.Module, norm: float, path: Path) -> None:
    shards = tuple(torch.zeros_like(parameter) for _, parameter in trainable_parameters(model))
    direction = Direction(shards, norm)
    save(model, direction, path)
    loaded = load_direction(model, path)
    require_equal(loaded, direction)
    assert loaded.is_degenerate


def test_a_parameter_without_gradient_comes_back_as_zeros(model: nn.Module, direction: Direction, path: Path) -> None:
    without = replace(direction, shards=(None, *direction.shards[1:]))
    save(model, without, path)
    zeros = torch.zeros_like(direction.shards[0])
    require_equal(load_direction(model, path), replace(direction, shards=(zeros, *direction.shards[1:])))


def test_the_file_takes_4_bytes_per_trainable_parameter_in_fp32(path: Path) -> None:
    model = make_model("qwen2-tied").float()
    save(model, make_direction(model), path)
    num_numbers = sum(parameter.numel() for parameter in model.parameters())
    assert 4 * num_numbers < path.stat().st_size < 4 * num_numbers + HEADER_BYTES


def test_loaded_shards_keep_only_their_own_memory(model: nn.Module, direction: Direction, path: Path) -> None:
    save(model, direction, path)
    for shard in load_direction(model, path).shards:
        assert shard is not None
        assert shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()


def test_only_the_writer_writes(model: nn.Module, direction: Direction, path: Path) -> None:
    save_direction(model, direction, path, is_writer=False)
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_is_missing_is_made(model: nn.Module, direction: Direction, tmp_path: Path) -> None:
    path = tmp_path / "global_step_3" / "gradalign" / "direction.pt"
    save(model, direction, path)
    load_direction(model, path)


def test_numbers_beside_the_norm_come_back(model: nn.Module, direction: Direction, path: Path) -> None:
    refreshed = replace(direction, num_refreshes=5)
    save(model, refreshed, path)
    require_equal(load_direction(model, path), refreshed)


def test_a_file_with_more_numbers_or_fewer_is_read(model: nn.Module, direction: Direction, path: Path) -> None:
    save(model, replace(direction, num_refreshes=5), path)
    rewrite(path, lambda content: content.update(step=3, numbers={"norm": direction.norm, "of_another_version": 3}))
    require_equal(load_direction(model, path), direction)


@pytest.mark.parametrize("interrupted", ["save", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file(
    model: nn.Module, direction: Direction, path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    negated = Direction(tuple(None if shard is None else -shard for shard in direction.shards), 2.0)
    save(model, direction, path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch if interrupted == "save" else os, interrupted, stop)
        with pytest.raises(KeyboardInterrupt):
            save(model, negated, path)
    assert list(path.parent.iterdir()) == [path]
    require_equal(load_direction(model, path), direction)
    save(model, negated, path)
    require_equal(load_direction(model, path), negated)


def test_what_a_killed_save_left_over_does_not_hinder_the_next(
    model: nn.Module, direction: Direction, path: Path
) -> None:
    path.with_name(f"{path.name}.unfinished").write_bytes(b"half of a file")
    save(model, direction, path)
    require_equal(load_direction(model, path), direction)
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_told_from_a_damaged_one(model: nn.Module, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_direction(model, path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_with_the_remedy(
    model: nn.Module, direction: Direction, path: Path, kept: float
) -> None:
    save(model, direction, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    require_refusal(model, path)


@pytest.mark.parametrize(
    "content", [["no", "direction"], {}, {"version": 1}, {"version": 1, "tensors": {}, "numbers": {}}]
)
def test_a_file_of_something_else_is_refused_with_the_remedy(model: nn.Module, path: Path, content: Any) -> None:
    torch.save(content, path)
    require_refusal(model, path)


def test_a_file_of_another_version_is_refused_with_the_remedy(
    model: nn.Module, direction: Direction, path: Path
) -> None:
    save(model, direction, path)
    rewrite(path, lambda content: content.update(version=2))
    require_refusal(model, path, "version 2")


def test_a_missing_parameter_is_refused_with_the_remedy(path: Path) -> None:
    tied, untied = make_model("qwen2-tied"), make_model("qwen2-untied")
    save(tied, make_direction(tied), path)
    name = "model.embed_tokens.weight"  # the tied one is kept under the other name
    require_refusal(untied, path, name)


def test_an_unknown_parameter_is_refused_with_the_remedy(path: Path) -> None:
    tied, untied = make_model("qwen2-tied"), make_model("qwen2-untied")
    save(untied, make_direction(untied), path)
    require_refusal(tied, path, "model.embed_tokens.weight")


def test_a_parameter_of_another_shape_is_refused_with_the_remedy(
    model: nn.Module, direction: Direction, path: Path
) -> None:
    save(model, direction, path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(path, lambda content: content["tensors"].update({name: content["tensors"][name].T.contiguous()}))
    require_refusal(model, path, name, "(24, 16)", "(16, 24)")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def require_refusal(model: nn.Module, path: Path, *parts: str) -> None:
    with pytest.raises(ValueError) as refusal:
        load_direction(model, path)
    for part in (str(path), REMEDY, *parts):
        assert part in str(refusal.value)
