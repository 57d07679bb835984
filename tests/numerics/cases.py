# SPDX-License-Identifier: Apache-2.0
"""The problems that every estimator is run on, one call that scores them, and what autograd says of them.

    scores = score("ghost", model, TRUSTED, CANDIDATES)
    expected = expect(model, TRUSTED, CANDIDATES)

Shape legend: P problems, R responses, G all trainable numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tests.numerics.models import PADDING_TOKEN
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, Problem, draw_problem, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemScores

TRUSTED_LENGTHS = ([5, 3], [4, 6, 2])
CANDIDATE_LENGTHS = ([7, 1, 4], [3], [6, 6], [0, 5, 2, 0], [40, 2])
EXACT = [name for name, estimator in ESTIMATORS.items() if estimator.is_exact]
WHOLE = [name for name, estimator in ESTIMATORS.items() if estimator.needs_whole_problems]


def draw(lengths: Sequence[Sequence[int]], first_seed: int) -> list[Problem]:
    return [draw_problem(each, seed) for seed, each in enumerate(lengths, first_seed)]


def scale(problem: Problem, factor: float) -> Problem:
    return [replace(response, coefficient=response.coefficient * factor) for response in problem]


def unevenly_weighted(problem: Problem) -> Problem:
    """Return the problem with another coefficient for every token."""
    return [
        replace(row, coefficient=row.coefficient * torch.linspace(0.5, 2.0, len(row.coefficient), dtype=torch.float64))
        for row in problem
    ]


def with_padding_tokens(problem: Problem) -> Problem:
    """Return the problem with the models' padding token at the end of the prompt and in each response."""
    rows = []
    for row in problem:
        prompt, response = row.prompt.clone(), row.response.clone()
        prompt[-1] = PADDING_TOKEN
        response[1::2] = PADDING_TOKEN
        rows.append(replace(row, prompt=prompt, response=response))
    return rows


TRUSTED = draw(TRUSTED_LENGTHS, 10)
CANDIDATES = draw(CANDIDATE_LENGTHS, 20)
CANDIDATES[2] = with_padding_tokens(CANDIDATES[2])
DEAD = scale(draw_problem([4, 2], 30), 0.0)
"""A problem without advantages: no gradient, but responses that have derivatives."""
UNEVEN = unevenly_weighted(draw_problem([3, 5, 1], 31))
EMPTY = [draw_problem([0], 32), draw_problem([0, 0], 33), draw_problem([], 34)]
ALL_KINDS = [*CANDIDATES, DEAD, UNEVEN, *EMPTY]


def score(
    estimator: str,
    model: nn.Module,
    trusted: Sequence[Problem],
    candidates: Sequence[Problem],
    max_tokens: int = 16384,
    config: ProbeConfig | None = None,
) -> ProblemScores:
    """Return the scores of `candidates` along the direction of `trusted`, on the plain engine."""
    rows, shares = tabulate([*trusted, *candidates])
    engine = PlainEngine(model, rows, TEMPERATURE, max_tokens)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares[: len(trusted)])
        return ESTIMATORS[estimator](config).score(engine, shares[len(trusted) :], direction)


@dataclass(frozen=True)
class Expected:
    """The oracle's word on the candidates."""

    gradient_PG: Tensor
    direction_G: Tensor
    """Not normalised."""
    row_gradient_G: list[list[Tensor]]
    """Gradient of each row's log pi(y), by problem."""

    @property
    def direction_norm(self) -> float:
        return self.direction_G.norm().item()

    @property
    def dot_P(self) -> Tensor:
        return self.gradient_PG @ (self.direction_G / self.direction_norm)

    @property
    def norm_P(self) -> Tensor:
        return self.gradient_PG.norm(dim=1)

    @property
    def cosine_P(self) -> Tensor:
        return (self.dot_P / self.norm_P).nan_to_num(nan=0.0)

    @property
    def derivative_PR(self) -> Tensor:
        """Derivative of each row's log pi(y) along the unit direction, nan beyond a problem's rows."""
        unit_G = self.direction_G / self.direction_norm
        return self._table([[gradient_G @ unit_G for gradient_G in rows] for rows in self.row_gradient_G])

    @property
    def row_norm_PR(self) -> Tensor:
        return self._table([[gradient_G.norm() for gradient_G in rows] for rows in self.row_gradient_G])

    def _table(self, values: list[list[Tensor]]) -> Tensor:
        table_PR = torch.full((len(values), max(map(len, values), default=0)), torch.nan, dtype=torch.float64)
        for index, row in enumerate(values):
            table_PR[index, : len(row)] = torch.tensor(row, dtype=torch.float64)
        return table_PR


def expect(model: nn.Module, trusted: Sequence[Problem], candidates: Sequence[Problem]) -> Expected:
    """Return what plain autograd gives, one row at a time."""
    grads = problem_gradients_float64(model, [*trusted, *candidates], TEMPERATURE)
    rows = [[[replace(row, coefficient=torch.ones_like(row.coefficient))] for row in problem] for problem in candidates]
    flat = iter(problem_gradients_float64(model, [row for problem in rows for row in problem], TEMPERATURE))
    return Expected(
        gradient_PG=torch.stack(grads[len(trusted) :]),
        direction_G=torch.stack(grads[: len(trusted)]).sum(0),
        row_gradient_G=[[next(flat) for _ in problem] for problem in rows],
    )


def errors(scores: ProblemScores, expected: Expected, rows: Tensor | None = None) -> dict[str, float]:
    """Return the largest error of each quantity that `scores` has, as a share of the gradient it belongs to.

    A dot product near zero has no relative error of its own. `rows` marks those whose derivative must be given
    (problems, responses); default: all that there are.
    """
    tiny = torch.finfo(torch.float64).tiny
    norm_P = expected.norm_P.clamp(min=tiny)
    found = {
        "dot": ((scores.dot_P - expected.dot_P).abs() / norm_P).max().item(),
        "direction": abs(scores.direction_norm / expected.direction_norm - 1.0),
    }
    if scores.norm_P is not None:
        found["norm"] = ((scores.norm_P - expected.norm_P).abs() / norm_P).max().item()
        found["cosine"] = (scores.cosine_P - expected.cosine_P).abs().max().item()
    if scores.response_derivative_PR is not None:
        rows = ~expected.derivative_PR.isnan() if rows is None else rows
        assert torch.equal(~scores.response_derivative_PR.isnan(), rows), "derivatives of other rows than expected"
        error_PR = (scores.response_derivative_PR - expected.derivative_PR).abs()
        found["derivative"] = max((error_PR / expected.row_norm_PR.clamp(min=tiny))[rows].tolist(), default=0.0)
    return found


def has_even_coefficients(candidates: Sequence[Problem]) -> Tensor:
    """Return which rows there are whose tokens all have one coefficient, (problems, responses)."""
    even_PR = torch.zeros(len(candidates), max(map(len, candidates), default=0), dtype=torch.bool)
    for index, problem in enumerate(candidates):
        for place, row in enumerate(problem):
            even_PR[index, place] = len(row.coefficient.unique()) <= 1
    return even_PR


def assert_close(actual: Tensor | None, expected: Tensor | None, rtol: float) -> None:
    assert actual is not None and expected is not None
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0.0)
