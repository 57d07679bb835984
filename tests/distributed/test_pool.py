# SPDX-License-Identifier: Apache-2.0
"""Candidates compared with their own pool on verl's FSDP engine: as on a plain model, on any number of ranks.

Shape legend: P problems, G all trainable numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.comparison import case_of, largest_errors
from tests.distributed.setups import CANDIDATES, POOL_WEIGHTS, SKETCH_RANK, reference_model
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.sketch import sketched_scores

pytestmark = pytest.mark.dist

RTOL_FLOAT64 = 1e-10  # measured 8e-15
SHARDINGS = ("fsdp", "fsdp-orig", "fsdp2")


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, dict[str, Any]]:
    """Scores of the plain model: along the sums of autograd's gradients, and sketched."""
    model = reference_model(root, "qwen2", has_adapters=False)
    gradient_PG = torch.stack(problem_gradients_float64(model, CANDIDATES, TEMPERATURE))
    weight_P = torch.tensor(POOL_WEIGHTS, dtype=torch.float64)
    sums = {
        "sum": gradient_PG.sum(dim=0),
        "unit-sum": weight_P @ torch.nn.functional.normalize(gradient_PG, dim=1),
    }
    scores = {
        name: {
            "dot": (gradient_PG @ sum_G / sum_G.norm()).tolist(),
            "norm": gradient_PG.norm(dim=1).tolist(),
            "direction_norm": sum_G.norm().item(),
        }
        for name, sum_G in sums.items()
    }
    rows, shares = tabulate(CANDIDATES)
    with leave_no_trace(model):
        sketch = sketched_scores(PlainEngine(model, rows, TEMPERATURE), shares, POOL_WEIGHTS, SKETCH_RANK, seed=0)
    assert sketch.norm_P is not None
    scores["sketch"] = {
        "dot": sketch.dot_P.tolist(),
        "norm": sketch.norm_P.tolist(),
        "direction_norm": sketch.direction_norm,
        "diagnostics": dict(sketch.diagnostics),
    }
    norm = scores["sum"]["norm"][0]
    scores["alone"] = {"dot": [norm], "norm": [norm], "direction_norm": norm}
    return {name: {"derivative": None, **values} for name, values in scores.items()}


@pytest.mark.parametrize("kind", ["unit-sum", "sum", "sketch", "alone"])
@pytest.mark.parametrize("strategy", SHARDINGS)
def test_scores_along_the_own_pool_are_those_of_the_plain_model(
    results: dict[str, Any], expected: dict[str, Any], strategy: str, kind: str
) -> None:
    scores = case_of(results, f"pool-{strategy}")[kind]
    errors = largest_errors(scores, expected[kind])
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert scores["ranks_agree"]
    if kind == "sketch":
        assert scores["diagnostics"] == pytest.approx(expected[kind]["diagnostics"])
