# SPDX-License-Identifier: Apache-2.0
"""The laws that the scores of the exact estimators obey."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.cases import ALL_KINDS, CANDIDATES, DEAD, EXACT, TRUSTED, UNEVEN, assert_close, scale, score
from tests.numerics.problems import TEMPERATURE, Problem, draw_problem, tabulate, with_coefficients
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemScores

RTOL_IDENTITY = 1e-12  # one code path compared with itself; measured 2.4e-15
MEAN_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
PROMPT, RESPONSES = CANDIDATES[0][0].prompt, [row.response for row in CANDIDATES[0]]
LARGEST = max(len(problem) * max((row.num_tokens for row in problem), default=0) for problem in ALL_KINDS)
"""Padded positions of the largest problem."""

pytestmark = pytest.mark.parametrize("estimator", EXACT)


def assert_same_scores(actual: ProblemScores, expected: ProblemScores) -> None:
    """Assert equality up to a share of the gradients' norms: a dot product near zero has no relative error."""
    assert expected.norm_P is not None
    assert ((actual.dot_P - expected.dot_P).abs() <= RTOL_IDENTITY * expected.norm_P).all()
    assert_close(actual.norm_P, expected.norm_P, RTOL_IDENTITY)


def assert_same_derivatives(actual: Tensor | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        torch.testing.assert_close(actual, expected, rtol=RTOL_IDENTITY, atol=0.0, equal_nan=True)


def test_dot_products_add_up_to_that_of_the_union(model: nn.Module, estimator: str) -> None:
    union = [response for problem in CANDIDATES for response in problem]
    separate, joint = (score(estimator, model, TRUSTED, each) for each in (CANDIDATES, [union]))
    assert_close(separate.dot_P.sum(), joint.dot_P[0], RTOL_IDENTITY)


def test_dot_products_of_the_trusted_problems_add_up_to_the_directions_norm(model: nn.Module, estimator: str) -> None:
    scores = score(estimator, model, TRUSTED, TRUSTED)
    assert_close(scores.dot_P.sum(), torch.tensor(scores.direction_norm, dtype=torch.float64), RTOL_IDENTITY)


@pytest.mark.parametrize("k", range(len(CANDIDATES)))
def test_a_problem_is_fully_aligned_with_itself(model: nn.Module, estimator: str, k: int) -> None:
    scores = score(estimator, model, [CANDIDATES[k]], CANDIDATES)
    assert scores.norm_P is not None
    assert_close(scores.dot_P[k], scores.norm_P[k], RTOL_IDENTITY)
    assert_close(scores.cosine_P[k], torch.ones((), dtype=torch.float64), RTOL_IDENTITY)
    assert_close(scores.norm_P[k], torch.tensor(scores.direction_norm, dtype=torch.float64), RTOL_IDENTITY)
    others = torch.arange(len(CANDIDATES)) != k
    assert (scores.cosine_P.abs()[others] < 1.0).all()


@pytest.mark.parametrize("factor", [3.7, -0.2])
def test_scaling_a_problems_advantages_scales_its_scores(model: nn.Module, estimator: str, factor: float) -> None:
    base = score(estimator, model, TRUSTED, CANDIDATES)
    scaled = score(estimator, model, TRUSTED, [scale(problem, factor) for problem in CANDIDATES])
    assert base.norm_P is not None
    assert_close(scaled.dot_P, base.dot_P * factor, RTOL_IDENTITY)
    assert_close(scaled.norm_P, base.norm_P * abs(factor), RTOL_IDENTITY)
    assert_same_derivatives(scaled.response_derivative_PR, base.response_derivative_PR)


@pytest.mark.parametrize("factor", [3.7, -0.2])
def test_scaling_the_trusted_advantages_changes_nothing_but_the_sign(
    model: nn.Module, estimator: str, factor: float
) -> None:
    base = score(estimator, model, TRUSTED, CANDIDATES)
    scaled = score(estimator, model, [scale(problem, factor) for problem in TRUSTED], CANDIDATES)
    assert_close(scaled.dot_P, base.dot_P if factor > 0 else -base.dot_P, RTOL_IDENTITY)
    assert scaled.direction_norm == pytest.approx(base.direction_norm * abs(factor), rel=RTOL_IDENTITY)


def test_the_order_of_problems_does_not_matter(model: nn.Module, estimator: str) -> None:
    order = [3, 0, 4, 1, 2]
    base = score(estimator, model, TRUSTED, CANDIDATES)
    permuted = score(estimator, model, TRUSTED[::-1], [CANDIDATES[k] for k in order])
    assert base.norm_P is not None
    assert_close(permuted.dot_P, base.dot_P[order], RTOL_IDENTITY)
    assert_close(permuted.norm_P, base.norm_P[order], RTOL_IDENTITY)


@pytest.mark.parametrize("max_tokens", [LARGEST, LARGEST + 20, 2 * LARGEST])
def test_the_split_of_rows_into_passes_does_not_matter(model: nn.Module, estimator: str, max_tokens: int) -> None:
    problems = [*CANDIDATES, UNEVEN]
    turned = [problem[1:] + problem[:1] for problem in problems]
    split = score(estimator, model, TRUSTED, turned, max_tokens)
    assert_same_scores(split, score(estimator, model, TRUSTED, problems))


def test_what_else_is_scored_does_not_matter(model: nn.Module, estimator: str) -> None:
    together = score(estimator, model, TRUSTED, ALL_KINDS)
    for k in (0, 3, len(CANDIDATES) + 1):
        alone = score(estimator, model, TRUSTED, [ALL_KINDS[k]])
        assert together.norm_P is not None
        assert_same_scores(alone, replace(together, dot_P=together.dot_P[[k]], norm_P=together.norm_P[[k]]))


def test_shares_of_a_problem_add_up_to_it(model: nn.Module, estimator: str) -> None:
    whole = score(estimator, model, TRUSTED, [CANDIDATES[0]])
    shares = score(estimator, model, TRUSTED, [CANDIDATES[0][:1], CANDIDATES[0][1:]])
    assert_close(shares.dot_P.sum(), whole.dot_P[0], RTOL_IDENTITY)


def test_a_dot_product_is_the_weighted_sum_of_its_responses_derivatives(model: nn.Module, estimator: str) -> None:
    if not ESTIMATORS[estimator].gives_response_derivative:
        pytest.skip(f"{estimator} gives none")
    scores = score(estimator, model, TRUSTED, CANDIDATES)
    assert scores.response_derivative_PR is not None
    weight_PR = torch.zeros_like(scores.response_derivative_PR)
    for index, problem in enumerate(CANDIDATES):
        for place, row in enumerate(problem):
            weight_PR[index, place] = row.coefficient.sum() / max(row.coefficient.numel(), 1)
    assert_close((weight_PR * scores.response_derivative_PR.nan_to_num()).sum(dim=1), scores.dot_P, RTOL_IDENTITY)


@pytest.mark.parametrize("loss_agg_mode", MEAN_MODES)
def test_repeating_every_response_changes_nothing_under_a_mean(
    model: nn.Module, estimator: str, loss_agg_mode: str
) -> None:
    advantages = [0.5, -1.0, 2.0]
    once = with_coefficients(PROMPT, RESPONSES, advantages, loss_agg_mode)
    twice = with_coefficients(PROMPT, RESPONSES * 2, advantages * 2, loss_agg_mode)
    assert_same_scores(score(estimator, model, TRUSTED, [twice]), score(estimator, model, TRUSTED, [once]))


def test_a_repeated_response_counts_twice(model: nn.Module, estimator: str) -> None:
    first, *rest = CANDIDATES[0]
    repeated = [first, first, *rest]
    weighted = [*scale([first], 2.0), *rest]
    assert_same_scores(score(estimator, model, TRUSTED, [repeated]), score(estimator, model, TRUSTED, [weighted]))


@pytest.mark.parametrize("loss_agg_mode", MEAN_MODES)
def test_empty_responses_do_not_count(model: nn.Module, estimator: str, loss_agg_mode: str) -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    without = with_coefficients(PROMPT, RESPONSES, [0.5, -1.0, 2.0], loss_agg_mode)
    padded = with_coefficients(PROMPT, [empty, *RESPONSES, empty], [9.0, 0.5, -1.0, 2.0, 9.0], loss_agg_mode)
    assert_same_scores(score(estimator, model, TRUSTED, [padded]), score(estimator, model, TRUSTED, [without]))


@pytest.mark.parametrize("lengths", [[0], [0, 0], []], ids=["one-empty", "all-empty", "no-rows"])
def test_a_problem_without_response_tokens_scores_zero(model: nn.Module, estimator: str, lengths: list[int]) -> None:
    scores = score(estimator, model, TRUSTED, [draw_problem(lengths, 5), CANDIDATES[0]])
    assert scores.norm_P is not None
    assert scores.dot_P[0] == 0.0 and scores.norm_P[0] == 0.0 and scores.cosine_P[0] == 0.0
    assert scores.norm_P[1] > 0.0


def test_a_call_without_problems_gives_no_scores(model: nn.Module, estimator: str) -> None:
    scores = score(estimator, model, TRUSTED, [])
    assert scores.uid == () and scores.dot_P.shape == (0,) and scores.direction_norm > 0.0


def test_a_problem_without_advantages_scores_zero_and_its_responses_have_derivatives(
    model: nn.Module, estimator: str
) -> None:
    scores = score(estimator, model, TRUSTED, [DEAD])
    assert scores.norm_P is not None and scores.dot_P[0] == 0.0 and scores.norm_P[0] == 0.0
    if ESTIMATORS[estimator].gives_response_derivative:
        assert scores.response_derivative_PR is not None and (scores.response_derivative_PR.abs() > 0).all()


def test_tokens_and_uids_are_passed_on(model: nn.Module, estimator: str) -> None:
    scores = score(estimator, model, TRUSTED, ALL_KINDS)
    assert scores.uid == tuple(f"p{k}" for k in range(len(TRUSTED), len(TRUSTED) + len(ALL_KINDS)))
    expected = [sum(row.prompt.numel() + row.response.numel() for row in problem) for problem in ALL_KINDS]
    assert scores.num_tokens_P.tolist() == expected
    assert (scores.response_derivative_PR is not None) == ESTIMATORS[estimator].gives_response_derivative


def test_a_degenerate_direction_gives_zeros_and_true_norms(model: nn.Module, estimator: str) -> None:
    silent: list[Problem] = [scale(problem, 0.0) for problem in TRUSTED]
    rows, shares = tabulate([*silent, *CANDIDATES])
    engine = PlainEngine(model, rows, TEMPERATURE)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares[: len(silent)])
        scores = ESTIMATORS[estimator]().score(engine, shares[len(silent) :], direction)
    assert direction.is_degenerate and direction.norm == 0.0
    assert torch.equal(scores.dot_P, torch.zeros(len(CANDIDATES), dtype=torch.float64))
    assert_close(scores.norm_P, score(estimator, model, TRUSTED, CANDIDATES).norm_P, RTOL_IDENTITY)
