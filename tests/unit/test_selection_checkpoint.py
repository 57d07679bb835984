# SPDX-License-Identifier: Apache-2.0
"""The selection's state: written whole or not at all, and refused where it belongs to something else."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.files import file_fingerprint
from verl_gradalign.selection.curriculum import Curriculum
from verl_gradalign.selection.history import ProblemRecord
from verl_gradalign.selection.state_file import (
    load_state,
    read_identity,
    require_same,
    save_state,
)

IDENTITY = {"gradalign": {"score": "cosine", "probe": {"rank": 16}}, "data.train_files": ["abc"]}
STATE = {
    "direction_step": 3,
    "nothing": None,
    "unknown": float("nan"),
    "record": {"count": np.arange(5, dtype=np.int32), "mean": np.linspace(0, 1, 5)},
    "place": (2, 7),
    "in_flight": [{"uid": "a", "problem_id": np.int64(4)}],
}


def test_a_state_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "global_step_3" / "gradalign.npz"
    save_state(path, IDENTITY, STATE)
    state = load_state(path)
    assert state["direction_step"] == 3 and state["nothing"] is None and np.isnan(state["unknown"])
    assert state["place"] == [2, 7] and state["in_flight"] == [{"uid": "a", "problem_id": 4}]
    for name, values in STATE["record"].items():
        np.testing.assert_array_equal(state["record"][name], values)
        assert state["record"][name].dtype == values.dtype
    assert read_identity(path) == IDENTITY


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_interruption_leaves_the_old_state(tmp_path, monkeypatch, moment):
    path = tmp_path / "gradalign.npz"
    save_state(path, IDENTITY, {"step": 1})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_state(path, IDENTITY, {"step": 2})
    assert load_state(path) == {"step": 1}


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"PK not a zip" + b[10:]])
def test_a_damaged_file_is_refused_with_the_remedy(tmp_path, damage):
    path = tmp_path / "gradalign.npz"
    save_state(path, IDENTITY, STATE)
    path.write_bytes(damage(path.read_bytes()))
    for read in (load_state, read_identity):
        with pytest.raises(ValueError, match=r"gradalign\.npz cannot be read.*Remedy: delete"):
            read(path)


def test_a_mismatch_names_every_difference_with_both_values(tmp_path):
    path = tmp_path / "gradalign.npz"
    other = {
        "gradalign": {"score": "dot", "probe": {"rank": 16}},
        "data.train_files": ["xyz"],
        "versions": {"verl": "1"},
    }
    require_same(path, IDENTITY, IDENTITY)
    with pytest.raises(ValueError) as refusal:
        require_same(path, IDENTITY, other)
    message = str(refusal.value)
    assert "gradalign.score was 'cosine', is 'dot'" in message
    assert "data.train_files was ['abc'], is ['xyz']" in message
    assert "versions.verl was 'absent', is '1'" in message
    assert "rank" not in message and "Remedy" in message


def test_a_fingerprint_is_of_the_content(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"problems")
    second.write_bytes(b"problems")
    assert file_fingerprint(first) == file_fingerprint(second)
    second.write_bytes(b"problemz")
    assert file_fingerprint(first) != file_fingerprint(second)


def test_the_state_of_ten_million_problems_is_saved_and_loaded_in_under_thirty_seconds(tmp_path):
    num = 10_000_000
    config = GradAlignConfig.from_mapping(
        {"schedule": "once", "curriculum": {"keep": 0.25}, "validation": {"files": ["x"]}}
    )
    ids = np.arange(num)
    curriculum, record = Curriculum(config, ids, 128), ProblemRecord(num)
    draw = curriculum.draw(1)
    curriculum.keep(1, ids[: draw.num_kept])
    record.add(ids[::3], np.random.default_rng(0).standard_normal(len(ids[::3])))
    started = time.perf_counter()
    path = tmp_path / "gradalign.npz"
    save_state(path, IDENTITY, {"record": record.state(), "curriculum": curriculum.state()})
    state = load_state(path)
    restored = ProblemRecord(num)
    restored.restore(state["record"])
    again = Curriculum(config, ids, 128)
    again.restore(state["curriculum"])
    seconds = time.perf_counter() - started
    assert seconds < 30, seconds
    np.testing.assert_array_equal(restored.mean_A, record.mean_A)
    assert again.draw(2) == curriculum.draw(2)


def test_a_state_that_an_earlier_version_wrote_is_read():
    """Of nine steps of schedule round, by commit 6f7c359."""
    path = Path(__file__).parent / "files" / "written_by_6f7c359" / "gradalign.npz"
    assert read_identity(path)["gradalign"]["schedule"] == "round"
    state = load_state(path)
    record = ProblemRecord(len(state["chooser"]["record"]["count"]))
    record.restore(state["chooser"]["record"])
    assert record.count_A.sum() > 24 and np.isfinite(record.mean_A).all()
    assert state["direction_step"] == 7 and state["num_scorings"] == 3 and state["in_flight"] == []
