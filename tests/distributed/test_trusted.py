# SPDX-License-Identifier: Apache-2.0
"""Directions of trusted sets, and halves of groups, on verl's FSDP engine: as on a plain model, on any number of ranks.

Shape legend: P problems, G all trainable numbers.
"""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.comparison import case_of, largest_errors
from tests.distributed.conftest import RunGroup
from tests.distributed.scoring import keys_of
from tests.distributed.setups import CANDIDATES, TRUSTED, TRUSTED_CONFIGS, exact_setups, reference_model
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, tabulate
from tests.numerics.test_trusted import split
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.trusted import trusted_direction, with_candidates_metric

pytestmark = pytest.mark.dist

RTOL_FLOAT64 = 1e-10  # measured 1e-13
SHARDINGS = ("fsdp", "fsdp-orig", "fsdp2")


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, dict[str, Any]]:
    """Scores and reports of the plain model."""
    model = reference_model(root, "qwen2", has_adapters=False)
    rows, shares = tabulate([*TRUSTED, *CANDIDATES])
    shares = [s if len(s.rows) < 2 else split([s])[0] for s in shares]
    trusted, candidates = shares[: len(TRUSTED)], shares[len(TRUSTED) :]
    found = {}
    for name, config in TRUSTED_CONFIGS.items():
        with leave_no_trace(model):
            engine = PlainEngine(model, rows, TEMPERATURE)
            sets, weights = {"first": trusted[:1], "rest": trusted[1:]}, {"first": 1.0, "rest": 0.5}
            direction, reports = trusted_direction(engine, sets, weights, config, None)
            if config.metric == "candidates":
                direction = with_candidates_metric(direction, engine, candidates)
            scores = ESTIMATORS["ghost"]().score(engine, candidates, direction)
        found[name] = {
            "dot": scores.dot_P.tolist(),
            "norm": None,
            "derivative": None,
            "direction_norm": scores.direction_norm,
            "reports": {set_name: astuple(report) for set_name, report in reports.items()},
        }
    return found


@pytest.mark.parametrize("kind", TRUSTED_CONFIGS)
@pytest.mark.parametrize("strategy", SHARDINGS)
def test_directions_of_trusted_sets_are_those_of_the_plain_model(
    results: dict[str, Any], expected: dict[str, Any], strategy: str, kind: str
) -> None:
    scores = case_of(results, f"trusted-{strategy}")[kind]
    errors = largest_errors(scores, expected[kind])
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert scores["ranks_agree"] and scores["reports"].keys() == expected[kind]["reports"].keys()
    for name, report in expected[kind]["reports"].items():
        assert scores["reports"][name] == pytest.approx(report, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("scoring", ["ghost-tight", "ghost-wide-turned", "backward"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_halves_are_told_apart_on_every_engine(root: Path, run_group: RunGroup, num_ranks: int, scoring: str) -> None:
    for name, setup in exact_setups(num_ranks).items():
        model = reference_model(root, setup.model, setup.has_adapters)
        total_G = torch.stack(problem_gradients_float64(model, TRUSTED, TEMPERATURE)).sum(0)
        halves = [keys_of("", 0, problem).halves for problem in CANDIDATES]
        scores = case_of(run_group(num_ranks), f"exact-{name}")[scoring]
        for index, (problem, half) in enumerate(zip(CANDIDATES, halves, strict=True)):
            found = torch.tensor(scores["half_dot"][index], dtype=torch.float64)
            if len(set(half)) < 2:
                assert found.isnan().all()
                continue
            parts = [[row for row, which in zip(problem, half, strict=True) if which == h] for h in (0, 1)]
            gradient_2G = torch.stack(problem_gradients_float64(model, parts, TEMPERATURE))
            wanted = gradient_2G @ total_G / total_G.norm()
            assert ((found - wanted).abs() <= RTOL_FLOAT64 * gradient_2G.norm(dim=1)).all(), (name, index)
