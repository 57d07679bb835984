# SPDX-License-Identifier: Apache-2.0
"""Problems larger than a micro-batch run in several, on one rank, and are scored as if they fitted.

Shape legend: P problems, R responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.numerics.cases import TRUSTED, draw, expect
from tests.numerics.models import make_model
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe import sizes
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.layer_rules import LAYER_RULES, LayerCall, LayerScores, linear
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.passes import cut
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemRows, ProblemScores

RTOL = 1e-10  # of the gradient's norm
LARGE = draw([[9, 4, 7, 12, 3, 8, 0, 5], [6, 6, 6, 6], [3, 2], [20, 1, 19, 2, 18, 3]], 50)
SMALL = 45
"""Positions of a micro-batch that hold two or three of LARGE's responses."""
TOO_LARGE = 3


class CountingEngine(PlainEngine):
    """Notes how many rows, and how many positions, each pass has."""

    passes: list[tuple[int, int]]

    def forward(self, rows: Sequence[int], *arguments: object, **options: object) -> tuple[Tensor, Layout]:
        self.passes.append((len(rows), len(rows) * max(self.row_length(row) for row in rows)))
        return super().forward(rows, *arguments, **options)  # type: ignore[arg-type]


def scored(
    model: nn.Module, estimator: str, max_tokens: int, config: ProbeConfig | None = None, is_split: bool = False
) -> tuple[ProblemScores, list[tuple[int, int]]]:
    rows, shares = tabulate([*TRUSTED, *LARGE])
    if is_split:
        halves = [tuple(int(2 * k >= share.num_rows) for k in range(share.num_rows)) for share in shares]
        shares = [replace(share, is_split=True, halves=mine) for share, mine in zip(shares, halves, strict=True)]
    engine = CountingEngine(model, rows, TEMPERATURE, max_tokens)
    engine.passes = []
    with leave_no_trace(model):
        direction = compute_direction(PlainEngine(model, rows, TEMPERATURE), shares[: len(TRUSTED)])
        engine.passes.clear()
        return ESTIMATORS[estimator](config).score(engine, shares[len(TRUSTED) :], direction), engine.passes


@pytest.mark.parametrize("per_response", [True, False])
@pytest.mark.parametrize("blocks", [2**26, 300])
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "neox", "lora", "biases-only", "padding-tied"])
def test_scores_of_problems_larger_than_a_micro_batch_equal_autograd(
    name: str, blocks: int, per_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", blocks)
    model, config = make_model(name), ProbeConfig(response_derivatives=per_response)
    scores, passes = scored(model, "ghost", SMALL, config, is_split=True)
    expected = expect(model, TRUSTED, LARGE)
    assert max(size for _, size in passes) <= SMALL and sum(rows for rows, _ in passes) == sum(map(len, LARGE))
    assert scores.norm_P is not None and scores.half_dot_P2 is not None
    assert ((scores.dot_P - expected.dot_P).abs() <= RTOL * expected.norm_P).all()
    assert ((scores.norm_P - expected.norm_P).abs() <= RTOL * expected.norm_P).all()
    whole, _ = scored(model, "ghost", 10_000, config, is_split=True)
    torch.testing.assert_close(scores.half_dot_P2, whole.half_dot_P2, rtol=1e-9, atol=1e-12)
    if per_response:
        assert scores.response_derivative_PR is not None
        error_PR = (scores.response_derivative_PR - expected.derivative_PR).abs()
        assert (error_PR <= RTOL * expected.row_norm_PR)[~expected.derivative_PR.isnan()].all()


@pytest.mark.parametrize("estimator", ["low_rank", "finite_difference", "output_layer"])
def test_every_estimator_cuts_problems(estimator: str) -> None:
    model = make_model("qwen2-tied")
    (scores, passes), (whole, _) = (scored(model, estimator, size) for size in (SMALL, 10_000))
    assert len(passes) > TOO_LARGE
    tolerance = 1e-5 if estimator == "finite_difference" else 1e-9
    for name in ("dot_P", "norm_P", "response_derivative_PR"):
        one, other = getattr(scores, name), getattr(whole, name)
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_rule_of_the_users_own_gives_no_norm_of_a_problem_that_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(call: LayerCall) -> LayerScores:
        return linear(call)

    monkeypatch.setitem(LAYER_RULES, nn.Linear, own)
    words = r"layer rule of .* \(Linear\) gives norms of whole problems only.*oversized=backward"
    with pytest.raises(ValueError, match=words):
        scored(make_model("qwen2-tied"), "ghost", SMALL)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    max_tokens=st.integers(50, 200),
    is_padded=st.booleans(),
)
def test_runs_of_rows_fit_and_are_as_few_as_in_this_order_they_can_be(
    lengths: list[int], max_tokens: int, is_padded: bool
) -> None:
    budget, problem = TokenBudget(max_tokens, is_padded), ProblemRows("p", (), len(lengths), sum(lengths), max(lengths))

    def fits(rows: slice) -> bool:
        mine = lengths[rows]
        return budget.holds([ProblemRows("p", (), len(mine), sum(mine), max(mine))])

    runs = cut(problem, lengths, budget)
    assert [k for run in runs for k in range(run.start, run.stop)] == list(range(len(lengths)))
    assert all(fits(run) for run in runs)
    assert not any(fits(slice(run.start, run.stop + 1)) for run in runs[:-1])
