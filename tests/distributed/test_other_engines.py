# SPDX-License-Identifier: Apache-2.0
"""On an engine that has what verl's BaseEngine promises, and torch's fully_shard: what needs no more than that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.comparison import case_of, largest_errors
from tests.distributed.conftest import Oracle
from tests.distributed.setups import CANDIDATES, OTHERS, reference_model
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE

pytestmark = pytest.mark.dist

RTOL_FLOAT64 = 1e-10  # as on verl's FSDP engine (test_estimators.py)
RTOL_DIFFERENCE = 1e-6  # of |g|, at a step of 2e-5 |theta|, as in tests/numerics/test_exactness.py


@pytest.mark.parametrize("name", OTHERS)
def test_backward_and_the_direction_equal_autograd_on_what_base_engine_promises(
    results: dict[str, Any], oracle: Oracle, name: str
) -> None:
    case = case_of(results, f"other-{name}")
    errors = largest_errors(case["backward"], {**oracle(OTHERS[name].model), "derivative": None})
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert case["backward"]["ranks_agree"]
    assert case["direction_error"] <= RTOL_FLOAT64
    assert case["is_restored"]


@pytest.mark.parametrize("name", OTHERS)
def test_finite_differences_equal_autograd_on_what_base_engine_promises(
    results: dict[str, Any], oracle: Oracle, root: Path, name: str
) -> None:
    case, expected = case_of(results, f"other-{name}"), oracle(OTHERS[name].model)
    norms = row_norms(root, OTHERS[name].model)
    for scores, count in ((case["finite_difference"], len(norms)), (case["alone"], 1)):
        for index in range(count):
            error = abs(scores["dot"][index] - expected["dot"][index])
            assert error <= RTOL_DIFFERENCE * expected["norm"][index]
            found_R = torch.tensor(scores["derivative"][index], dtype=torch.float64)[: len(norms[index])]
            wanted_R = torch.tensor(expected["derivative"][index], dtype=torch.float64)[: len(norms[index])]
            assert ((found_R - wanted_R).abs() <= RTOL_DIFFERENCE * norms[index]).all()
        assert scores["ranks_agree"]


def row_norms(root: Path, model: str) -> list[torch.Tensor]:
    """Return the norm of each response's log-prob's gradient, (rows,) for each candidate."""
    module = reference_model(root, model, False)
    plain = [[[replace(row, coefficient=torch.ones_like(row.coefficient))] for row in rows] for rows in CANDIDATES]
    gradients = [problem_gradients_float64(module, rows, TEMPERATURE) for rows in plain]
    return [torch.stack([gradient_G.norm() for gradient_G in of_problem]) for of_problem in gradients]


@pytest.mark.parametrize("name", OTHERS)
def test_scoring_leaves_parameters_gradients_and_optimizer_state_as_they_were(
    results: dict[str, Any], name: str
) -> None:
    assert case_of(results, f"other-{name}")["changed"] == []


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_engine_promises_is_asked_for_by_name(results: dict[str, Any], name: str) -> None:
    case = case_of(results, f"other-{name}")
    assert "OtherEngine has no _autocast_dtype" in case["ghost"] and "gradalign.estimator=backward" in case["ghost"]
    assert "has no module" in case["empty"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_that_is_cut_otherwise_is_refused_by_a_parameters_name(
    results: dict[str, Any], world_size: int, name: str
) -> None:
    case = case_of(results, f"other-{name}")
    is_cut = world_size > 1 and not OTHERS[name].is_replicated
    assert ("whole is not cut over the same one group of ranks" in case["mixed"]) == is_cut, case["mixed"]
    assert "holds the model in 2 modules" in case["stages"] and "Remedy: " in case["stages"]
