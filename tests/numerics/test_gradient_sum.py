# SPDX-License-Identifier: Apache-2.0
"""The norm of a problem that is cut, estimated from projections: of what, how well, and how well it says so.

Shape legend: P problems, G all trainable numbers, K the rank, S seeds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.cases import TRUSTED, expect
from tests.numerics.families import float64_by_default
from tests.numerics.models import make_model, mixture_of_experts
from tests.numerics.problems import TEMPERATURE, tabulate
from tests.numerics.test_oversized import LARGE, SMALL, scored
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe import expert_rules
from verl_gradalign.probe.audit import audited_scores
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.direction_gather import DirectionGather
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.estimators.ghost import tapped_scores
from verl_gradalign.probe.gradient import leave_no_trace, trainable_parameters
from verl_gradalign.probe.gradient_sum import ProjectedSum
from verl_gradalign.probe.layer_rules import COVERED
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.projections import FACTORS, VECTOR_RULES, normal_sides
from verl_gradalign.probe.tap_points import tap_points
from verl_gradalign.types import ProblemScores

RTOL = 1e-10  # of the gradient's norm
NUM_CUT = 2
"""Problems of LARGE that a micro-batch of SMALL does not hold."""
RANK = 8
SKETCH = ProbeConfig(oversized="sketch", sketch_rank=RANK)
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: make_model(name) for name in ("qwen2-tied", "qwen2-untied", "neox", "lora")},
    "experts": mixture_of_experts,
}


def estimated(model: nn.Module, seed: int, rank: int = RANK) -> ProblemScores:
    """Return the scores of LARGE by projections of a seed."""
    rows, shares = tabulate(LARGE)
    engine = PlainEngine(model, rows, TEMPERATURE, SMALL)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares)
        gather = DirectionGather(model, direction, engine.device)
        total = ProjectedSum(rank, seed)
        return tapped_scores(engine, shares, direction.norm, tap_points(model), gather, False, gradient=total)


def projected_norms(model: nn.Module, gradient_PG: Tensor, seed: int) -> Tensor:
    """Return what is left of the norms of whole gradients, projected as `ProjectedSum` does, (problems,)."""
    parameters = trainable_parameters(model)
    # A tied weight is named by the use that the backward pass reaches first.
    names = {p.identity: p.name for point in tap_points(model) for p in point.placements}
    by_name = {p.name: names[p.identity] for point in tap_points(model) for p in point.placements}
    squared_P = gradient_PG.new_zeros(len(gradient_PG))
    for (name, parameter), part_PG in zip(
        parameters, gradient_PG.split([p.numel() for _, p in parameters], dim=1), strict=True
    ):
        part = part_PG.view(-1, *parameter.shape)
        if parameter.dim() > 1:
            sides = normal_sides(seed, by_name[name], parameter.shape, RANK, part.device)
            left_OK, right_IK = (side.double() for side in sides)
            part = left_OK.T @ part @ right_IK
        squared_P += part.flatten(1).square().sum(dim=1)
    return squared_P.sqrt()


@pytest.mark.parametrize("blocks", [2**26, 300])
@pytest.mark.parametrize("name", list(MODELS))
def test_norms_are_those_of_the_projected_gradients_and_products_stay_exact(
    name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl_gradalign.probe.sizes.CHUNK_ELEMENTS", blocks)
    with float64_by_default():  # routers compute in float32
        model = MODELS[name]()
        (scores, passes), expected = scored(model, "ghost", SMALL, SKETCH), expect(model, TRUSTED, LARGE)
    assert max(size for _, size in passes) <= SMALL
    assert ((scores.dot_P - expected.dot_P).abs() <= RTOL * expected.norm_P).all()
    assert scores.norm_P is not None
    is_cut_P = (scores.norm_P - expected.norm_P).abs() > RTOL * expected.norm_P
    assert is_cut_P.sum() == NUM_CUT
    norm_P = projected_norms(model, expected.gradient_PG, seed=0)
    assert ((scores.norm_P - norm_P).abs() <= RTOL * expected.norm_P)[is_cut_P].all()


def test_estimates_have_no_bias_and_the_error_that_they_report() -> None:
    """Over seeds: the mean of squared norms is the exact one, and their spread at most twice what is reported."""
    model, num_seeds = make_model("qwen2-untied"), 80
    squared_P = expect(model, TRUSTED, LARGE).norm_P.square()
    found = [estimated(model, seed) for seed in range(num_seeds)]
    ratio_SP = torch.stack([scores.norm_P.square() / squared_P for scores in found])  # type: ignore[union-attr]
    is_cut_P = ratio_SP.std(dim=0) > RTOL
    assert is_cut_P.sum() == NUM_CUT
    error_SP = (ratio_SP - 1)[:, is_cut_P]
    assert (error_SP.mean(dim=0).abs() <= 4 * error_SP.std(dim=0) / num_seeds**0.5).all()
    # Of a norm half the relative error of its square; a variance of the quarters is one to two of the whole.
    reported = torch.tensor([scores.diagnostics["oversized_norm_error"] for scores in found]).square().mean().sqrt()
    actual = error_SP.square().mean().sqrt().item() / 2
    assert actual <= 1.15 * reported <= 1.15 * 2**0.5 * 1.15 * actual, (actual, reported)


def test_a_higher_rank_is_closer() -> None:
    model = make_model("qwen2-untied")
    exact_P = expect(model, TRUSTED, LARGE).norm_P
    spread = [
        torch.stack([estimated(model, seed, rank).norm_P / exact_P for seed in range(20)]).std(dim=0).max()  # type: ignore[operator]
        for rank in (2, 16)
    ]
    assert spread[1] < spread[0] / 2


def test_every_rule_that_gives_gradients_has_projections() -> None:
    assert set(COVERED) == {*FACTORS, *VECTOR_RULES, expert_rules.experts}


def test_estimated_norms_are_not_audited() -> None:
    """The canary would take their error for one of the estimator's."""
    model = make_model("qwen2-tied")
    rows, shares = tabulate(LARGE)
    engine = PlainEngine(model, rows, TEMPERATURE, SMALL)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares)
        ghost = ESTIMATORS["ghost"](SKETCH)
        scores = audited_scores(engine, shares, direction, ghost, tuple(range(len(LARGE))), "sketch")
    assert scores.diagnostics["oversized"] == NUM_CUT
    assert scores.diagnostics["canary/relative_error"] <= RTOL
    assert 0 < scores.diagnostics["oversized_norm_error"] < 1


def test_no_error_is_reported_where_all_problems_fit() -> None:
    scores, _ = scored(make_model("qwen2-tied"), "ghost", 10_000, SKETCH)
    assert "oversized_norm_error" not in scores.diagnostics
