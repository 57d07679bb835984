# SPDX-License-Identifier: Apache-2.0
"""Candidates scored along the gradient of their own pool, against the dense matrix of autograd's gradients.

Shape legend: P problems, G all trainable numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.numerics.cases import ALL_KINDS, CANDIDATES, DEAD, EMPTY, EXACT
from tests.numerics.models import make_model
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, Problem, tabulate
from tests.numerics.test_neutrality import observe
from verl_gradalign.probe.audit import audited_scores
from verl_gradalign.probe.call import Scorer, pool_scores
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemRows, ProblemScores

ATOL_FLOAT64 = 1e-10  # of cosines; measured 2e-16
PASSES = {"plain-one-pass": (False, 16384), "checkpointed-three-rows": (True, 140)}  # the longest row: 44 positions
WEIGHTS = torch.linspace(0.25, 0.05, len(ALL_KINDS), dtype=torch.float64)


def dense_gradients(model: nn.Module, problems: Sequence[Problem]) -> Tensor:
    """Return autograd's gradients, (problems, trainable numbers)."""
    return torch.stack(problem_gradients_float64(model, problems, TEMPERATURE))


def dense_learnalign(gradient_PG: Tensor, weight_P: Tensor) -> Tensor:
    """Return the row means of w_i w_j cos(g_i, g_j); the cosines of a problem without a gradient are 0."""
    unit_PG = torch.nn.functional.normalize(gradient_PG, dim=1)
    return (weight_P.unsqueeze(1) * weight_P * (unit_PG @ unit_PG.T)).mean(dim=1)


def learnalign(scores: ProblemScores, weight_P: Tensor) -> Tensor:
    return weight_P * scores.cosine_P * scores.direction_norm / len(weight_P)


def along_own_pool(
    model: nn.Module,
    problems: Sequence[Problem],
    weights: Tensor | None,
    estimator: str = "ghost",
    max_tokens: int = 16384,
    audited: tuple[int, ...] = (),
) -> ProblemScores:
    """Return the scores along the weighted sum of unit gradients, or without weights along the sum."""
    rows, shares = tabulate([*problems, CANDIDATES[1]])
    shares = shares[:-1]  # the last one's row is there to keep company
    engine = PlainEngine(model, rows, TEMPERATURE, max_tokens)
    with leave_no_trace(model):
        score = scorer(engine, estimator)
        return pool_scores(engine, shares, None if weights is None else weights.tolist(), score, audited)


def scorer(engine: PlainEngine, estimator: str) -> Scorer:
    """Return what a worker scores with."""

    def score(problems: Sequence[ProblemRows], direction: Direction, audited: tuple[int, ...] = ()) -> ProblemScores:
        return audited_scores(engine, problems, direction, ESTIMATORS[estimator](), audited, oversized="backward")

    return score


@cache
def gradients_of_all_kinds(name: str) -> Tensor:
    return dense_gradients(make_model(name), ALL_KINDS)


@pytest.mark.parametrize("has_checkpointing, max_tokens", PASSES.values(), ids=list(PASSES))
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied", "neox", "lora"])
def test_both_scores_equal_the_dense_matrix(
    name: str, has_checkpointing: bool, max_tokens: int, record_property: Callable[[str, object], None]
) -> None:
    model = make_model(name, has_checkpointing)
    gradient_PG = gradients_of_all_kinds(name)
    found = learnalign(along_own_pool(model, ALL_KINDS, WEIGHTS, max_tokens=max_tokens), WEIGHTS)
    error = (found - dense_learnalign(gradient_PG, WEIGHTS)).abs().max().item()
    pool_cosine_P = torch.cosine_similarity(gradient_PG, gradient_PG.sum(dim=0, keepdim=True))
    pool_error = (along_own_pool(model, ALL_KINDS, None, max_tokens=max_tokens).cosine_P - pool_cosine_P).abs().max()
    record_property("max_error", {"learnalign": error, "pool_cosine": pool_error.item()})
    assert error <= ATOL_FLOAT64 and pool_error <= ATOL_FLOAT64


@cache
def tied_model_and_gradients() -> tuple[nn.Module, Tensor]:
    model = make_model("qwen2-tied")
    return model, dense_gradients(model, CANDIDATES)


@settings(max_examples=6, deadline=None)
@given(
    weights=st.lists(st.just(0.0) | st.floats(1e-3, 0.25), min_size=len(CANDIDATES), max_size=len(CANDIDATES)),
    estimator=st.sampled_from(EXACT),
)
def test_learnalign_equals_the_dense_matrix_whatever_the_weights(weights: list[float], estimator: str) -> None:
    model, gradient_PG = tied_model_and_gradients()
    weight_P = torch.tensor(weights, dtype=torch.float64)
    scores = along_own_pool(model, CANDIDATES, weight_P, estimator)
    error_P = learnalign(scores, weight_P) - dense_learnalign(gradient_PG, weight_P)
    assert error_P.abs().max() <= ATOL_FLOAT64
    total_G = (torch.nn.functional.normalize(gradient_PG, dim=1) * weight_P.unsqueeze(1)).sum(dim=0)
    assert scores.direction_norm == pytest.approx(total_G.norm().item(), abs=ATOL_FLOAT64)


@settings(max_examples=50, deadline=None)
@given(num_problems=st.integers(1, 8), num_numbers=st.integers(1, 6), seed=st.integers(0, 999))
def test_the_row_mean_is_the_product_with_the_weighted_unit_sum(num_problems: int, num_numbers: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient_PG = torch.randn(num_problems, num_numbers, generator=generator, dtype=torch.float64)
    weight_P = torch.rand(num_problems, generator=generator, dtype=torch.float64)
    norm_P = gradient_PG.norm(dim=1)
    total_G = (weight_P / norm_P) @ gradient_PG
    product_P = weight_P * (gradient_PG @ total_G) / (norm_P * num_problems)
    torch.testing.assert_close(dense_learnalign(gradient_PG, weight_P), product_P, rtol=0.0, atol=ATOL_FLOAT64)


def test_problems_without_a_gradient_score_zero_and_change_nothing(model: nn.Module) -> None:
    weights = torch.full((len(CANDIDATES) + 1 + len(EMPTY),), 0.2, dtype=torch.float64)
    alone = along_own_pool(model, CANDIDATES, weights[: len(CANDIDATES)])
    together = along_own_pool(model, [DEAD, *CANDIDATES, *EMPTY], weights)
    assert together.direction_norm == pytest.approx(alone.direction_norm, rel=ATOL_FLOAT64)
    expected_P = torch.cat([torch.zeros(1), alone.cosine_P, torch.zeros(len(EMPTY))])
    torch.testing.assert_close(together.cosine_P, expected_P, rtol=0.0, atol=ATOL_FLOAT64)


@pytest.mark.parametrize("problems", [CANDIDATES[:2], [DEAD, *EMPTY], []], ids=["no-weights", "no-gradients", "none"])
def test_a_pool_without_a_direction_says_so_and_scores_zero(model: nn.Module, problems: list[Problem]) -> None:
    weights = torch.full((len(problems),), 0.0 if problems == CANDIDATES[:2] else 0.2, dtype=torch.float64)
    scores = along_own_pool(model, problems, weights)
    assert scores.direction_norm == 0.0
    assert torch.equal(learnalign(scores, weights), torch.zeros(len(problems), dtype=torch.float64))
    if problems != CANDIDATES[:2]:
        pool = along_own_pool(model, problems, None)
        assert pool.direction_norm == 0.0 and torch.equal(pool.cosine_P, torch.zeros_like(weights))


@pytest.mark.parametrize("weights", [None, WEIGHTS[: len(CANDIDATES)]], ids=["pool-sum", "unit-sum"])
def test_an_estimator_without_norms_is_refused(model: nn.Module, weights: Tensor | None) -> None:
    with pytest.raises(ValueError, match="no gradient norms.*Remedy.*estimator=ghost"):
        along_own_pool(model, CANDIDATES, weights, "finite_difference")


@pytest.mark.parametrize("weights", [None, WEIGHTS[: len(CANDIDATES)]], ids=["pool-sum", "unit-sum"])
def test_oversized_problems_and_the_canary_are_the_scorers_business(model: nn.Module, weights: Tensor | None) -> None:
    whole = along_own_pool(model, CANDIDATES, weights)
    assert "canary/relative_error" not in whole.diagnostics
    tight = along_own_pool(model, CANDIDATES, weights, max_tokens=50, audited=(1, 2))
    assert tight.diagnostics["oversized"] > 0 and tight.diagnostics["canary/relative_error"] <= ATOL_FLOAT64
    torch.testing.assert_close(tight.cosine_P, whole.cosine_P, rtol=0.0, atol=ATOL_FLOAT64)


@pytest.mark.parametrize("weights", [None, WEIGHTS[: len(CANDIDATES)]], ids=["pool-sum", "unit-sum"])
def test_scoring_along_the_own_pool_leaves_no_trace(weights: Tensor | None) -> None:
    model = make_model("qwen2-tied", has_checkpointing=True)
    before = observe(model)
    along_own_pool(model, CANDIDATES, weights)
    assert observe(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
