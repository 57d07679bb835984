# SPDX-License-Identifier: Apache-2.0
"""Runs `tests.distributed.job` once per number of ranks: starting a process with verl costs more than all its cases."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT_S = 240
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def job_results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """Return a function from a number of ranks to each rank's results by case."""

    @functools.cache
    def run(world_size: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        environment = os.environ | {"VERL_PLATFORM": "cpu", "PYTHONPATH": str(ROOT)}
        logs = [folder / f"log-{rank}" for rank in range(world_size)]
        ranks = []
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "tests.distributed.job", str(rank), str(world_size), str(folder)]
            with log.open("w") as output:
                ranks.append(subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=environment))
        try:
            codes = [process.wait(timeout=TIMEOUT_S) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
        # Written by the job itself: scores, flags and tracebacks.
        return [torch.load(folder / f"results-{rank}.pt", weights_only=True) for rank in range(world_size)]

    return run
