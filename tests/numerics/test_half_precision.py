# SPDX-License-Identifier: Apache-2.0
"""Scores in half precision, whatever the size of the coefficients: those of long problems are 1e-5 a token and less.

A coefficient's size must not matter at all: times a power of two, every score is the same number times it, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.numerics.cases import CANDIDATES, TRUSTED, UNEVEN, scale
from tests.numerics.models import finished, qwen2
from tests.numerics.problems import TEMPERATURE, Problem, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.layout import packed_layout, padded_layout
from verl_gradalign.probe.matrix_scores import Segment, gram, per_problem, per_row, scaled_rows
from verl_gradalign.probe.passes import micro_batches, pass_weights, power_of_two
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.sketch import sketched_scores
from verl_gradalign.types import ProblemRows, ProblemScores

RTOL = {torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the norm; measured below half of it at every size
TINY = 2.0**-20
"""Times a coefficient of about 0.1: that of a problem of a million tokens."""
PROBLEMS = [*CANDIDATES, UNEVEN]


@pytest.fixture(scope="module")
def single() -> nn.Module:
    torch.manual_seed(0)
    return finished(qwen2(tie_word_embeddings=True)).float()


def make_engine(
    model: nn.Module, problems: Sequence[Problem], dtype: torch.dtype | None
) -> tuple[GradientEngine, list[ProblemRows]]:
    rows, shares = tabulate(problems)
    return PlainEngine(model, rows, TEMPERATURE, autocast_dtype=dtype), shares


def scored(
    model: nn.Module, factor: float, dtype: torch.dtype | None, estimator: str, per_response: bool
) -> ProblemScores:
    """Return the scores with the coefficients of all problems, the trusted ones too, times a factor."""
    problems = [scale(problem, factor) for problem in (*TRUSTED, *PROBLEMS)]
    engine, shares = make_engine(model, problems, dtype)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares[: len(TRUSTED)])
        method = ESTIMATORS[estimator](ProbeConfig(response_derivatives=per_response))
        return method.score(engine, shares[len(TRUSTED) :], direction)


def errors_of(scores: ProblemScores, expected: ProblemScores, factor: float) -> dict[str, float]:
    norm_P = expected.norm_P
    assert norm_P is not None and scores.norm_P is not None
    found = {
        "direction": abs(scores.direction_norm / factor / expected.direction_norm - 1),
        "dot": ((scores.dot_P / factor - expected.dot_P).abs() / norm_P).max().item(),
        "norm": ((scores.norm_P / factor - norm_P).abs() / norm_P).max().item(),
    }
    return found


@pytest.mark.parametrize("factor", [1.0, TINY])
@pytest.mark.parametrize("per_response", [False, True])
@pytest.mark.parametrize("estimator", ["ghost", "backward"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tiny_coefficients_give_the_scores_of_single_precision(
    single: nn.Module, dtype: torch.dtype, estimator: str, per_response: bool, factor: float
) -> None:
    expected = scored(single, 1.0, None, "ghost", per_response)
    errors = errors_of(scored(single, factor, dtype, estimator, per_response), expected, factor)
    assert max(errors.values()) <= RTOL[dtype], errors


@pytest.mark.parametrize("per_response", [False, True])
@pytest.mark.parametrize("estimator", ["ghost", "backward"])
def test_a_power_of_two_times_the_coefficients_changes_no_bit_in_float16(
    single: nn.Module, estimator: str, per_response: bool
) -> None:
    usual, tiny = (scored(single, factor, torch.float16, estimator, per_response) for factor in (1.0, TINY))
    assert usual.norm_P is not None and tiny.norm_P is not None
    assert torch.equal(tiny.dot_P, usual.dot_P * TINY) and torch.equal(tiny.norm_P, usual.norm_P * TINY)
    assert tiny.direction_norm == usual.direction_norm * TINY


def test_a_long_problem_beside_a_short_one_keeps_its_precision(single: nn.Module) -> None:
    """In one micro-batch, and one direction: only the candidate is long."""
    problems = [*TRUSTED, CANDIDATES[0], scale(CANDIDATES[0], TINY)]
    engine, shares = make_engine(single, problems, torch.float16)
    with leave_no_trace(single):
        direction = compute_direction(engine, shares[: len(TRUSTED)])
        method = ESTIMATORS["ghost"](ProbeConfig(response_derivatives=False))
        scores = method.score(engine, shares[len(TRUSTED) :], direction)
    assert scores.norm_P is not None
    for values in (scores.dot_P, scores.norm_P):
        assert values[1].item() / TINY == pytest.approx(values[0].item(), rel=1e-3)


def test_a_sketch_in_float16_does_not_lose_tiny_coefficients(single: nn.Module) -> None:
    found = []
    for factor in (1.0, TINY):
        engine, shares = make_engine(single, [scale(problem, factor) for problem in CANDIDATES], torch.float16)
        with leave_no_trace(single):
            found.append(sketched_scores(engine, shares, None, rank=8, seed=0))
    usual, tiny = found
    torch.testing.assert_close(tiny.dot_P, usual.dot_P * TINY, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(tiny.norm_P, usual.norm_P * TINY, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("per_response", [False, True])
def test_weight_times_scale_is_the_coefficient_and_no_problem_has_small_weights_only(
    single: nn.Module, per_response: bool
) -> None:
    problems = [scale(problem, factor) for problem in PROBLEMS for factor in (1.0, 1e-4, TINY, 1e6)]
    engine, shares = make_engine(single, problems, None)
    for batch in micro_batches(engine, shares):
        width = max(len(engine.coefficients(row)[0]) for row in batch.rows)
        weight_RT, scale_R, gives_R = pass_weights(engine, batch, width, torch.float64, per_response)
        row = 0
        for index, parts in zip(batch.problems, batch.parts, strict=True):
            largest = 0.0
            for _ in range(sum(parts)):
                coefficient_T, _ = engine.coefficients(batch.rows[row])
                scale_1 = scale_R[row] if per_response else scale_R[list(batch.problems).index(index)]
                actual_T = weight_RT[row, : len(coefficient_T)] * scale_1
                assert torch.equal(actual_T, coefficient_T)
                largest = max(largest, float(weight_RT[row].max()), float(-weight_RT[row].min()))
                assert per_response or not gives_R.any()
                row += 1
            assert 1 <= largest < 2
        assert row == len(batch.rows)


@given(size=st.floats(min_value=0.0, max_value=1e300))
def test_a_power_of_two_divides_exactly_to_a_number_from_one_to_two(size: float) -> None:
    power = power_of_two(size)
    if 1e-300 < size:
        assert 1 <= size / power < 2 and size / power * power == size
    assert power_of_two(float("inf")) == power_of_two(float("nan")) == power_of_two(0.0) == 1.0


def make_segment(seed: int, is_padded: bool, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Segment, Tensor]:
    """Return a problem whose rows have tiny scales, and its gradient's squared norm in float64."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [40] * 3 if is_padded else [30, 50, 40]
    layout = padded_layout(3, 40, (3,)) if is_padded else packed_layout(lengths, 120, (3,))
    delta_NO, input_NI = (torch.randn(120, size, generator=generator).to(dtype) for size in shape)
    scale_R = torch.tensor([3.3e-9, -1.7e-9, 5.1e-10])
    gradients = [delta_NO[row].double().T @ input_NI[row].double() for row in layout.rows()]
    squared_norm = torch.stack([s * g for s, g in zip(scale_R.double(), gradients, strict=True)]).sum(0).square().sum()
    return Segment(delta_NO, input_NI, torch.randn(shape, generator=generator), layout, scale_R), squared_norm


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), is_padded=st.booleans(), shape=st.sampled_from([(24, 16), (16, 24)]))
def test_the_forms_agree_on_rows_of_tiny_scales(seed: int, is_padded: bool, shape: tuple[int, int]) -> None:
    segment, expected = make_segment(seed, is_padded, shape, torch.float32)
    for form in (per_row, per_problem, gram):
        torch.testing.assert_close(form(segment)[1].double(), expected.view(1), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), is_padded=st.booleans(), shape=st.sampled_from([(24, 16), (16, 24)]))
def test_scales_are_not_rounded_to_half_precision(
    dtype: torch.dtype, seed: int, is_padded: bool, shape: tuple[int, int]
) -> None:
    """A rounded scale would be 4e-3 off in bfloat16, for all of its row alike; in float16 these would be zero."""
    segment, expected = make_segment(seed, is_padded, shape, dtype)
    delta_PTO, input_PTI, size_P = scaled_rows(segment)
    assert delta_PTO.dtype == input_PTI.dtype == dtype
    norm = (delta_PTO[0].double().T @ input_PTI[0].double()).norm() * size_P[0].double()
    torch.testing.assert_close(norm, expected.sqrt(), rtol=5e-4, atol=0.0)
