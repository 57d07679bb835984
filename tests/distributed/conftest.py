# SPDX-License-Identifier: Apache-2.0
"""One group of processes per world size runs all cases of `fsdp_cases.py`; the tests assert on what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.setups import build_models, oracle_scores, reference_model

TIMEOUT_S = 540  # measured 120 s on two shared cores
WORLD_SIZES = (1, 2)
LARGE_GROUPS = (4, 8)
"""Processes of groups that run a few cases only, in the nightly tests."""
REPOSITORY = Path(__file__).parents[2]

RunGroup = Callable[[int], dict[str, Any]]
RunPart = Callable[[int, str], dict[str, Any]]
Oracle = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    build_models(folder)
    return folder


@pytest.fixture(scope="session")
def run_group(root: Path) -> Iterator[RunGroup]:
    # All at once: a group's ranks wait for each other, which leaves room for the other's.
    groups = {world_size: _start_group(root, world_size) for world_size in WORLD_SIZES}

    @cache
    def results_of(world_size: int) -> dict[str, Any]:
        """Return {case: what it measured} of the group of `world_size` processes."""
        return _results_of(root, groups[world_size])

    yield results_of
    for process in (process for group in groups.values() for process in group):
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def run_part(root: Path) -> RunPart:
    """Return what runs the cases with a part of their names in common, and no others, in so many processes."""
    return cache(lambda world_size, part: _results_of(root, _start_group(root, world_size, part)))


def _results_of(root: Path, group: list[subprocess.Popen[bytes]]) -> dict[str, Any]:
    """Wait for a group of processes, and return {case: what it measured}."""
    codes, world_size = [process.wait(timeout=TIMEOUT_S) for process in group], len(group)
    logs = "\n".join((root / f"log-{world_size}-{rank}").read_text()[-3000:] for rank in range(world_size))
    assert not any(codes), logs
    return json.loads((root / f"results-{world_size}.json").read_text())


def _start_group(root: Path, world_size: int, *cases: str) -> list[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "VERL_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    processes = []
    (root / f"store-{world_size}").unlink(missing_ok=True)  # of a group before
    for rank in range(world_size):
        command = [sys.executable, "-m", "tests.distributed.fsdp_cases", str(rank), str(world_size), str(root), *cases]
        with (root / f"log-{world_size}-{rank}").open("w") as stream:
            processes.append(
                subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            )
    return processes


@pytest.fixture(scope="session")
def oracle(root: Path) -> Oracle:
    @cache
    def scores(model: str, has_adapters: bool = False, part: str = "") -> dict[str, Any]:
        """Return the oracle's scores of CANDIDATES, of the parameters named `part` alone if given."""
        return oracle_scores(reference_model(root, model, has_adapters), part=part)

    return scores


@pytest.fixture(params=WORLD_SIZES, ids=["1-rank", "2-ranks"], scope="session")
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def results(world_size: int, run_group: RunGroup) -> dict[str, Any]:
    return run_group(world_size)
