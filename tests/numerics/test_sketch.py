# SPDX-License-Identifier: Apache-2.0
"""The one-pass estimate of candidates' products with their own pool: what of it is exact, and how far off the rest is.

Shape legend: K the rank, P problems, L parameter tensors, G all trainable numbers, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.numerics.cases import ALL_KINDS, CANDIDATES, DEAD, EMPTY, draw
from tests.numerics.models import finished, gpt2, make_model
from tests.numerics.problems import TEMPERATURE, Problem, tabulate
from tests.numerics.test_neutrality import observe
from tests.numerics.test_pool import PASSES, WEIGHTS, along_own_pool, dense_gradients, dense_learnalign, learnalign
from verl_gradalign.probe import layer_rules
from verl_gradalign.probe.gradient import leave_no_trace, trainable_parameters
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.projections import normal_matrix
from verl_gradalign.probe.sketch import Sketcher, sketch_gradients, sketch_points, sketched_scores
from verl_gradalign.rank_correlation import spearman
from verl_gradalign.types import ProblemScores

RTOL_FLOAT64 = 1e-10  # measured 9e-16
MAX_STANDARD_ERRORS = 5.0
MANY = draw([[1 + (5 * i + 3 * k) % 9 for k in range(1 + i % 3)] for i in range(24)], 40)
"""Enough problems for a rank correlation."""
MANY_WEIGHTS = 0.05 + 0.2 * (torch.arange(len(MANY), dtype=torch.float64) * 7 % len(MANY)) / len(MANY)


def engine_of(model: nn.Module, problems: Sequence[Problem], max_tokens: int = 16384) -> tuple[PlainEngine, list]:
    """Return an engine with the problems' rows and one more, and the problems' shares."""
    rows, shares = tabulate([*problems, CANDIDATES[1]])
    return PlainEngine(model, rows, TEMPERATURE, max_tokens), shares[:-1]


def sketched(
    model: nn.Module,
    problems: Sequence[Problem],
    weights: Tensor | None,
    rank: int = 4,
    seed: int = 0,
    max_tokens: int = 16384,
) -> ProblemScores:
    engine, shares = engine_of(model, problems, max_tokens)
    with leave_no_trace(model):
        return sketched_scores(engine, shares, None if weights is None else weights.tolist(), rank, seed)


def sketches_of(model: nn.Module, problems: Sequence[Problem], rank: int, max_tokens: int = 16384) -> Tensor:
    """Return all problems' sketches of seed 0, (problems, parameter tensors, K, K), in the parameters' order."""
    engine, shares = engine_of(model, problems, max_tokens)
    with leave_no_trace(model):
        sketcher = Sketcher(sketch_points(model), rank, seed=0)
        batches, _ = sketch_gradients(engine, shares, sketcher)
    sketch_PLKK = torch.zeros(len(problems), *sketcher.shape, dtype=torch.float64)
    for places, of_batch_PLKK in batches:
        sketch_PLKK[places] = of_batch_PLKK
    return sketch_PLKK[:, [sketcher.names.index(name) for name, _ in trainable_parameters(model)]]


def projected(model: nn.Module, gradient_PG: Tensor, rank: int) -> Tensor:
    """Return the sketches that autograd's whole gradients have, (problems, parameter tensors, K, K)."""
    parameters = trainable_parameters(model)
    parts = gradient_PG.split([parameter.numel() for _, parameter in parameters], dim=1)
    sketches = []
    for (name, parameter), part_PG in zip(parameters, parts, strict=True):
        if parameter.dim() == 1:
            matrix = normal_matrix(0, f"{name} vector", (parameter.numel(), rank**2), part_PG.device).double()
            sketches.append((part_PG @ matrix).view(-1, rank, rank))
        else:
            sides = zip(("left", "right"), parameter.shape, strict=True)
            left_OK, right_IK = (normal_matrix(0, f"{name} {s}", (n, rank), part_PG.device).double() for s, n in sides)
            sketches.append(left_OK.T @ part_PG.view(-1, *parameter.shape) @ right_IK)
    return torch.stack(sketches, dim=1)


@pytest.mark.parametrize("has_checkpointing, max_tokens", PASSES.values(), ids=list(PASSES))
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied", "neox", "lora", "padding-tied", "norms-frozen"])
def test_a_sketch_is_the_projection_of_autograds_gradient(name: str, has_checkpointing: bool, max_tokens: int) -> None:
    model = make_model(name, has_checkpointing)
    gradient_PG = gradients_of_all_kinds(name)
    expected_PLKK = projected(model, gradient_PG, rank=4)
    error_PL = (sketches_of(model, ALL_KINDS, 4, max_tokens) - expected_PLKK).flatten(2).norm(dim=2)
    assert (error_PL <= RTOL_FLOAT64 * gradient_PG.norm(dim=1, keepdim=True)).all()


@cache
def gradients_of_all_kinds(name: str) -> Tensor:
    return dense_gradients(make_model(name), ALL_KINDS)


@pytest.mark.parametrize("name", ["qwen2-tied", "lora"])
def test_estimates_are_unbiased(name: str) -> None:
    model, problems = make_model(name), CANDIDATES[:4]
    weight_P = WEIGHTS[: len(problems)]
    expected_P = dense_learnalign(dense_gradients(model, problems), weight_P)
    found_SP = torch.stack([learnalign(sketched(model, problems, weight_P, 2, s), weight_P) for s in range(40)])
    standard_error_P = found_SP.std(dim=0) / len(found_SP) ** 0.5
    assert ((found_SP.mean(dim=0) - expected_P).abs() <= MAX_STANDARD_ERRORS * standard_error_P).all()
    # The bound is tight enough to see a score's own size.
    assert MAX_STANDARD_ERRORS * standard_error_P.min() < expected_P.abs().max()


@cache
def tied_model() -> tuple[nn.Module, Tensor]:
    model = make_model("qwen2-tied")
    return model, dense_learnalign(dense_gradients(model, MANY), MANY_WEIGHTS)


@cache
def quality(rank: int) -> tuple[float, float, float]:
    """Return (error as a share of the scores' spread, true fidelity, reported fidelity), means over seeds."""
    model, expected_P = tied_model()
    measured = []
    for seed in range(6):
        scores = sketched(model, MANY, MANY_WEIGHTS, rank, seed)
        found_P = learnalign(scores, MANY_WEIGHTS)
        error = (found_P - expected_P).square().mean().sqrt() / expected_P.std()
        measured.append([error.item(), spearman(found_P, expected_P), scores.diagnostics["fidelity/spearman"]])
    return tuple(torch.tensor(measured).mean(dim=0).tolist())  # type: ignore[return-value]


def test_the_error_falls_with_the_rank() -> None:
    errors = [quality(rank)[0] for rank in (2, 8, 32)]
    # At least with its square root, at best as fast as the rank grows: 2 to 4 times for each step.
    assert errors[1] < errors[0] / 1.7 and errors[2] < errors[1] / 1.7


@pytest.mark.parametrize("rank", [8, 32])
def test_the_sketch_knows_its_own_fidelity(rank: int) -> None:
    _, true, reported = quality(rank)
    assert reported == pytest.approx(true, abs=0.1)  # measured 0.03


def test_the_reported_fidelity_is_high_for_large_ranks_and_low_for_rank_two() -> None:
    assert quality(32)[2] > 0.9 and quality(2)[2] < 0.7


@pytest.mark.parametrize("is_weighted", [True, False], ids=["learnalign", "pool-cosine"])
def test_a_large_rank_comes_close_to_the_exact_scores(model: nn.Module, is_weighted: bool) -> None:
    weights = WEIGHTS[: len(CANDIDATES)] if is_weighted else None
    exact, found = along_own_pool(model, CANDIDATES, weights), sketched(model, CANDIDATES, weights, rank=200)
    assert found.direction_norm == pytest.approx(exact.direction_norm, rel=0.1)
    torch.testing.assert_close(found.cosine_P, exact.cosine_P, rtol=0.0, atol=0.1)


@settings(max_examples=8, deadline=None)
@given(weight=st.floats(1e-3, 0.25), place=st.integers(0, len(CANDIDATES) - 1), seed=st.integers(0, 2**40))
def test_a_problem_alone_is_exact(weight: float, place: int, seed: int) -> None:
    model, weight_P = tied_model()[0], torch.tensor([weight], dtype=torch.float64)
    scores = sketched(model, CANDIDATES[place : place + 1], weight_P, 2, seed)
    assert learnalign(scores, weight_P).item() == pytest.approx(weight**2, rel=RTOL_FLOAT64)
    assert scores.direction_norm == pytest.approx(weight, rel=RTOL_FLOAT64)
    assert sketched(model, CANDIDATES[place : place + 1], None, 2, seed).cosine_P.item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["qwen2-tied", "padding-untied", "neox"])
def test_norms_are_exact(name: str) -> None:
    expected_P = dense_gradients(make_model(name), ALL_KINDS).norm(dim=1)
    found = sketched(make_model(name), ALL_KINDS, None, 2)
    torch.testing.assert_close(found.norm_P, expected_P, rtol=RTOL_FLOAT64, atol=0.0)
    assert found.num_tokens_P.tolist() == [sum(row.num_tokens for row in problem) for problem in ALL_KINDS]


@pytest.mark.parametrize("name", ["qwen2-tied", "lora"])
def test_the_sketch_of_two_problems_merged_is_the_sum_of_their_sketches(name: str) -> None:
    model = make_model(name)
    apart = sketches_of(model, CANDIDATES, 6)
    merged = sketches_of(model, [CANDIDATES[0] + CANDIDATES[2], CANDIDATES[3]], 6)
    torch.testing.assert_close(merged[0], apart[0] + apart[2], rtol=0.0, atol=RTOL_FLOAT64)
    torch.testing.assert_close(merged[1], apart[3], rtol=0.0, atol=RTOL_FLOAT64)


@pytest.mark.parametrize("max_tokens", [140, 200])
def test_the_split_into_passes_does_not_matter(model: nn.Module, max_tokens: int) -> None:
    weights = WEIGHTS[: len(CANDIDATES)]
    whole, split = sketched(model, CANDIDATES, weights), sketched(model, CANDIDATES, weights, max_tokens=max_tokens)
    torch.testing.assert_close(split.cosine_P, whole.cosine_P, rtol=RTOL_FLOAT64, atol=0.0)


def test_problems_of_equal_rows_are_sketched_together_as_they_are_apart(model: nn.Module) -> None:
    equal = draw([[4, 6], [6, 2], [6, 6]], 52)
    equal = [[replace(row, prompt=row.prompt[:1]) for row in problem] for problem in equal]
    together = sketches_of(model, equal, 4)
    apart = torch.cat([sketches_of(model, [problem], 4) for problem in equal])
    torch.testing.assert_close(together, apart, rtol=0.0, atol=RTOL_FLOAT64)


def test_a_seed_gives_the_same_scores_and_another_one_others(model: nn.Module) -> None:
    first, again, other = (sketched(model, CANDIDATES, None, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.dot_P, again.dot_P) and not torch.equal(first.dot_P, other.dot_P)


def test_halves_of_problems_do_not_matter(model: nn.Module) -> None:
    engine, shares = engine_of(model, CANDIDATES[:1])
    split = [replace(shares[0], is_split=True, halves=(0, 0, 1))]
    with leave_no_trace(model):
        first, second = (sketched_scores(engine, each, [0.2], 4, 0) for each in (shares, split))
    assert torch.equal(first.dot_P, second.dot_P) and second.half_dot_P2 is None


def test_problems_without_a_gradient_score_zero_and_change_nothing(model: nn.Module) -> None:
    weights = torch.full((len(CANDIDATES) + 1 + len(EMPTY),), 0.2, dtype=torch.float64)
    alone = sketched(model, CANDIDATES, weights[: len(CANDIDATES)])
    together = sketched(model, [DEAD, *CANDIDATES, *EMPTY], weights)
    assert together.direction_norm == pytest.approx(alone.direction_norm, rel=RTOL_FLOAT64)
    expected_P = torch.cat([torch.zeros(1), alone.dot_P, torch.zeros(len(EMPTY))])
    torch.testing.assert_close(together.dot_P, expected_P, rtol=RTOL_FLOAT64, atol=0.0)


@pytest.mark.parametrize("problems", [CANDIDATES[:2], [DEAD, *EMPTY], []], ids=["no-weights", "no-gradients", "none"])
def test_a_pool_without_a_direction_says_so_and_scores_zero(model: nn.Module, problems: list[Problem]) -> None:
    scores = sketched(model, problems, torch.zeros(len(problems), dtype=torch.float64))
    assert scores.direction_norm == 0.0 and torch.equal(scores.dot_P, torch.zeros_like(scores.dot_P))


def test_fewer_than_three_problems_have_no_fidelity(model: nn.Module) -> None:
    found = [sketched(model, CANDIDATES[:count], None).diagnostics["fidelity/spearman"] for count in (2, 3)]
    assert found[0] != found[0] and 0.0 <= found[1] <= 1.0


def test_an_overflowed_problem_spoils_no_other(model: nn.Module) -> None:
    infinite = [replace(row, coefficient=row.coefficient * torch.inf) for row in CANDIDATES[1]]
    scores = sketched(model, [CANDIDATES[0], infinite, CANDIDATES[2]], None)
    alone = sketched(model, [CANDIDATES[0], CANDIDATES[2]], None)
    torch.testing.assert_close(scores.dot_P[[0, 2]], alone.dot_P, rtol=RTOL_FLOAT64, atol=0.0)
    assert not scores.dot_P[1].isfinite()


def test_bfloat16_gives_nearly_the_same_sketch() -> None:
    model = make_model("qwen3-untied")
    expected_P = sketched(model, MANY, MANY_WEIGHTS, 16).cosine_P
    rows, shares = tabulate([[replace(r, coefficient=r.coefficient.float()) for r in problem] for problem in MANY])
    engine = PlainEngine(model.float(), rows, TEMPERATURE, autocast_dtype=torch.bfloat16)
    with leave_no_trace(model):
        found_P = sketched_scores(engine, shares, MANY_WEIGHTS.tolist(), 16, 0).cosine_P
    assert spearman(found_P, expected_P) > 0.98
    assert not torch.equal(found_P, expected_P)


@pytest.mark.parametrize("weights", [None, WEIGHTS[: len(CANDIDATES)]], ids=["pool-sum", "unit-sum"])
def test_sketching_leaves_no_trace(weights: Tensor | None) -> None:
    model = make_model("qwen2-tied", has_checkpointing=True)
    before = observe(model)
    sketched(model, CANDIDATES, weights)
    assert observe(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_layer_with_a_rule_of_its_own_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = finished(gpt2())
    conv = type(model.transformer.h[0].attn.c_attn)
    monkeypatch.setitem(layer_rules.LAYER_RULES, conv, lambda call: layer_rules.linear(call))
    with pytest.raises(ValueError, match=r"h\.0\.attn\.c_attn \(Conv1D\).*no sketch.*pool_dots=exact"):
        sketched(model, CANDIDATES, None)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "wpe" not in name)


def test_a_problem_larger_than_a_micro_batch_is_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="problem p0 takes 82 positions, more than the 50 .*pool_dots=exact"):
        sketched(model, CANDIDATES[4:], None, max_tokens=50)
