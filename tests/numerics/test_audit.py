# SPDX-License-Identifier: Apache-2.0
"""Scores with a canary or a fidelity meter, and problems too large for a micro-batch among them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.numerics.cases import CANDIDATES, EXACT, TRUSTED, draw, expect, score
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.audit import MIN_RANKED, audited_scores, relative_error, spearman
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS, ghost
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemScores

CANARY_LIMIT = 1e-10  # float64; measured 4.5e-16
RTOL_FLOAT64 = 1e-10  # of the gradient's norm; measured 1.2e-15 (test_exactness.py)
APPROXIMATE = [name for name in ESTIMATORS if name not in EXACT]


def audit(
    model: nn.Module,
    estimator: str,
    audited: tuple[int, ...] = (),
    max_tokens: int = 16384,
    oversized: str = "backward",
    candidates: list = CANDIDATES,
    config: ProbeConfig | None = None,
) -> ProblemScores:
    rows, shares = tabulate([*TRUSTED, *candidates])
    engine = PlainEngine(model, rows, TEMPERATURE, max_tokens)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares[: len(TRUSTED)])
        method = ESTIMATORS[estimator](config)
        return audited_scores(engine, shares[len(TRUSTED) :], direction, method, audited, oversized)


def test_the_canary_of_an_exact_estimator_is_quiet(model: nn.Module) -> None:
    diagnostics = audit(model, "ghost", audited=(0, 3)).diagnostics
    assert diagnostics["canary/relative_error"] <= CANARY_LIMIT and "fidelity/spearman" not in diagnostics


def test_without_audited_problems_there_is_no_canary(model: nn.Module) -> None:
    assert audit(model, "ghost").diagnostics == {"oversized": 0.0}


def test_the_canary_sees_a_layer_that_was_missed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    all_points = ghost.tap_points
    monkeypatch.setattr(ghost, "tap_points", lambda root: [p for p in all_points(root) if "up_proj" not in p.name])
    assert audit(model, "ghost", audited=(0,)).diagnostics["canary/relative_error"] > 100 * CANARY_LIMIT


@pytest.mark.parametrize("estimator", APPROXIMATE)
def test_an_approximate_estimator_reports_its_rank_correlation(model: nn.Module, estimator: str) -> None:
    candidates = draw([[4, 5], [6, 3], [2, 9], [8, 1], [5, 5], [3, 7]], 60)
    audited = (5, 0, 3, 2)
    scores = audit(model, estimator, audited, candidates=candidates, config=ProbeConfig(rank=2))
    exact_P = expect(model, TRUSTED, candidates).dot_P
    expected = spearman(scores.dot_P[list(audited)], exact_P[list(audited)])
    assert scores.diagnostics["fidelity/spearman"] == pytest.approx(expected)
    assert "canary/relative_error" not in scores.diagnostics


def test_too_few_audited_problems_give_no_rank_correlation(model: nn.Module) -> None:
    few = tuple(range(MIN_RANKED - 1))
    assert "fidelity/spearman" not in audit(model, "low_rank", audited=few).diagnostics


@pytest.mark.parametrize("max_tokens", [12, 30, 60, 90])
@pytest.mark.parametrize("oversized", ["accumulate", "backward"])
def test_problems_too_large_are_scored_exactly_and_stand_where_they_were(
    model: nn.Module, max_tokens: int, oversized: str
) -> None:
    candidates = [problem for problem in CANDIDATES if max(row.num_tokens for row in problem) <= max_tokens]
    fits = [len(problem) * max(row.num_tokens for row in problem) <= max_tokens for problem in candidates]
    candidates = candidates[::-1]  # so that large ones stand first and in between
    fits = fits[::-1]
    audited = tuple(range(len(candidates)))
    rows, shares = tabulate([*TRUSTED, *candidates])
    direction_engine = PlainEngine(model, rows, TEMPERATURE)
    engine = PlainEngine(model, rows, TEMPERATURE, max_tokens)
    with leave_no_trace(model):
        direction = compute_direction(direction_engine, shares[: len(TRUSTED)])
        scores = audited_scores(engine, shares[len(TRUSTED) :], direction, ESTIMATORS["ghost"](), audited, oversized)
    expected = expect(model, TRUSTED, candidates)
    assert scores.uid == tuple(share.uid for share in shares[len(TRUSTED) :])
    assert scores.norm_P is not None and scores.response_derivative_PR is not None
    assert ((scores.dot_P - expected.dot_P).abs() <= RTOL_FLOAT64 * expected.norm_P).all()
    assert ((scores.norm_P - expected.norm_P).abs() <= RTOL_FLOAT64 * expected.norm_P).all()
    assert scores.num_tokens_P.tolist() == [sum(row.num_tokens for row in problem) for problem in candidates]
    assert scores.diagnostics["oversized"] == fits.count(False)
    assert scores.diagnostics.get("canary/relative_error", 0.0) <= CANARY_LIMIT
    for index, fit in enumerate(fits):
        found_R = scores.response_derivative_PR[index]
        if fit or oversized == "accumulate":
            wanted_R = expected.derivative_PR[index][: len(candidates[index])]
            size_R = expected.row_norm_PR[index][: len(wanted_R)]
            assert ((found_R[: len(wanted_R)] - wanted_R).abs() <= RTOL_FLOAT64 * size_R).all()
        else:
            assert found_R.isnan().all()


@pytest.mark.parametrize("estimator", ["ghost", "finite_difference"])
def test_a_problem_too_large_ends_the_run_if_so_configured(model: nn.Module, estimator: str) -> None:
    with pytest.raises(ValueError, match=r"p6 takes 82 positions, more than the 50.*Remedy.*oversized=accumulate"):
        audit(model, estimator, max_tokens=50, oversized="stop")


def test_backward_knows_no_problem_too_large(model: nn.Module) -> None:
    scores = audit(model, "backward", max_tokens=50, oversized="stop")
    expected = expect(model, TRUSTED, CANDIDATES)
    assert ((scores.dot_P - expected.dot_P).abs() <= RTOL_FLOAT64 * expected.norm_P).all()
    assert scores.diagnostics["oversized"] == 0.0


def test_an_estimator_without_norms_has_none_for_problems_too_large_either(model: nn.Module) -> None:
    scores = audit(model, "finite_difference", max_tokens=50)
    assert scores.norm_P is None and scores.dot_P.isfinite().all() and scores.diagnostics["oversized"] == 1.0


def with_values(dots: list[float], norms: list[float] | None) -> ProblemScores:
    uids = tuple(str(index) for index in range(len(dots)))
    norm_P = None if norms is None else torch.tensor(norms, dtype=torch.float64)
    return ProblemScores(uids, torch.tensor(dots, dtype=torch.float64), norm_P, torch.ones(len(dots)), None, 1.0)


ALL_PLACES = torch.arange(2)


def test_an_error_is_a_share_of_the_references_norm() -> None:
    reference = with_values([1.0, 0.0], [2.0, 4.0])
    assert relative_error(with_values([1.1, 0.0], [2.0, 4.0]), reference, ALL_PLACES) == pytest.approx(0.05)
    assert relative_error(with_values([1.0, 0.0], [2.0, 5.0]), reference, ALL_PLACES) == pytest.approx(0.25)
    assert relative_error(with_values([1.0, -2.0], None), reference, ALL_PLACES) == pytest.approx(0.5)
    assert relative_error(reference, reference, ALL_PLACES) == 0.0


def test_a_score_that_is_not_a_number_is_an_infinite_error() -> None:
    reference = with_values([1.0, 0.0], [2.0, 4.0])
    assert relative_error(with_values([math.nan, 0.0], [2.0, 4.0]), reference, ALL_PLACES) == math.inf
    assert relative_error(with_values([1.0, 0.0], [math.nan, 4.0]), reference, ALL_PLACES) == math.inf


def test_a_problem_without_gradient_must_score_zero() -> None:
    reference = with_values([0.0, 0.0], [0.0, 4.0])
    assert relative_error(reference, reference, ALL_PLACES) == 0.0
    assert relative_error(with_values([1e-3, 0.0], [0.0, 4.0]), reference, ALL_PLACES) > 1e100


def test_a_gradient_that_cancels_has_no_relative_error_of_its_own() -> None:
    reference = with_values([0.0, 1.0, 1.0], [1e-8, 2.0, 4.0])
    rounded = with_values([1e-8, 1.0, 1.0], [2e-8, 2.0, 4.0])
    assert relative_error(rounded, reference, torch.arange(3)) <= 1e-8


def test_references_that_overflowed_are_left_out() -> None:
    reference = with_values([math.nan, 1.0], [math.inf, 4.0])
    assert relative_error(with_values([5.0, 1.0], [1.0, 4.0]), reference, ALL_PLACES) == 0.0
    assert relative_error(with_values([5.0, 1.4], [1.0, 4.0]), reference, ALL_PLACES) == pytest.approx(0.1)
    lost = replace(reference, norm_P=torch.full((2,), math.inf, dtype=torch.float64))
    assert relative_error(with_values([5.0, 1.4], [1.0, 4.0]), lost, ALL_PLACES) == 0.0


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=2, max_size=20, unique=True))
def test_rank_correlation_is_one_for_any_increasing_map_and_minus_one_reversed(values: list[float]) -> None:
    values_P = torch.tensor(values, dtype=torch.float64)
    assert spearman(values_P, rising(values_P)) == pytest.approx(1.0)
    assert spearman(values_P, -rising(values_P)) == pytest.approx(-1.0)


def rising(values_P: Tensor) -> Tensor:
    """Return an increasing function of the values: their ranks, cubed."""
    return values_P.argsort().argsort().double() ** 3


def test_rank_correlation_of_a_known_case() -> None:
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([2.0, 1.0, 4.0, 3.0, 5.0])
    assert spearman(first, second) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert math.isnan(spearman(first[:1], second[:1]))


def test_audited_scores_are_the_estimators_own(model: nn.Module) -> None:
    plain, audited = score("ghost", model, TRUSTED, CANDIDATES), audit(model, "ghost", audited=(1, 2))
    assert torch.equal(plain.dot_P, audited.dot_P) and plain.uid == audited.uid
