# SPDX-License-Identifier: Apache-2.0
"""One group of processes per world size runs all cases of `fsdp_cases.py`; the tests assert on what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.setups import build_models, oracle_scores, reference_model

TIMEOUT_S = 540  # measured 50 s on two quiet cores
REPOSITORY = Path(__file__).parents[2]

RunGroup = Callable[[int], dict[str, Any]]
Oracle = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp")
    build_models(folder)
    return folder


@pytest.fixture(scope="session")
def run_group(root: Path) -> RunGroup:
    @cache
    def run(world_size: int) -> dict[str, Any]:
        """Return {case: what it measured} of a group of `world_size` processes."""
        environment = {
            **os.environ,
            "VERL_PLATFORM": "cpu",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
        }
        logs = [root / f"log-{world_size}-{rank}" for rank in range(world_size)]
        processes = []
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.distributed.fsdp_cases", str(rank), str(world_size), str(root)]
            with log.open("w") as stream:
                processes.append(
                    subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=stream, stderr=subprocess.STDOUT)
                )
        try:
            codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
        return json.loads((root / f"results-{world_size}.json").read_text())

    return run


@pytest.fixture(scope="session")
def oracle(root: Path) -> Oracle:
    @cache
    def scores(model: str, has_adapters: bool = False, part: str = "") -> dict[str, Any]:
        """Return the oracle's scores of CANDIDATES, of the parameters named `part` alone if given."""
        return oracle_scores(reference_model(root, model, has_adapters), part=part)

    return scores


@pytest.fixture(params=[1, 2], ids=["1-rank", "2-ranks"], scope="session")
def world_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="session")
def results(world_size: int, run_group: RunGroup) -> dict[str, Any]:
    return run_group(world_size)
