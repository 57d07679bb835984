# SPDX-License-Identifier: Apache-2.0
"""The direction of trusted sets, and halves of groups, against gradients formed one by one in float64.

Shape legend: G all trainable numbers, P problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, Problem, draw_problem, tabulate
from verl_gradalign.config import DirectionConfig, ProbeConfig
from verl_gradalign.probe.call import DirectionRequest, ScoringRequest, make_direction, measure
from verl_gradalign.probe.direction import Direction, compute_direction, no_direction
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace, trainable_parameters
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.trusted import (
    COMBINED,
    FLOOR,
    trusted_direction,
    with_adam_metric,
    with_candidates_metric,
)
from verl_gradalign.types import ProblemRows

RTOL_FLOAT64 = 1e-10  # measured 1e-14
FIRST = [draw_problem((5, 3, 4, 6), seed=1), draw_problem((2, 7, 3), seed=2)]
SECOND = [draw_problem((4, 4), seed=3, advantage_scale=50.0), draw_problem((3, 5, 2, 2), seed=4, advantage_scale=50.0)]
CANDIDATES = [draw_problem((6, 2, 3, 5, 4), seed=11), draw_problem((3, 3), seed=12), draw_problem((8, 1, 4), seed=13)]
DEAD = [draw_problem((3, 3), seed=5, advantage_scale=0.0)]


def halved(problem: Problem) -> tuple[Problem, Problem]:
    """The first half of a split problem's rows, and the rest."""
    num = (len(problem) + 1) // 2
    return problem[:num], problem[num:]


def split(shares: Sequence[ProblemRows]) -> list[ProblemRows]:
    counts = [(len(s.rows), (len(s.rows) + 1) // 2) for s in shares]
    return [
        replace(s, is_split=True, halves=(0,) * num + (1,) * (total - num))
        for s, (total, num) in zip(shares, counts, strict=True)
    ]


def gradients(model: nn.Module, problems: Sequence[Problem]) -> Tensor:
    return torch.stack(problem_gradients_float64(model, problems, TEMPERATURE))


def flat(direction: Direction) -> Tensor:
    return torch.cat([torch.as_tensor(s).flatten() for s in direction.shards])


def unit(vector_G: Tensor) -> Tensor:
    return vector_G / vector_G.norm()


def assert_close(actual: Tensor | float, expected: Tensor | float) -> None:
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    assert (actual - expected).norm() <= RTOL_FLOAT64 * expected.norm()


def make(model: nn.Module, sets: dict[str, tuple[float, list[Problem]]], config: DirectionConfig, previous=None):
    """Return (direction, reports) of trusted sets whose problems are split, as the worker makes them."""
    problems = [p for _, members in sets.values() for p in members]
    rows, shares = tabulate(problems)
    shares, start, trusted = split(shares), 0, {}
    for name, (_, members) in sets.items():
        trusted[name] = shares[start : start + len(members)]
        start += len(members)
    weights = {name: weight for name, (weight, _) in sets.items()}
    with leave_no_trace(model):
        return trusted_direction(PlainEngine(model, rows, TEMPERATURE), trusted, weights, config, previous)


def test_one_set_is_its_summed_gradient_from_two_halves(model: nn.Module) -> None:
    direction, reports = make(model, {"only": (3.0, FIRST)}, DirectionConfig())
    total_G = gradients(model, FIRST).sum(0)
    halves = [gradients(model, [halved(p)[which] for p in FIRST]).sum(0) for which in (0, 1)]
    assert_close(flat(direction), unit(total_G))
    assert_close(direction.norm, total_G.norm())
    cosine = unit(halves[0]) @ unit(halves[1])
    for name in ("only", COMBINED):
        assert reports[name].half_cosine == pytest.approx(cosine.item(), rel=1e-9)
        assert reports[name].norm == pytest.approx(total_G.norm().item(), rel=1e-12)
    assert reports["only"].cosine == pytest.approx(1.0)


def test_several_sets_count_by_weight_whatever_the_size_of_their_rewards(model: nn.Module) -> None:
    """The second set's rewards are of another kind: fifty times as large."""
    sets = {"first": (1.0, FIRST), "second": (0.5, SECOND)}
    direction, reports = make(model, sets, DirectionConfig())
    units = [unit(gradients(model, problems).sum(0)) for problems in (FIRST, SECOND)]
    combined_G = units[0] + 0.5 * units[1]
    assert_close(flat(direction), unit(combined_G))
    assert_close(direction.norm, combined_G.norm())
    for name, mine in zip(sets, units, strict=True):
        assert reports[name].cosine == pytest.approx((mine @ unit(combined_G)).item(), rel=1e-9)
    smaller = {"first": (1.0, FIRST), "second": (0.5, [scaled(p, 1 / 50) for p in SECOND])}
    assert_close(flat(make(model, smaller, DirectionConfig())[0]), flat(direction))


def scaled(problem: Problem, factor: float) -> Problem:
    return [replace(row, coefficient=row.coefficient * factor) for row in problem]


def test_a_set_without_a_gradient_is_left_out_and_none_at_all_is_no_direction(model: nn.Module) -> None:
    direction, reports = make(model, {"dead": (1.0, DEAD), "first": (1.0, FIRST)}, DirectionConfig())
    assert_close(flat(direction), unit(gradients(model, FIRST).sum(0)))
    assert set(reports) == {"first", COMBINED}
    direction, reports = make(model, {"dead": (1.0, DEAD), "empty": (1.0, [])}, DirectionConfig())
    assert direction.is_degenerate and not reports


def test_per_problem_units_are_averaged(model: nn.Module) -> None:
    config = DirectionConfig(aggregation="per_problem_unit")
    direction, _ = make(model, {"all": (1.0, [*FIRST, *SECOND, *DEAD])}, config)
    units = [unit(g) for g in gradients(model, [*FIRST, *SECOND])]
    mean_G = torch.stack(units).mean(0)
    assert_close(flat(direction), unit(mean_G))
    assert_close(direction.norm, mean_G.norm())


def test_the_moving_average_is_bias_corrected(model: nn.Module) -> None:
    ema, refreshes = 0.7, [FIRST, SECOND, CANDIDATES]
    config, direction, average_G = DirectionConfig(ema=ema), None, torch.zeros(())
    for count, problems in enumerate(refreshes, start=1):
        direction, _ = make(model, {"only": (1.0, problems)}, config, direction)
        average_G = ema * average_G + (1 - ema) * gradients(model, problems).sum(0)
        corrected_G = average_G / (1 - ema**count)
        assert direction.num_refreshes == count
        assert_close(flat(direction), unit(corrected_G))
        assert_close(direction.norm, corrected_G.norm())


def test_without_average_the_newest_counts_alone(model: nn.Module) -> None:
    first, _ = make(model, {"only": (1.0, FIRST)}, DirectionConfig())
    second, _ = make(model, {"only": (1.0, SECOND)}, DirectionConfig(), first)
    assert_close(flat(second), unit(gradients(model, SECOND).sum(0)))


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("per_response", [False, True])
def test_halves_are_told_apart_in_the_same_pass(model: nn.Module, estimator: str, per_response: bool) -> None:
    """Of exact estimators against autograd; of all, that they add up and that the rest is as without them."""
    rows, shares = tabulate([*FIRST, *CANDIDATES])
    method = ESTIMATORS[estimator](ProbeConfig(response_derivatives=per_response))
    with leave_no_trace(model):
        engine = PlainEngine(model, rows, TEMPERATURE)
        direction = compute_direction(engine, shares[: len(FIRST)])
        whole = method.score(engine, shares[len(FIRST) :], direction)
        mixed = [*split(shares[len(FIRST) : -1]), shares[-1]]
        scores = method.score(engine, mixed, direction)
    assert whole.half_dot_P2 is not None and scores.half_dot_P2 is not None
    assert whole.half_dot_P2.isnan().all() and scores.half_dot_P2[-1].isnan().all()
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if method.is_exact else {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(scores.half_dot_P2[:-1].sum(1), scores.dot_P[:-1], **tolerance)
    torch.testing.assert_close(scores.dot_P, whole.dot_P, **tolerance)
    if method.gives_norm:
        torch.testing.assert_close(scores.norm_P, whole.norm_P, rtol=1e-10, atol=0.0)
    if method.is_exact:
        v_G = unit(gradients(model, FIRST).sum(0))
        for index, problem in enumerate(CANDIDATES[:-1]):
            expected_2 = gradients(model, halved(problem)) @ v_G
            assert_close(scores.half_dot_P2[index], expected_2)


def test_the_candidates_metric_divides_by_their_root_mean_square(model: nn.Module) -> None:
    rows, shares = tabulate([*FIRST, *CANDIDATES])
    with leave_no_trace(model):
        engine = PlainEngine(model, rows, TEMPERATURE)
        plain = compute_direction(engine, shares[: len(FIRST)])
        seen = with_candidates_metric(plain, engine, shares[len(FIRST) :])
        assert with_candidates_metric(plain, engine, []) is plain
        none = no_direction(model)
        assert with_candidates_metric(none, engine, shares) is none
    rms_G = gradients(model, CANDIDATES).square().mean(0).sqrt()
    assert_close(flat(seen), unit(flat(plain) / (rms_G + FLOOR * rms_G.mean())))
    assert seen.norm == plain.norm


def test_adams_metric_is_without_effect_before_the_first_step(model: nn.Module) -> None:
    rows, shares = tabulate(FIRST)
    optimizer = torch.optim.AdamW([p for _, p in trainable_parameters(model)])
    with leave_no_trace(model):
        engine = PlainEngine(model, rows, TEMPERATURE)
        direction = compute_direction(engine, shares)
        assert with_adam_metric(direction, engine, optimizer) is direction


@pytest.mark.parametrize("metric", ["none", "candidates"])
def test_a_direction_made_in_a_call_of_its_own_scores_as_one_made_with_the_scores(
    model: nn.Module, metric: str
) -> None:
    rows, shares = tabulate([*FIRST, *CANDIDATES, *DEAD])
    trusted, candidates, dead = split(shares[:2]), tuple(shares[2:5]), tuple(shares[5:])
    weights, config = {"only": 1.0}, DirectionConfig(metric=metric, ema=0.5)
    budget = TokenBudget(16384, is_padded=True)
    scoring = ScoringRequest(
        "ghost", ProbeConfig(), config, budget, TEMPERATURE, metric_on=(0, 2), candidates=candidates
    )
    making = DirectionRequest(config, budget, TEMPERATURE, weights, {"only": tuple(trusted)})
    with leave_no_trace(model):
        engine = PlainEngine(model, rows, TEMPERATURE)
        before = compute_direction(engine, shares[2:3])
        together = replace(scoring, set_weights=weights, trusted=making.trusted)
        wanted, wanted_fresh = measure(engine, together, before, None)
        made, fresh = make_direction(engine, making, before)
        assert fresh is not None and wanted_fresh is not None
        scored, none = measure(engine, scoring, fresh, None)
        lost, nothing = make_direction(engine, replace(making, trusted={"only": dead}), before)
    assert_close(flat(fresh), flat(wanted_fresh))
    found = made.with_scores(scored)
    assert (none, found.is_fresh, found.reports) == (None, True, wanted.reports)
    assert found.cosine_previous == wanted.cosine_previous
    assert found.scores is not None and wanted.scores is not None
    assert_close(found.scores.dot_P, wanted.scores.dot_P)
    assert found.direction_s >= made.direction_s and found.scores_s == scored.scores_s
    # A degenerate direction is returned as none, so that the one before stays.
    assert (nothing, lost.is_fresh, lost.reports) == (None, False, {}) and math.isnan(lost.cosine_previous)
    assert lost.with_scores(None).scores is None
