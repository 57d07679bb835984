# SPDX-License-Identifier: Apache-2.0
"""The backward estimator against the float64 oracle, and the laws that its scores obey."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.numerics.problems import (
    TEMPERATURE,
    Problem,
    build_model,
    draw_problem,
    expected_scores,
    load_float64,
    tabulate,
    with_coefficients,
)
from verl_gradalign.probe.direction import Direction, compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.oracle import problem_gradients_float64
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemRows, ProblemScores

RTOL_FLOAT64 = 1e-10  # measured 2e-15 for dot products, 5e-16 for norms
RTOL_IDENTITY = 1e-12  # one code path compared with itself; measured 1e-14
MEAN_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")
TRUSTED_LENGTHS = ([5, 3], [4, 6, 2])
CANDIDATE_LENGTHS = ([7, 1, 4], [3], [6, 6], [0, 5, 2, 0], [9, 2])
MODELS = {"qwen2-tied": ("qwen2", True), "qwen3-untied": ("qwen3", False)}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: build_model(root / name, *arguments) for name, arguments in MODELS.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "checkpointed"])
def has_checkpointing(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module", params=list(MODELS))
def checked_model(request: pytest.FixtureRequest, folders: dict[str, Path], has_checkpointing: bool) -> nn.Module:
    return load_float64(folders[request.param], has_checkpointing)


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> nn.Module:
    return load_float64(folders["qwen2-tied"])


def draw(lengths: tuple[list[int], ...], first_seed: int) -> list[Problem]:
    return [draw_problem(each, seed) for seed, each in enumerate(lengths, first_seed)]


TRUSTED = draw(TRUSTED_LENGTHS, 10)
CANDIDATES = draw(CANDIDATE_LENGTHS, 20)


def score(
    model: nn.Module, trusted: list[Problem], candidates: list[Problem], micro_batch_size: int = 64
) -> ProblemScores:
    """Return the scores of `candidates` along the direction of `trusted`, on the plain engine."""
    rows, shares = tabulate([*trusted, *candidates])
    longest = max(row.num_tokens for row in rows)
    engine = PlainEngine(model, rows, TEMPERATURE, max_tokens=micro_batch_size * longest)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares[: len(trusted)])
        return ESTIMATORS["backward"]().score(engine, shares[len(trusted) :], direction)


def scale(problem: Problem, factor: float) -> Problem:
    return [replace(response, coefficient=response.coefficient * factor) for response in problem]


def assert_close(actual: Tensor, expected: Tensor, rtol: float = RTOL_IDENTITY) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0.0)


def assert_same_scores(actual: ProblemScores, expected: ProblemScores) -> None:
    assert_close(actual.dot_P, expected.dot_P)
    assert_close(actual.norm_P, expected.norm_P)


def test_scores_equal_the_oracle(checked_model: nn.Module, record_property: Callable[[str, object], None]) -> None:
    scores = score(checked_model, TRUSTED, CANDIDATES, micro_batch_size=3)
    dot_P, norm_P, direction_norm = expected_scores(checked_model, TRUSTED, CANDIDATES)
    errors = {
        "dot": ((scores.dot_P - dot_P) / dot_P).abs().max().item(),
        "norm": ((scores.norm_P - norm_P) / norm_P).abs().max().item(),
        "cosine": ((scores.dot_P / scores.norm_P - dot_P / norm_P) / (dot_P / norm_P)).abs().max().item(),
        "direction": abs(scores.direction_norm / direction_norm - 1.0),
    }
    record_property("max_relative_error", errors)
    assert max(errors.values()) <= RTOL_FLOAT64, errors


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=4), min_size=1, max_size=3),
    micro_batch_size=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_scores_equal_the_oracle_whatever_the_lengths(
    model: nn.Module, groups: list[list[int]], micro_batch_size: int, seed: int
) -> None:
    candidates = [draw_problem(lengths, seed + i) for i, lengths in enumerate(groups)]
    scores = score(model, TRUSTED, candidates, micro_batch_size)
    dot_P, norm_P, _ = expected_scores(model, TRUSTED, candidates)
    # A drawn problem may happen to be almost orthogonal to v, so the dot product's error is taken relative to |g|.
    assert ((scores.dot_P - dot_P).abs() <= RTOL_FLOAT64 * norm_P).all()
    assert_close(scores.norm_P, norm_P, RTOL_FLOAT64)


def test_dot_products_add_up_to_that_of_the_union(model: nn.Module) -> None:
    union = [response for problem in CANDIDATES for response in problem]
    separate, joint = score(model, TRUSTED, CANDIDATES), score(model, TRUSTED, [union])
    assert_close(separate.dot_P.sum(), joint.dot_P[0])


def test_dot_products_of_the_trusted_problems_add_up_to_the_directions_norm(model: nn.Module) -> None:
    scores = score(model, TRUSTED, TRUSTED)
    assert_close(scores.dot_P.sum(), torch.tensor(scores.direction_norm, dtype=torch.float64))


@pytest.mark.parametrize("k", range(len(CANDIDATES)))
def test_a_problem_is_fully_aligned_with_itself(model: nn.Module, k: int) -> None:
    scores = score(model, [CANDIDATES[k]], CANDIDATES)
    assert scores.norm_P is not None
    assert_close(scores.dot_P[k], scores.norm_P[k])
    assert_close(scores.norm_P[k], torch.tensor(scores.direction_norm, dtype=torch.float64))
    others = torch.arange(len(CANDIDATES)) != k
    assert ((scores.dot_P / scores.norm_P).abs()[others] < 1.0).all()


@pytest.mark.parametrize("factor", [3.7, -0.2])
def test_scaling_a_problems_advantages_scales_its_scores(model: nn.Module, factor: float) -> None:
    base = score(model, TRUSTED, CANDIDATES)
    scaled = score(model, TRUSTED, [scale(problem, factor) for problem in CANDIDATES])
    assert_close(scaled.dot_P, base.dot_P * factor)
    assert base.norm_P is not None and scaled.norm_P is not None
    assert_close(scaled.norm_P, base.norm_P * abs(factor))


@pytest.mark.parametrize("factor", [3.7, -0.2])
def test_scaling_the_trusted_advantages_changes_nothing_but_the_sign(model: nn.Module, factor: float) -> None:
    base = score(model, TRUSTED, CANDIDATES)
    scaled = score(model, [scale(problem, factor) for problem in TRUSTED], CANDIDATES)
    assert_close(scaled.dot_P, base.dot_P if factor > 0 else -base.dot_P)
    assert scaled.direction_norm == pytest.approx(base.direction_norm * abs(factor), rel=RTOL_IDENTITY)


def test_the_order_of_problems_does_not_matter(model: nn.Module) -> None:
    order = [3, 0, 4, 1, 2]
    base = score(model, TRUSTED, CANDIDATES)
    permuted = score(model, TRUSTED[::-1], [CANDIDATES[k] for k in order])
    assert base.norm_P is not None and permuted.norm_P is not None
    assert_close(permuted.dot_P, base.dot_P[order])
    assert_close(permuted.norm_P, base.norm_P[order])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_the_split_of_rows_into_passes_does_not_matter(model: nn.Module, micro_batch_size: int) -> None:
    turned = [problem[1:] + problem[:1] for problem in CANDIDATES]
    assert_same_scores(score(model, TRUSTED, turned, micro_batch_size), score(model, TRUSTED, CANDIDATES))


def test_shares_of_a_problem_add_up_to_it(model: nn.Module) -> None:
    whole = score(model, TRUSTED, [CANDIDATES[0]])
    shares = score(model, TRUSTED, [CANDIDATES[0][:1], CANDIDATES[0][1:]])
    assert_close(shares.dot_P.sum(), whole.dot_P[0])


@pytest.mark.parametrize("loss_agg_mode", MEAN_MODES)
def test_repeating_every_response_changes_nothing_under_a_mean(model: nn.Module, loss_agg_mode: str) -> None:
    prompt, responses = CANDIDATES[0][0].prompt, [response.response for response in CANDIDATES[0]]
    advantages = [0.5, -1.0, 2.0]
    once = with_coefficients(prompt, responses, advantages, loss_agg_mode)
    twice = with_coefficients(prompt, responses * 2, advantages * 2, loss_agg_mode)
    assert_same_scores(score(model, TRUSTED, [twice]), score(model, TRUSTED, [once]))


def test_a_repeated_response_counts_twice(model: nn.Module) -> None:
    first, *rest = CANDIDATES[0]
    repeated = [first, first, *rest]
    weighted = [*scale([first], 2.0), *rest]
    assert_same_scores(score(model, TRUSTED, [repeated]), score(model, TRUSTED, [weighted]))


@pytest.mark.parametrize("loss_agg_mode", MEAN_MODES)
def test_empty_responses_do_not_count(model: nn.Module, loss_agg_mode: str) -> None:
    prompt, responses = CANDIDATES[0][0].prompt, [response.response for response in CANDIDATES[0]]
    empty = torch.zeros(0, dtype=torch.int64)
    without = with_coefficients(prompt, responses, [0.5, -1.0, 2.0], loss_agg_mode)
    padded = with_coefficients(prompt, [empty, *responses, empty], [9.0, 0.5, -1.0, 2.0, 9.0], loss_agg_mode)
    assert_same_scores(score(model, TRUSTED, [padded]), score(model, TRUSTED, [without]))


@pytest.mark.parametrize("lengths", [[0], [0, 0], []], ids=["one-empty", "all-empty", "no-rows"])
def test_a_problem_without_response_tokens_scores_zero(model: nn.Module, lengths: list[int]) -> None:
    scores = score(model, TRUSTED, [draw_problem(lengths, 5), CANDIDATES[0]])
    assert scores.norm_P is not None
    assert scores.dot_P[0] == 0.0 and scores.norm_P[0] == 0.0
    assert scores.norm_P[1] > 0.0


def test_tokens_and_uids_are_passed_on(model: nn.Module) -> None:
    scores = score(model, TRUSTED, CANDIDATES)
    assert scores.uid == tuple(f"p{k}" for k in range(len(TRUSTED), len(TRUSTED) + len(CANDIDATES)))
    expected = [sum(r.prompt.numel() + r.response.numel() for r in problem) for problem in CANDIDATES]
    assert scores.num_tokens_P.tolist() == expected
    assert scores.response_derivative_PR is None


def test_a_direction_without_coefficients_is_degenerate(model: nn.Module) -> None:
    rows, shares = tabulate([*(scale(problem, 0.0) for problem in TRUSTED), *CANDIDATES])
    engine = PlainEngine(model, rows, TEMPERATURE)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares[: len(TRUSTED)])
        scores = ESTIMATORS["backward"]().score(engine, shares[len(TRUSTED) :], direction)
    assert direction.is_degenerate and direction.norm == 0.0
    assert torch.equal(scores.dot_P, torch.zeros(len(CANDIDATES), dtype=torch.float64))
    assert_close(scores.norm_P, score(model, TRUSTED, CANDIDATES).norm_P)


def test_a_direction_that_is_not_finite_is_degenerate(model: nn.Module) -> None:
    rows, shares = tabulate([scale(TRUSTED[0], float("nan"))])
    with leave_no_trace(model):
        direction = compute_direction(PlainEngine(model, rows, TEMPERATURE), shares)
    assert direction.is_degenerate
    assert all(torch.equal(shard, torch.zeros_like(shard)) for shard in direction.shards if shard is not None)


def test_an_empty_trusted_set_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="trusted set is empty"):
        compute_direction(PlainEngine(model, [], TEMPERATURE), [])


def score_along(model: nn.Module, direction: Direction) -> None:
    rows, shares = tabulate(CANDIDATES[:1])
    with leave_no_trace(model):
        ESTIMATORS["backward"]().score(PlainEngine(model, rows, TEMPERATURE), shares, direction)


def direction_of(model: nn.Module) -> Direction:
    rows, shares = tabulate(TRUSTED)
    with leave_no_trace(model):
        return compute_direction(PlainEngine(model, rows, TEMPERATURE), shares)


def test_a_direction_of_another_width_is_refused_by_parameter(model: nn.Module, tmp_path: Path) -> None:
    wider = load_float64(build_model(tmp_path, "qwen2", True, hidden_size=64))
    with pytest.raises(RuntimeError, match="model.embed_tokens.weight"):
        score_along(model, direction_of(wider))


def test_a_direction_of_other_parameters_is_refused_by_parameter(model: nn.Module, folders: dict[str, Path]) -> None:
    untied = load_float64(folders["qwen3-untied"])
    with pytest.raises(RuntimeError, match=r"model\.\S+"):
        score_along(model, direction_of(untied))


def test_a_parameter_frozen_since_is_named(folders: dict[str, Path]) -> None:
    model = load_float64(folders["qwen3-untied"])
    direction = direction_of(model)
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="model.norm.weight"):
        score_along(model, direction)


def test_gradients_present_on_entry_are_refused_by_parameter(model: nn.Module) -> None:
    direction = direction_of(model)
    rows, shares = tabulate(CANDIDATES)
    engine = PlainEngine(model, rows, TEMPERATURE)
    with leave_no_trace(model):
        engine.backward(shares[:1])
        with pytest.raises(RuntimeError, match="model.embed_tokens.weight already has a gradient"):
            ESTIMATORS["backward"]().score(engine, shares, direction)
        with pytest.raises(RuntimeError, match="model.embed_tokens.weight already has a gradient"):
            compute_direction(engine, shares)


def test_the_oracle_refuses_less_than_float64(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="model.embed_tokens.weight is torch.float32"):
        problem_gradients_float64(load_float64(folders["qwen2-tied"]).float(), CANDIDATES, TEMPERATURE)


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_leaves_no_trace_on_a_plain_model(folders: dict[str, Path], fails: bool) -> None:
    model = load_float64(folders["qwen2-tied"])
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    rows, shares = tabulate([*TRUSTED, *CANDIDATES])
    engine = PlainEngine(model, rows, TEMPERATURE)
    engine.backward(shares[:1])

    def observe() -> list[object]:
        parameters = list(model.parameters())
        tensors = [p.detach().clone() for p in parameters] + [p.grad.clone() for p in parameters if p.grad is not None]
        flags = [p.requires_grad for p in parameters] + [m.training for m in model.modules()]
        states = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
        return [*(t.numpy().tobytes() for t in tensors), flags, [id(p.grad) for p in parameters], states]

    def scoring(problems: list[ProblemRows]) -> None:
        with leave_no_trace(model):
            model.train()
            model.model.norm.weight.requires_grad_(True)
            torch.rand(1), np.random.rand(1), random.random()
            compute_direction(engine, problems)
            engine.backward(problems)
            if fails:
                raise ArithmeticError("in the middle of scoring")

    before = observe()
    if fails:
        with pytest.raises(ArithmeticError):
            scoring(shares)
    else:
        scoring(shares)
    assert observe() == before
