# SPDX-License-Identifier: Apache-2.0
"""A rank's direction comes back from its file bit for bit, or is refused with the remedy; no save costs the old file.

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
from verl_gradalign.probe.direction_file import (
    has_direction,
    load_direction,
    rank_file,
    remove_directions,
    save_direction,
)
from verl_gradalign.probe.gradient import leave_no_trace, trainable_parameters
from verl_gradalign.probe.plain_engine import PlainEngine

REMEDY = "Remedy: delete the checkpoint's gradalign_direction files to make a new direction"
HEADER_BYTES = 20_000
"""More than a file of a few dozen tensors has beside their values."""


def make_direction(model: nn.Module) -> Direction:
    rows, shares = tabulate([draw_problem([3, 2], seed=0)])
    with leave_no_trace(model):
        return compute_direction(PlainEngine(model, rows, TEMPERATURE), shares)


def require_equal(actual: Direction, expected: Direction) -> None:
    # As text, because nan equals nan there.
    assert repr(replace(actual, shards=())) == repr(replace(expected, shards=()))
    assert len(actual.shards) == len(expected.shards)
    for found, wanted in zip(actual.shards, expected.shards, strict=True):
        if found is None or wanted is None:
            assert found is wanted
            continue
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
    save_direction(model, direction, path)
    loaded = load_direction(model, path)
    require_equal(loaded, direction)
    require_same_shards(model, loaded)


@pytest.mark.parametrize("norm", [0.0, math.inf, math.nan])
def test_a_degenerate_direction_comes_back_degenerate(model: nn.Module, norm: float, path: Path) -> None:
    shards = tuple(torch.zeros_like(parameter) for _, parameter in trainable_parameters(model))
    direction = Direction(shards, norm)
    save_direction(model, direction, path)
    loaded = load_direction(model, path)
    require_equal(loaded, direction)
    assert loaded.is_degenerate


def test_a_parameter_without_gradient_comes_back_without(model: nn.Module, direction: Direction, path: Path) -> None:
    without = replace(direction, shards=(None, *direction.shards[1:]))
    save_direction(model, without, path)
    require_equal(load_direction(model, path), without)


def test_the_file_takes_4_bytes_per_trainable_parameter_in_fp32(path: Path) -> None:
    model = make_model("qwen2-tied").float()
    save_direction(model, make_direction(model), path)
    num_numbers = sum(parameter.numel() for parameter in model.parameters())
    assert 4 * num_numbers < path.stat().st_size < 4 * num_numbers + HEADER_BYTES


def test_loaded_shards_keep_only_their_own_memory(model: nn.Module, direction: Direction, path: Path) -> None:
    save_direction(model, direction, path)
    for shard in load_direction(model, path).shards:
        assert shard is not None
        assert shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()


def test_a_view_of_a_larger_tensor_is_written_alone(model: nn.Module, direction: Direction, path: Path) -> None:
    shards = [s for s in direction.shards if s is not None]
    wide = tuple(torch.cat([s.flatten()] * 9)[: s.numel()].view(s.shape) for s in shards)
    save_direction(model, direction, path)
    num_bytes = path.stat().st_size
    save_direction(model, replace(direction, shards=wide), path)
    assert path.stat().st_size == num_bytes


def test_every_rank_has_a_file_of_its_own_and_none_is_no_error(tmp_path: Path) -> None:
    assert not has_direction(tmp_path / "missing", 0, 2) and not has_direction(tmp_path, 0, 2)
    paths = {rank_file(tmp_path, rank, 2) for rank in (0, 1)}
    assert len(paths) == 2
    rank_file(tmp_path, 1, 2).touch()
    assert has_direction(tmp_path, 1, 2) and not has_direction(tmp_path, 0, 2)


def test_a_file_of_another_number_of_ranks_is_refused_with_the_remedy(tmp_path: Path) -> None:
    saved = rank_file(tmp_path, 0, 4)
    saved.touch()
    with pytest.raises(ValueError) as refusal:
        has_direction(tmp_path, 0, 2)
    for part in (str(saved), "4 ranks", "2 ranks", REMEDY):
        assert part in str(refusal.value)


def test_the_file_of_an_earlier_version_is_refused_with_its_version_and_the_remedy(tmp_path: Path) -> None:
    earlier = tmp_path / "gradalign_direction.pt"
    torch.save({"version": 1, "numbers": {"norm": 1.0}, "tensors": {}}, earlier)
    with pytest.raises(ValueError) as refusal:
        has_direction(tmp_path, 0, 2)
    for part in (str(earlier), "version 1", "version 2", REMEDY):
        assert part in str(refusal.value)


def test_ranks_together_remove_what_any_number_of_ranks_left_and_nothing_else(tmp_path: Path) -> None:
    others = {tmp_path / "model_world_size_2_rank_0.pt", rank_file(tmp_path, 1, 2)}
    for path in {*others, tmp_path / "gradalign_direction.pt", *(rank_file(tmp_path, rank, 4) for rank in range(4))}:
        path.touch()
    remove_directions(tmp_path, 0, 2)
    assert rank_file(tmp_path, 1, 2).exists()  # which another rank may have written already
    remove_directions(tmp_path, 1, 2)
    assert set(tmp_path.iterdir()) == {tmp_path / "model_world_size_2_rank_0.pt"}
    remove_directions(tmp_path / "missing", 0, 2)


def test_a_folder_that_is_missing_is_made(model: nn.Module, direction: Direction, tmp_path: Path) -> None:
    path = tmp_path / "global_step_3" / "gradalign" / "direction.pt"
    save_direction(model, direction, path)
    load_direction(model, path)


def test_numbers_beside_the_norm_come_back(model: nn.Module, direction: Direction, path: Path) -> None:
    refreshed = replace(direction, num_refreshes=5)
    save_direction(model, refreshed, path)
    require_equal(load_direction(model, path), refreshed)


def test_a_file_with_more_numbers_or_fewer_is_read(model: nn.Module, direction: Direction, path: Path) -> None:
    save_direction(model, replace(direction, num_refreshes=5), path)
    rewrite(path, lambda content: content.update(step=3, numbers={"norm": direction.norm, "of_another_version": 3}))
    require_equal(load_direction(model, path), direction)


@pytest.mark.parametrize("interrupted", ["save", "fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_file(
    model: nn.Module, direction: Direction, path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    negated = Direction(tuple(None if shard is None else -shard for shard in direction.shards), 2.0)
    save_direction(model, direction, path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch if interrupted == "save" else os, interrupted, stop)
        with pytest.raises(KeyboardInterrupt):
            save_direction(model, negated, path)
    assert list(path.parent.iterdir()) == [path]
    require_equal(load_direction(model, path), direction)
    save_direction(model, negated, path)
    require_equal(load_direction(model, path), negated)


def test_what_a_killed_save_left_over_does_not_hinder_the_next(
    model: nn.Module, direction: Direction, path: Path
) -> None:
    path.with_name(f"{path.name}.unfinished").write_bytes(b"half of a file")
    save_direction(model, direction, path)
    require_equal(load_direction(model, path), direction)
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_told_from_a_damaged_one(model: nn.Module, path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_direction(model, path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused_with_the_remedy(
    model: nn.Module, direction: Direction, path: Path, kept: float
) -> None:
    save_direction(model, direction, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    require_refusal(model, path)


@pytest.mark.parametrize(
    "content", [["no", "direction"], {}, {"version": 2}, {"version": 2, "layout": {}, "shards": {}, "numbers": {}}]
)
def test_a_file_of_something_else_is_refused_with_the_remedy(model: nn.Module, path: Path, content: Any) -> None:
    torch.save(content, path)
    require_refusal(model, path)


def test_a_file_of_another_version_is_refused_with_the_remedy(
    model: nn.Module, direction: Direction, path: Path
) -> None:
    save_direction(model, direction, path)
    rewrite(path, lambda content: content.update(version=3))
    require_refusal(model, path, "version 3", "version 2")


def test_a_missing_parameter_is_refused_with_the_remedy(path: Path) -> None:
    tied, untied = make_model("qwen2-tied"), make_model("qwen2-untied")
    save_direction(tied, make_direction(tied), path)
    name = "model.embed_tokens.weight"  # the tied one is kept under the other name
    require_refusal(untied, path, name)


def test_an_unknown_parameter_is_refused_with_the_remedy(path: Path) -> None:
    tied, untied = make_model("qwen2-tied"), make_model("qwen2-untied")
    save_direction(untied, make_direction(untied), path)
    require_refusal(tied, path, "model.embed_tokens.weight")


def test_a_parameter_of_another_shape_is_refused_with_the_remedy(
    model: nn.Module, direction: Direction, path: Path
) -> None:
    save_direction(model, direction, path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(path, lambda content: content["layout"].update({name: "all of shape (16, 24)"}))
    require_refusal(model, path, name, "(24, 16)", "(16, 24)")


def test_shards_that_do_not_fit_their_own_layout_are_refused_with_the_remedy(
    model: nn.Module, direction: Direction, path: Path
) -> None:
    save_direction(model, direction, path)
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(path, lambda content: content["shards"].update({name: content["shards"][name].T.contiguous()}))
    require_refusal(model, path, name, "(16, 24)")
    rewrite(path, lambda content: content["shards"].pop(name))
    require_refusal(model, path, name)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def require_refusal(model: nn.Module, path: Path, *parts: str) -> None:
    with pytest.raises(ValueError) as refusal:
        load_direction(model, path)
    for part in (str(path), REMEDY, *parts):
        assert part in str(refusal.value)
