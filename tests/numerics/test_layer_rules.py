# SPDX-License-Identifier: Apache-2.0
"""Each layer rule by itself against plain autograd, on padded and packed passes of several problems.

Shape legend: N positions, R rows, P problems, G the layer's trainable numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from verl_gradalign.probe.layer_rules import LAYER_RULES, rule_of
from verl_gradalign.probe.layout import Layout, packed_layout, padded_layout
from verl_gradalign.probe.tap_points import tap_points
from verl_gradalign.probe.taps import tapped

RTOL_FLOAT64 = 1e-12  # of the gradient's norm; measured 1.4e-15
RTOL_FLOAT32_NORM = 1e-5  # transformers' RMSNorm computes in float32 whatever it is given; measured 3.9e-7
RTOL_BFLOAT16 = 5e-2  # autograd's own sums are in bfloat16 here; measured 1.5e-2
NUM_IN, NUM_OUT, NUM_TOKENS = 5, 7, 11


def without(layer: nn.Module, frozen: str) -> nn.Module:
    layer.get_parameter(frozen).requires_grad_(False)
    return layer


class GemmasScaledWordEmbedding(nn.Embedding):
    def __init__(self, padding_idx: int | None, scale: float | Tensor) -> None:
        super().__init__(NUM_TOKENS, NUM_OUT, padding_idx)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(NUM_IN, NUM_OUT, bias=False),
    "linear-narrowing": lambda: nn.Linear(NUM_OUT, NUM_IN),
    "linear-bias": lambda: nn.Linear(NUM_IN, NUM_OUT),
    "linear-bias-only": lambda: without(nn.Linear(NUM_IN, NUM_OUT), "weight"),
    "linear-frozen-bias": lambda: without(nn.Linear(NUM_IN, NUM_OUT), "bias"),
    "linear-rank-one": lambda: nn.Linear(NUM_IN, 1, bias=False),
    "embedding": lambda: nn.Embedding(NUM_TOKENS, NUM_OUT),
    "embedding-padding": lambda: nn.Embedding(NUM_TOKENS, NUM_OUT, padding_idx=3),
    "embedding-scaled": lambda: GemmasScaledWordEmbedding(None, 4.0),
    "embedding-scaled-padding": lambda: GemmasScaledWordEmbedding(3, torch.tensor(0.125)),
    "rms-norm": lambda: nn.RMSNorm(NUM_IN, eps=1e-3),
    "rms-norm-default-epsilon": lambda: nn.RMSNorm(NUM_IN),
    "layer-norm": lambda: nn.LayerNorm(NUM_IN, eps=1e-3),
    "layer-norm-no-bias": lambda: nn.LayerNorm(NUM_IN, bias=False),
    "layer-norm-bias-only": lambda: without(nn.LayerNorm(NUM_IN), "weight"),
}
FLOAT32_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "qwen2-rms-norm": lambda: Qwen2RMSNorm(NUM_IN, eps=1e-3),
    "gemma-rms-norm": lambda: GemmaRMSNorm(NUM_IN, eps=1e-3),
    "cohere-layer-norm": lambda: CohereLayerNorm(NUM_IN, eps=1e-3),
}


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Padded, packed with or without a padding suffix; problems of one to three rows."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    if draw(st.booleans()):
        return padded_layout(sum(counts), draw(st.integers(1, 9)), counts)
    lengths = draw(st.lists(st.integers(1, 9), min_size=sum(counts), max_size=sum(counts)))
    return packed_layout(lengths, sum(lengths) + draw(st.integers(0, 4)), counts)


def make_input(layer: nn.Module, layout: Layout, num_heads: int, generator: torch.Generator) -> Tensor:
    """Return random token ids (lines, width), or features (lines, width[, heads], features)."""
    if isinstance(layer, nn.Embedding):
        return torch.randint(NUM_TOKENS, layout.shape, generator=generator)
    num_features = layer.in_features if isinstance(layer, nn.Linear) else NUM_IN
    heads = (num_heads,) if num_heads > 1 else ()
    return torch.randn(*layout.shape, *heads, num_features, generator=generator, dtype=torch.float64)


def check_rule(
    layer: nn.Module,
    layout: Layout,
    num_heads: int,
    seed: int,
    dtype: torch.dtype = torch.float64,
    input_scale: float = 1.0,
    num_parts: int = 0,
    heads_first: bool = False,
) -> float:
    """Return the largest error of row products and problem norms, as a share of the layer's gradient norms.

    The layer's output is weighted by random numbers, so that its output gradient is they. With `num_parts` each
    problem counts as so many rows at most: its first ones, and the rest. `heads_first`: the layer is given heads before
    positions.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    layer.to(dtype)
    value = make_input(layer, layout, num_heads, generator)
    value = (input_scale * value).to(dtype) if value.is_floating_point() else value
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in trained]
    parts = None
    if num_parts:
        parts = [in_parts(rows.stop - rows.start, num_parts) for rows in layout.problems()]
    counted = layout if parts is None else layout.merged(parts)
    scale_R = torch.randn(counted.num_rows, generator=generator, dtype=torch.float64).to(accumulation)

    def run() -> Tensor:
        return layer(value.transpose(1, 2)).transpose(1, 2) if heads_first else layer(value)

    output = run()
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)

    points = tap_points(layer)
    with tapped(layer, points, lambda placement: direction[placement.parameter].to(dtype)) as taps:
        tapped_output = run()
        taps.begin(layout, scale_R, parts)
        (tapped_output * weight).sum().backward()
        scores = taps.end()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained)

    product_N = (output * weight).flatten(0, 1).flatten(1).sum(dim=1)
    row_gradient_RG = torch.stack(
        [torch.cat([g.double().flatten() for g in gradient(product_N[row], trained)]) for row in counted.rows()]
    )
    derivative_R = row_gradient_RG @ torch.cat([v.to(dtype).double().flatten() for v in direction])
    problem_gradient_PG = torch.stack(
        [(scale_R[rows].double().unsqueeze(1) * row_gradient_RG[rows]).sum(dim=0) for rows in counted.problems()]
    )
    norm_P = problem_gradient_PG.norm(dim=1)
    derivative_error = (scores.derivative_R.double() - derivative_R).abs().max()
    norm_error = (scores.squared_norm_P.double() - norm_P.square()).abs().max()
    tiny = torch.finfo(torch.float32).tiny
    derivative_size = row_gradient_RG.norm(dim=1).max() * torch.cat([v.flatten() for v in direction]).norm()
    return max((derivative_error / (derivative_size + tiny)).item(), (norm_error / (norm_P.max() ** 2 + tiny)).item())


def in_parts(num_rows: int, num_parts: int) -> tuple[int, ...]:
    first = (num_rows + 1) // 2
    return (num_rows,) if num_parts == 1 or num_rows < 2 else (first, num_rows - first)


def gradient(product_S: Tensor, trained: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(product_S.sum(), trained, retain_graph=True))


@settings(max_examples=25, deadline=None)
@given(layout=layouts(), num_heads=st.integers(1, 3), num_parts=st.integers(0, 2), seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_rule_equals_autograd(name: str, layout: Layout, num_heads: int, num_parts: int, seed: int) -> None:
    layer = LAYERS[name]().double()
    assert check_rule(layer, layout, num_heads, seed, num_parts=num_parts) <= RTOL_FLOAT64


@settings(max_examples=30, deadline=None)
@given(layout=layouts(), num_heads=st.integers(2, 5), num_parts=st.integers(0, 2), seed=st.integers(0, 10_000))
def test_norms_that_run_over_heads_before_positions(layout: Layout, num_heads: int, num_parts: int, seed: int) -> None:
    """Also of as many heads as positions, whichever of the two orders it is."""
    for heads_first in (True, False):
        for heads in (num_heads, layout.shape[1]):
            layer = LAYERS["rms-norm"]().double()
            error = check_rule(layer, layout, heads, seed, num_parts=num_parts, heads_first=heads_first and heads > 1)
            assert error <= RTOL_FLOAT64


@settings(max_examples=10, deadline=None)
@given(layout=layouts(), num_heads=st.integers(1, 3), seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", list(FLOAT32_LAYERS))
def test_a_norm_of_transformers_is_found_by_its_name(name: str, layout: Layout, num_heads: int, seed: int) -> None:
    layer = FLOAT32_LAYERS[name]().double()
    assert type(layer) not in LAYER_RULES
    assert check_rule(layer, layout, num_heads, seed) <= RTOL_FLOAT32_NORM


@settings(max_examples=8, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "rms-norm-default-epsilon"])
def test_a_rule_takes_bfloat16(name: str, layout: Layout, seed: int) -> None:
    assert check_rule(LAYERS[name](), layout, 1, seed, torch.bfloat16) <= RTOL_BFLOAT16


def test_the_default_epsilon_is_that_of_the_dtype_computed_in() -> None:
    layer = LAYERS["rms-norm-default-epsilon"]()
    assert check_rule(layer, padded_layout(2, 3, (2,)), 1, 0, torch.bfloat16, input_scale=0.05) <= RTOL_BFLOAT16


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
def test_an_embedding_with_a_gradient_of_its_own_kind_is_refused(option: dict[str, object]) -> None:
    layer = nn.Embedding(NUM_TOKENS, NUM_OUT, **option)
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*backward"):
        check_rule(layer, padded_layout(2, 3, (2,)), 1, 0, torch.float32)


def test_a_subclass_is_covered_by_the_rule_of_its_base() -> None:
    class NamedLinear(nn.Linear):
        pass

    assert rule_of(NamedLinear(2, 2)) is LAYER_RULES[nn.Linear]


class ScaledEmbedding(nn.Embedding):
    """The output is not the weight's row, and no name says what it is."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 4.0


def test_a_subclass_with_a_forward_of_its_own_is_not_covered_by_the_rule_of_its_base() -> None:
    assert rule_of(ScaledEmbedding(NUM_TOKENS, NUM_OUT)) is None


def test_something_called_rms_norm_without_an_epsilon_has_no_rule() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    assert rule_of(OddRMSNorm()) is None
