# SPDX-License-Identifier: Apache-2.0
"""What the estimators that leave something out are exact for: low_rank's truncated direction, output_layer's layer.

Shape legend: O output features, I input features, K the rank, G trainable numbers.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.numerics.cases import ALL_KINDS, CANDIDATES, TRUSTED, expect, has_even_coefficients, score
from tests.numerics.models import WITHOUT_TRAINED_HEAD, make_model, train_only
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.cut_direction import cut
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators.low_rank import POWER_ITERATIONS, LowRankEstimator
from verl_gradalign.probe.estimators.output_layer import OutputLayerEstimator
from verl_gradalign.probe.gradient import leave_no_trace, trainable_parameters
from verl_gradalign.probe.plain_engine import PlainEngine

RTOL_FLOAT64 = 1e-10  # of the gradient's norm; measured 7e-16
RTOL_TRUNCATION = 0.02  # randomised decomposition against the full one, of the energy kept; measured 4.1e-4
RANKS = (1, 2, 4, 8, 16)
EVEN_PR = has_even_coefficients(ALL_KINDS)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["qwen2-tied", "neox", "lora"])
def test_the_error_is_within_what_the_energy_left_out_allows(name: str, rank: int) -> None:
    model = make_model(name)
    expected = expect(model, TRUSTED, CANDIDATES)
    scores = score("low_rank", model, TRUSTED, CANDIDATES, config=ProbeConfig(rank=rank))
    kept = scores.diagnostics["energy_kept"]
    assert 0.0 < kept <= 1.0 + RTOL_FLOAT64
    # |dot - dot_r| <= |g| |V - V_r|, and |V| = 1. A randomised decomposition is not quite orthogonal to what it leaves.
    left_out = math.sqrt(max(1.0 - kept, 0.0))
    bound_P = expected.norm_P * (left_out * (1.0 + RTOL_TRUNCATION) + RTOL_FLOAT64)
    assert ((scores.dot_P - expected.dot_P).abs() <= bound_P).all()


def test_more_ranks_keep_more_and_all_ranks_keep_everything(model: nn.Module) -> None:
    kept = [
        score("low_rank", model, TRUSTED, CANDIDATES[:1], config=ProbeConfig(rank=rank)).diagnostics["energy_kept"]
        for rank in RANKS
    ]
    assert kept == sorted(kept)
    assert kept[0] < 0.9 and kept[-1] == pytest.approx(1.0, abs=RTOL_FLOAT64)


def test_low_rank_scores_are_those_along_the_truncated_direction() -> None:
    model = make_model("qwen2-untied")
    scores = score("low_rank", model, TRUSTED, CANDIDATES, config=ProbeConfig(rank=2))
    expected = expect(model, TRUSTED, CANDIDATES)
    cut_G, start = expected.direction_G.clone() / expected.direction_norm, 0
    for _, parameter in trainable_parameters(model):
        stop = start + parameter.numel()
        if parameter.dim() == 2:
            left_right = cut(cut_G[start:stop].view_as(parameter), 2, POWER_ITERATIONS)
            left_OK, right_IK = left_right.split(list(parameter.shape))
            cut_G[start:stop] = (left_OK @ right_IK.T).flatten()
        start = stop
    assert ((scores.dot_P - expected.gradient_PG @ cut_G).abs() <= RTOL_FLOAT64 * expected.norm_P).all()
    assert scores.diagnostics["energy_kept"] == pytest.approx(cut_G.square().sum().item(), rel=RTOL_FLOAT64)


@settings(max_examples=30, deadline=None)
@given(num_out=st.integers(1, 40), num_in=st.integers(1, 40), rank=st.integers(1, 50), seed=st.integers(0, 999))
def test_a_truncation_is_the_best_one_and_the_same_each_time(num_out: int, num_in: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix_OI = torch.randn(num_out, num_in, generator=generator, dtype=torch.float64)
    state = torch.get_rng_state()
    part = cut(matrix_OI, rank, POWER_ITERATIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(part, cut(matrix_OI, rank, POWER_ITERATIONS))
    rank = min(rank, num_out, num_in)
    assert part.shape == (num_out + num_in, rank)
    kept = part[num_out:].square().sum().item()
    best = torch.linalg.svdvals(matrix_OI)[:rank].square().sum().item()
    assert best * (1.0 - RTOL_TRUNCATION) <= kept <= best * (1.0 + RTOL_FLOAT64)
    left_OK, right_IK = part.split([num_out, num_in])
    assert (left_OK @ right_IK.T).square().sum().item() == pytest.approx(kept, rel=RTOL_FLOAT64)


def with_a_head_of_its_own(model: nn.Module) -> nn.Module:
    """Return a copy whose output layer shares its weight with nothing and is all that is trained."""
    copied = copy.deepcopy(model)
    head = copied.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return train_only(copied, lambda name: name in ("lm_head.weight", "embed_out.weight"))


def direction_of_head(model: nn.Module) -> Tensor:
    """Return the unit direction's part that belongs to the output layer's weight, flattened."""
    rows, shares = tabulate(TRUSTED)
    with leave_no_trace(model):
        direction = compute_direction(PlainEngine(model, rows, TEMPERATURE), shares)
    weight = model.get_output_embeddings().weight
    places = [index for index, (_, parameter) in enumerate(trainable_parameters(model)) if parameter is weight]
    return direction.shards[places[0]].flatten()


@pytest.mark.parametrize("name", ["qwen2-untied", "qwen2-tied", "padding-tied", "neox", "head-only"])
def test_output_layer_scores_are_those_of_the_weights_use_as_output_layer(name: str) -> None:
    model = make_model(name)
    unit_G = direction_of_head(model)
    expected = expect(with_a_head_of_its_own(model), TRUSTED, ALL_KINDS)
    scores = score("output_layer", model, TRUSTED, ALL_KINDS)
    assert scores.norm_P is not None and scores.response_derivative_PR is not None
    assert ((scores.dot_P - expected.gradient_PG @ unit_G).abs() <= RTOL_FLOAT64 * expected.norm_P).all()
    assert ((scores.norm_P - expected.norm_P).abs() <= RTOL_FLOAT64 * expected.norm_P).all()
    for index, rows in enumerate(expected.row_gradient_G):
        for place, gradient_G in enumerate(rows):
            found = scores.response_derivative_PR[index, place].item()
            assert not EVEN_PR[index, place] or abs(found - unit_G @ gradient_G) <= RTOL_FLOAT64 * gradient_G.norm()
            assert EVEN_PR[index, place] or math.isnan(found)


def test_output_layer_scores_are_the_same_without_response_derivatives(model: nn.Module) -> None:
    with_them = score("output_layer", model, TRUSTED, ALL_KINDS)
    without = score("output_layer", model, TRUSTED, ALL_KINDS, config=ProbeConfig(response_derivatives=False))
    assert without.response_derivative_PR is None and with_them.norm_P is not None and without.norm_P is not None
    assert ((without.dot_P - with_them.dot_P).abs() <= RTOL_FLOAT64 * with_them.norm_P).all()
    assert ((without.norm_P - with_them.norm_P).abs() <= RTOL_FLOAT64 * with_them.norm_P).all()


@pytest.mark.parametrize("name", WITHOUT_TRAINED_HEAD)
def test_a_model_whose_output_layer_is_frozen_is_refused(name: str) -> None:
    model = make_model(name)
    with pytest.raises(ValueError, match="(lm_head|embed_out) is frozen.*Remedy.*ghost"):
        OutputLayerEstimator().check(model)


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="Qwen2Model does not name an output layer.*ghost"):
        OutputLayerEstimator().check(make_model("qwen2-untied").model)
    with pytest.raises(ValueError, match="Linear does not name an output layer"):
        OutputLayerEstimator().check(nn.Linear(2, 2))


def test_an_output_layer_of_an_unknown_kind_is_refused() -> None:
    model = make_model("qwen2-untied")
    model.lm_head = nn.Conv1d(16, 261, 1)
    with pytest.raises(ValueError, match=r"lm_head \(Conv1d\) has no layer rule.*ghost"):
        OutputLayerEstimator().check(model)


def test_nothing_behind_the_output_layer_is_differentiated() -> None:
    model = make_model("qwen2-untied")
    reached = []
    model.model.norm.register_full_backward_hook(lambda *_: reached.append(True))
    score("output_layer", model, TRUSTED[:1], [])  # the direction's own pass reaches it
    reached.clear()
    rows, shares = tabulate([*TRUSTED, *CANDIDATES])
    engine = PlainEngine(model, rows, TEMPERATURE)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares[: len(TRUSTED)])
        reached.clear()
        OutputLayerEstimator().score(engine, shares[len(TRUSTED) :], direction)
    assert not reached


def test_low_rank_names_a_matrix_that_it_has_no_rule_for() -> None:
    class OddNorm(nn.RMSNorm):
        pass

    model = make_model("qwen2-untied")
    model.model.norm = OddNorm((16, 16))
    with pytest.raises(ValueError, match=r"model.norm \(OddNorm\) has a matrix but no low-rank rule.*ghost"):
        LowRankEstimator().check(model)
