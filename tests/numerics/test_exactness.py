# SPDX-License-Identifier: Apache-2.0
"""Every estimator against plain autograd, over one matrix of models and problems.

What an approximate estimator leaves out is configured away here: low_rank keeps all ranks, finite_difference takes the
step where its two errors balance. output_layer sees one layer only (test_output_layer.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.numerics.cases import ALL_KINDS, TRUSTED, Expected, errors, expect, has_even_coefficients, score
from tests.numerics.models import MODELS, make_model
from tests.numerics.problems import draw_problem
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.estimators import ESTIMATORS

TOLERANCES = {
    "ghost": 1e-10,  # measured 1.2e-15
    "backward": 1e-10,  # measured 1.2e-15
    "low_rank": 1e-10,  # measured 1.2e-15
    "finite_difference": 1e-6,  # measured 1.2e-7: a step's curvature, and rounding over the step
}
SETTINGS = {
    "ghost": ("ghost", ProbeConfig()),
    "ghost-without-derivatives": ("ghost", ProbeConfig(response_derivatives=False)),
    "backward": ("backward", ProbeConfig()),
    "low_rank": ("low_rank", ProbeConfig(rank=1000)),
    "finite_difference": ("finite_difference", ProbeConfig(relative_step=2e-5)),
}
PASSES = {"plain-one-pass": (False, 16384), "checkpointed-three-rows": (True, 140)}  # the longest row: 44 positions
EVEN_PR = has_even_coefficients(ALL_KINDS)


@pytest.fixture(scope="module", params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(name: str) -> Expected:
    return expect(make_model(name), TRUSTED, ALL_KINDS)


def given_rows(estimator: str, expected: Expected) -> Tensor:
    """Return the rows whose derivative the estimator gives: differences know those of unevenly weighted tokens too."""
    return ~expected.derivative_PR.isnan() if estimator == "finite_difference" else EVEN_PR


@pytest.mark.parametrize(("has_checkpointing", "max_tokens"), PASSES.values(), ids=list(PASSES))
@pytest.mark.parametrize(("estimator", "config"), SETTINGS.values(), ids=list(SETTINGS))
def test_scores_equal_autograd(
    name: str,
    estimator: str,
    config: ProbeConfig,
    has_checkpointing: bool,
    max_tokens: int,
    expected: Expected,
    record_property: Callable[[str, object], None],
) -> None:
    if (name, estimator) == ("padding-tied", "finite_difference"):
        pytest.skip("torch gives the padding row of an embedding no gradient; differences see that it has one")
    model = make_model(name, has_checkpointing)
    scores = score(estimator, model, TRUSTED, ALL_KINDS, max_tokens, config)
    found = errors(scores, expected, given_rows(estimator, expected))
    record_property("max_relative_error", found)
    method = ESTIMATORS[estimator]
    gives_derivative = method.gives_response_derivative and config.response_derivatives
    assert ("norm" in found, "derivative" in found) == (method.gives_norm, gives_derivative)
    assert max(found.values()) <= TOLERANCES[estimator], found


def test_the_matrix_has_rows_without_advantage_and_rows_of_uneven_ones(expected: Expected) -> None:
    assert (expected.norm_P == 0).sum() == 4 and (~expected.derivative_PR.isnan() & ~EVEN_PR).sum() == 2


@cache
def cached_model(name: str) -> nn.Module:
    return make_model(name)


@settings(max_examples=12, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=4),
    max_tokens=st.integers(200, 600),
    seed=st.integers(0, 10_000),
)
@pytest.mark.parametrize("model_name", ["qwen2-tied", "qwen3-untied"])
@pytest.mark.parametrize("setting", ["ghost", "ghost-without-derivatives", "backward"])
def test_scores_equal_autograd_whatever_the_lengths(
    setting: str, model_name: str, groups: list[list[int]], max_tokens: int, seed: int
) -> None:
    model = cached_model(model_name)
    candidates = [draw_problem(lengths, seed + i) for i, lengths in enumerate(groups)]
    estimator, config = SETTINGS[setting]
    scores = score(estimator, model, TRUSTED, candidates, max_tokens, config)
    found = errors(scores, expect(model, TRUSTED, candidates))
    assert max(found.values()) <= TOLERANCES[estimator], found
