# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs, and what it counts holds: memory and collectives, which do not depend on the machine's mood."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.matrix_scores import MAX_GRADIENT_ELEMENTS

pytestmark = pytest.mark.dist

TIMEOUT_S = 300  # measured 30 s
# The gradients formed at a time: the largest layer's, or as many as the cache holds where layers are as small as here.
FORMED_BYTES = 4 * max(512 * 128, MAX_GRADIENT_ELEMENTS["cpu"])


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    """Return {(ranks, method): record} of the smallest sweep."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = [sys.executable, "-m", "tests.benchmarks.score_vs_update", "--engine", "plain", "--sweeps", "smoke"]
    command += ["--repeats", "1", "--out", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "score_vs_update.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return {(record["num_ranks"], record["method"]): record for record in found}


def test_every_method_is_measured_on_one_rank_and_on_two(records: dict[tuple[int, str], dict[str, Any]]) -> None:
    methods = {"update", "ghost, sums only", *ESTIMATORS}
    assert set(records) == {(ranks, method) for ranks in (1, 2) for method in methods}
    assert all(record["seconds"] > 0 and record["tokens_per_second"] > 0 for record in records.values())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["ghost", "ghost, sums only", "finite_difference", "output_layer", "low_rank"])
def test_scoring_holds_no_more_than_the_update_and_the_direction_and_a_layer(
    records: dict[tuple[int, str], dict[str, Any]], method: str, ranks: int
) -> None:
    update, scoring = records[ranks, "update"], records[ranks, method]
    # `ghost` gathers the direction once for all passes where that fits, which on a CPU it is taken to do.
    is_whole = method.startswith("ghost")
    direction_bytes = 4 * update["num_parameters"] // (1 if is_whole else ranks)
    assert scoring["peak_bytes"] <= update["peak_bytes"] + direction_bytes + FORMED_BYTES


def test_ghost_reduces_no_gradient(records: dict[tuple[int, str], dict[str, Any]]) -> None:
    assert any("reduce_scatter" in name for name in records[2, "update"]["collectives"])
    assert not any("reduce_scatter" in name for name in records[2, "ghost"]["collectives"])


def test_the_baseline_communicates_once_per_problem(records: dict[tuple[int, str], dict[str, Any]]) -> None:
    baseline, update = (records[2, method]["collectives"] for method in ("backward", "update"))
    (name,) = (name for name in update if "reduce_scatter" in name)
    assert baseline[name] == records[2, "update"]["num_problems"] * update[name]
