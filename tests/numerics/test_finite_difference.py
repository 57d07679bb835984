# SPDX-License-Identifier: Apache-2.0
"""Central differences: their order, what they leave behind, and forward-mode differentiation as a second oracle.

Shape legend: T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.numerics.cases import ALL_KINDS, CANDIDATES, DEAD, TRUSTED, expect, score
from tests.numerics.models import make_model
from tests.numerics.problems import TEMPERATURE, Problem, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import Direction, compute_direction
from verl_gradalign.probe.estimators.finite_difference import FiniteDifferenceEstimator, perturbation
from verl_gradalign.probe.gradient import leave_no_trace, trainable_parameters
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import TokenRow

RTOL_FORWARD_MODE = 1e-10  # of the row's gradient; measured 3e-17
RTOL_DIFFERENCE = 1e-6  # of the row's gradient, at a step of 2e-5 |theta|; measured 1.2e-7 (test_exactness.py)
ROUNDING = 1e-15  # of parameters of order 1, moved and subtracted again
STEPS = (2e-3, 1e-3, 5e-4, 2.5e-4)
"""As shares of |theta|: small enough for the second-order term to rule, large enough for rounding not to show."""
ORDER_TOLERANCE = 0.05  # of the ratio 4; measured 0.016 at the largest step


@pytest.mark.parametrize(
    "trusted", [TRUSTED, CANDIDATES[:1]], ids=["along-the-trusted-gradient", "along-a-candidates-own-gradient"]
)
def test_the_error_falls_fourfold_when_the_step_is_halved(model: nn.Module, trusted: list[Problem]) -> None:
    expected = expect(model, trusted, CANDIDATES)
    dot_errors, derivative_errors = [], []
    for step in STEPS:
        scores = score("finite_difference", model, trusted, CANDIDATES, config=ProbeConfig(relative_step=step))
        assert scores.response_derivative_PR is not None
        dot_errors.append((scores.dot_P - expected.dot_P).norm().item())
        error_PR = scores.response_derivative_PR - expected.derivative_PR
        derivative_errors.append(error_PR.nan_to_num().norm().item())
    for errors in (dot_errors, derivative_errors):
        ratios = [large / small for large, small in zip(errors, errors[1:], strict=False)]
        assert ratios == pytest.approx([4.0] * len(ratios), rel=ORDER_TOLERANCE)


def test_the_step_is_a_share_of_the_parameters_norm(model: nn.Module) -> None:
    scores = score("finite_difference", model, TRUSTED, CANDIDATES, config=ProbeConfig(relative_step=2e-3))
    size = math.sqrt(sum(parameter.detach().square().sum().item() for parameter in model.parameters()))
    assert scores.diagnostics["step"] == pytest.approx(2e-3 * size)


def test_rows_without_advantage_have_derivatives(model: nn.Module) -> None:
    scores = score("finite_difference", model, TRUSTED, [DEAD])
    assert scores.dot_P[0] == 0.0
    assert scores.response_derivative_PR is not None and (scores.response_derivative_PR.abs() > 0).all()


def direction_and_engine(model: nn.Module, problems: list[Problem]) -> tuple[Direction, PlainEngine, list]:
    rows, shares = tabulate([*TRUSTED, *problems])
    engine = PlainEngine(model, rows, TEMPERATURE)
    with leave_no_trace(model):
        return compute_direction(engine, shares[: len(TRUSTED)]), engine, shares[len(TRUSTED) :]


def parameter_bits(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


class FailsLater(PlainEngine):
    """An engine whose pass number `fails_at` raises."""

    num_passes, fails_at = 0, 2

    def forward(self, rows, rows_per_problem, **options):  # noqa: ANN001, ANN003, ANN201
        self.num_passes += 1
        if self.num_passes == self.fails_at:
            raise ArithmeticError("in the second pass")
        return super().forward(rows, rows_per_problem, **options)


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_restored_bit_for_bit(fails: bool) -> None:
    model = make_model("qwen3-tied")
    direction, engine, shares = direction_and_engine(model, CANDIDATES)
    before, places = parameter_bits(model), [parameter.data_ptr() for parameter in model.parameters()]
    if fails:
        failing = FailsLater(model, engine._rows, TEMPERATURE)
        with pytest.raises(ArithmeticError), leave_no_trace(model):
            FiniteDifferenceEstimator().score(failing, shares, direction)
    else:
        with leave_no_trace(model):
            FiniteDifferenceEstimator().score(engine, shares, direction)
    assert parameter_bits(model) == before
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_move_is_measured_from_where_the_parameters_were_and_leaves_frozen_ones_alone() -> None:
    model = make_model("norms-frozen")
    direction, *_ = direction_and_engine(model, CANDIDATES)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [name for name, _ in trainable_parameters(model)]
    with torch.no_grad(), perturbation(model, direction) as move:
        move(0.5)
        move(-0.25)
        moved = {name: parameter - before[name] for name, parameter in model.named_parameters()}
    for name, shard in zip(trained, direction.shards, strict=True):
        torch.testing.assert_close(moved.pop(name), -0.25 * shard, rtol=0.0, atol=ROUNDING)
    assert moved and not any(difference.any() for difference in moved.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_stored_in_half_precision_are_refused_by_name(dtype: torch.dtype) -> None:
    model = make_model("lora")
    named = dict(trainable_parameters(model))
    name = next(iter(named))
    named[name].data = named[name].data.to(dtype)
    with pytest.raises(ValueError) as refusal:
        FiniteDifferenceEstimator().check(model)
    assert name in str(refusal.value) and "model_dtype=fp32" in str(refusal.value) and "ghost" in str(refusal.value)
    zeros = tuple(torch.zeros_like(parameter) for parameter in named.values())
    with pytest.raises(ValueError, match="is stored in"), perturbation(model, Direction(zeros, 1.0)):
        raise AssertionError("no perturbation may begin")


def test_frozen_parameters_may_be_stored_in_half_precision() -> None:
    model = make_model("lora")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    FiniteDifferenceEstimator().check(model)


def forward_mode(model: nn.Module, row: TokenRow, tangents: dict[str, Tensor]) -> Tensor:
    """Return the derivative of each token's log-prob along `tangents`, (T,), by forward-mode differentiation."""
    ids = torch.cat([row.prompt, row.response]).unsqueeze(0)
    first, rest = row.prompt.numel() - 1, {n: p.detach() for n, p in model.named_parameters() if n not in tangents}
    primals = {name: parameter.detach() for name, parameter in model.named_parameters() if name in tangents}

    def log_probs(parameters: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, {**rest, **parameters}, (ids,), {"use_cache": False}).logits[0]
        log_prob_TV = (logits[first : first + row.response.numel()] / TEMPERATURE).log_softmax(dim=-1)
        return log_prob_TV.gather(-1, row.response.unsqueeze(-1)).squeeze(-1)

    # Fused attention has no forward mode, and transformers' own computes its softmax in float32.
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(log_probs, (primals,), (tangents,))[1]


@pytest.mark.parametrize("name", ["qwen2-untied", "qwen3-tied"])
def test_forward_mode_differentiation_gives_the_same_derivatives(name: str) -> None:
    model = make_model(name)
    # One coefficient for all tokens of a row, and once more with a single token weighted: catches shifts by one.
    problems = [*CANDIDATES, DEAD, [one_token(CANDIDATES[0][0], 2)]]
    direction, *_ = direction_and_engine(model, problems)
    tangents = {name: v for (name, _), v in zip(trainable_parameters(model), direction.shards, strict=True)}
    ghost = score("ghost", model, TRUSTED, problems)
    difference = score("finite_difference", model, TRUSTED, problems, config=ProbeConfig(relative_step=2e-5))
    size = expect(model, TRUSTED, problems).row_norm_PR.nan_to_num().max().item()
    assert ghost.response_derivative_PR is not None and difference.response_derivative_PR is not None
    for index, problem in enumerate(problems[:-1]):
        for place, row in enumerate(problem):
            expected = forward_mode(model, row, tangents).sum().item()
            assert abs(ghost.response_derivative_PR[index, place].item() - expected) <= RTOL_FORWARD_MODE * size
            assert difference.response_derivative_PR[index, place].item() == pytest.approx(
                expected, abs=RTOL_DIFFERENCE * size
            )
    token = forward_mode(model, CANDIDATES[0][0], tangents)[2].item()
    assert abs(ghost.dot_P[-1].item() - token) <= RTOL_FORWARD_MODE * size


def one_token(row: TokenRow, place: int) -> TokenRow:
    """Return the row with weight 1 on one of its tokens and 0 on the others."""
    coefficient = torch.zeros_like(row.coefficient)
    coefficient[place] = 1.0
    return replace(row, coefficient=coefficient)


def test_passes_see_the_same_rows_in_the_same_order(model: nn.Module) -> None:
    direction, engine, shares = direction_and_engine(model, ALL_KINDS)
    seen: list[tuple[int, ...]] = []
    engine_forward = engine.forward

    def forward(rows: Sequence[int], *arguments: Any, **options: Any) -> tuple[Tensor, Layout]:
        seen.append(tuple(rows))
        return engine_forward(rows, *arguments, **options)

    with leave_no_trace(model), mock.patch.object(engine, "forward", forward):
        FiniteDifferenceEstimator().score(engine, shares, direction)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
