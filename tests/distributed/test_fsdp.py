# SPDX-License-Identifier: Apache-2.0
"""Scores on verl's FSDP engine equal the oracle's, and scoring leaves no trace in the engine.

One group of processes per world size runs all cases of `fsdp_cases.py`; the tests assert on what it measured. The
names below repeat that module's, which is not imported: importing verl takes seconds that only the processes need.
"""

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

from tests.numerics.problems import build_model

pytestmark = pytest.mark.dist

RTOL_FLOAT64 = 1e-10  # measured 2e-14 for dot products, 1e-15 for norms
TIMEOUT_S = 300  # measured 35 s of CPU time per process
REPOSITORY = Path(__file__).parents[2]
STRATEGIES = ("fsdp", "fsdp-orig", "fsdp2")
MODES = ("plain", "checkpointed")
NEUTRALITY = ("plain-fp32", "checkpointed-fp32", "checkpointed-bf16")
SCORINGS = (
    "scored-without-gradient",
    "scored-with-gradient",
    "raises-at-once-without-gradient",
    "raises-between-without-gradient",
    "raises-between-with-gradient",
    "raises-late-with-gradient",
    "raises-in-backward-without-gradient",
    "raises-in-backward-with-gradient",
)

RunGroup = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="session")
def run_group(tmp_path_factory: pytest.TempPathFactory) -> RunGroup:
    root = tmp_path_factory.mktemp("fsdp")
    build_model(root / "qwen2", "qwen2", tie_word_embeddings=True)
    build_model(root / "qwen3", "qwen3", tie_word_embeddings=False)

    @cache
    def run(world_size: int) -> dict[str, Any]:
        """Return {case: what it measured} of a group of `world_size` processes."""
        environment = {**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
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


@pytest.fixture(params=[1, 2], ids=["1-rank", "2-ranks"], scope="session")
def results(request: pytest.FixtureRequest, run_group: RunGroup) -> dict[str, Any]:
    return run_group(request.param)


def case_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    assert "error" not in results[name], results[name]["error"]
    return results[name]


def largest_error(actual: list[float], expected: list[float]) -> float:
    return max(abs(a - e) / abs(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("batching", ["fixed", "dynamic", "turned"])
@pytest.mark.parametrize("model", ["qwen2", "qwen3"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_on_verls_engine_equal_the_oracle(
    results: dict[str, Any], strategy: str, mode: str, model: str, batching: str
) -> None:
    case = case_of(results, f"exact-{strategy}-{mode}-{model}")
    actual, expected = case[batching], case["expected"]
    for scores in (actual, expected):
        scores["cosine"] = [dot / norm for dot, norm in zip(scores["dot"], scores["norm"], strict=True)]
    errors = {key: largest_error(actual[key], expected[key]) for key in ("dot", "norm", "cosine")}
    errors["direction_norm"] = largest_error([actual["direction_norm"]], [expected["direction_norm"]])
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert actual["num_tokens"] == case["fixed"]["num_tokens"]
    assert actual["ranks_agree"]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("configuration", NEUTRALITY)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scoring_leaves_no_trace_in_verls_engine(
    results: dict[str, Any], strategy: str, configuration: str, scoring: str
) -> None:
    case = case_of(results, f"neutral-{strategy}-{configuration}")
    assert case[scoring]["changed"] == []


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("configuration", NEUTRALITY)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_next_training_step_is_that_of_an_engine_never_scored(
    results: dict[str, Any], strategy: str, configuration: str, scoring: str
) -> None:
    case = case_of(results, f"neutral-{strategy}-{configuration}")
    assert case[scoring]["differs_after_step"] == []
