# SPDX-License-Identifier: Apache-2.0
"""What the kit compares with is autograd's, what it compares is what it says, and its verdicts see what is wrong.

Shape legend: P problems, R responses.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.problems import make_float64
from verl_gradalign.bench import reference
from verl_gradalign.bench.agreement import FLOAT32_RMS, HALF_RMS, agreement, is_exact, is_faithful, largest_difference
from verl_gradalign.bench.cases import QWEN_05B, Case, build_model, draw_problems, tiny
from verl_gradalign.bench.packed import PackedEngine
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.bench.reference import Reference, reference_scores
from verl_gradalign.types import ProblemScores, TokenRow

CPU = torch.device("cpu")
RTOL_FLOAT64 = 1e-10  # measured 1e-15
RTOL_FLOAT32 = 1e-5  # measured 3e-7
CASE = replace(tiny(QWEN_05B), dtype="float32", is_uneven=True)


def gradient_by_backward(model: nn.Module, rows: Sequence[TokenRow]) -> Tensor:
    """Return the summed gradient, by torch's own log-softmax and `.backward()`."""
    model.zero_grad()
    for row in rows:
        ids = torch.cat([row.prompt, row.response])
        log_probs = torch.log_softmax(model(input_ids=ids.unsqueeze(0)).logits[0], dim=-1)[len(row.prompt) - 1 : -1]
        (row.coefficient * log_probs.gather(1, row.response.unsqueeze(1)).squeeze(1)).sum().backward()
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return flat


def test_the_reference_is_autograd() -> None:
    model = make_float64(build_model(CASE))
    problems = draw_problems(CASE)
    trusted, candidates = problems[:2], problems[2:5]
    found = reference_scores(model, trusted, candidates)
    direction = gradient_by_backward(model, [row for problem in trusted for row in problem])
    unit = direction / direction.norm()
    gradients = [gradient_by_backward(model, problem) for problem in candidates]
    torch.testing.assert_close(found.dot_P, torch.stack([g @ unit for g in gradients]), rtol=RTOL_FLOAT64, atol=0)
    torch.testing.assert_close(found.norm_P, torch.stack([g.norm() for g in gradients]), rtol=RTOL_FLOAT64, atol=0)
    plain = [[replace(row, coefficient=torch.ones_like(row.coefficient)) for row in problem] for problem in candidates]
    derivatives = [[float(gradient_by_backward(model, [row]) @ unit) for row in problem] for problem in plain]
    wanted = torch.tensor(derivatives, dtype=torch.float64)
    torch.testing.assert_close(found.derivative_PR, wanted, rtol=1e-6, atol=0)  # coefficients are float32
    assert found.direction_norm == pytest.approx(float(direction.norm()), rel=RTOL_FLOAT64)


def test_the_reference_knows_nothing_of_the_probe() -> None:
    with open(reference.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module.startswith("verl_gradalign")} == {"verl_gradalign.types"}


@pytest.mark.parametrize("is_oversized", [False, True])
def test_packed_rows_have_the_scores_of_padded_ones(is_oversized: bool) -> None:
    case = replace(CASE, max_tokens=40 if is_oversized else CASE.max_tokens)
    packed, padded = PlainBench(case, CPU, engine_class=PackedEngine), PlainBench(case, CPU)
    assert largest_difference(packed.score("ghost"), padded.score("ghost")) <= RTOL_FLOAT32
    assert packed.direction.norm == pytest.approx(padded.direction.norm, rel=RTOL_FLOAT32)


def test_a_measured_update_gives_the_parts_of_the_scores() -> None:
    bench = PlainBench(CASE, CPU)
    scores = bench.score("ghost")
    parts_PR = bench.measured_gradient().view(CASE.num_problems, CASE.rows_per_problem)
    assert scores.norm_P is not None
    assert ((parts_PR.sum(dim=1) - scores.dot_P).abs() / scores.norm_P).max() <= RTOL_FLOAT32


def fixed(num: int = 16) -> tuple[ProblemScores, Reference]:
    """Return scores, and a reference that agrees with them."""
    generator = torch.Generator().manual_seed(0)
    dot_P = torch.randn(num, generator=generator, dtype=torch.float64)
    norm_P = 1 + torch.rand(num, generator=generator, dtype=torch.float64)
    derivative_PR = torch.randn(num, 4, generator=generator, dtype=torch.float64)
    uid = tuple(map(str, range(num)))
    scores = ProblemScores(uid, dot_P, norm_P, torch.ones(num), derivative_PR, 1.0)
    return scores, Reference(dot_P, norm_P, derivative_PR, 1.0)


@pytest.mark.parametrize(
    ("off", "exact", "faithful"),
    [(0.0, True, True), (0.5 * FLOAT32_RMS, True, True), (0.5 * HALF_RMS, False, True), (2 * HALF_RMS, False, False)],
)
@pytest.mark.parametrize("which", ["dot_P", "norm_P"])
def test_a_verdict_sees_what_is_off(which: str, off: float, exact: bool, faithful: bool) -> None:
    scores, reference_ = fixed()
    moved = getattr(scores, which) + off * reference_.norm_P
    found = agreement(replace(scores, **{which: moved}), reference_)
    assert (is_exact(found), is_faithful(found)) == (exact, faithful)


def test_a_verdict_sees_responses_in_another_order() -> None:
    scores, reference_ = fixed()
    assert scores.response_derivative_PR is not None
    found = agreement(replace(scores, response_derivative_PR=scores.response_derivative_PR.flip(0)), reference_)
    assert found["spearman_responses"] < 0.9 and not is_faithful(found)


def test_a_dry_run_keeps_the_order_of_models_and_lengths() -> None:
    def size(case: Case) -> tuple[int, int]:
        return case.num_layers, case.tokens_per_row

    longer = replace(QWEN_05B, tokens_per_row=4096)
    deeper = replace(QWEN_05B, num_layers=28)
    assert size(tiny(QWEN_05B)) < size(tiny(longer)) < size(tiny(deeper))
