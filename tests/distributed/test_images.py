# SPDX-License-Identifier: Apache-2.0
"""Images are part of the gradient that problems are scored by, as they are part of training's."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.comparison import case_of

pytestmark = pytest.mark.dist

MODELS = ("qwen3_vl", "qwen3_5")
RTOL = 1e-4  # in float32
MAX_STEP_ERROR = 1e-2


def assert_scores(found: dict[str, Any], expected: dict[str, Any], rtol: float) -> None:
    tolerance = rtol * max(expected["norm"])
    assert found["dot"] == pytest.approx(expected["dot"], abs=tolerance)
    assert found["direction_norm"] == pytest.approx(expected["direction_norm"], rel=rtol)
    if found["norm"] is not None:
        assert found["norm"] == pytest.approx(expected["norm"], rel=rtol)
    assert found["ranks_agree"]


@pytest.mark.parametrize("model", MODELS)
def test_backward_and_the_direction_are_verls_own_gradient_of_text_and_images(
    results: dict[str, Any], model: str
) -> None:
    case = case_of(results, f"images-{model}-whole")
    assert case["reference"]["has_vision"]
    assert_scores(case["backward"], case["reference"], RTOL)
    assert_scores(case["finite_difference"], case["reference"], MAX_STEP_ERROR)


@pytest.mark.parametrize("model", MODELS)
def test_adapters_of_the_text_model_are_scored_exactly_beside_images(results: dict[str, Any], model: str) -> None:
    case = case_of(results, f"images-{model}-text")
    assert not case["refusal"] and not case["reference"]["has_vision"]
    for estimator in ("ghost", "backward"):
        assert_scores(case[estimator], case["reference"], RTOL)


@pytest.mark.parametrize("model", MODELS)
def test_the_canary_is_verls_pass_over_whole_rows_and_sees_what_the_estimator_leaves_out(
    results: dict[str, Any], model: str
) -> None:
    case = case_of(results, f"images-{model}-text")
    assert case["canary"] < 1e-4 < 0.05 < case["blind_canary"]


@pytest.mark.parametrize("part", ["whole", "all"])
@pytest.mark.parametrize("model", MODELS)
def test_a_trained_vision_tower_is_refused_by_name(results: dict[str, Any], model: str, part: str) -> None:
    """Its positions are patches: which row each belongs to is not to be seen in a pass."""
    refusal = case_of(results, f"images-{model}-{part}")["refusal"]
    assert "visual." in refusal and "lie outside the text model" in refusal
    assert "Remedy: set gradalign.estimator=backward" in refusal and "exclude_modules" in refusal
