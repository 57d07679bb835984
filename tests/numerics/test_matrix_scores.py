# SPDX-License-Identifier: Apache-2.0
"""The three forms of a matrix's scores say the same, in one piece and in blocks.

Shape legend: N positions, I input features, O output features, R rows, P problems.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.numerics.test_layer_rules import layouts
from verl_gradalign.probe import matrix_scores as forms
from verl_gradalign.probe.layout import Layout, padded_layout
from verl_gradalign.probe.matrix_scores import Segment, cheapest_form, gram, matrix_scores, per_problem, per_row

RTOL_FLOAT64 = 1e-12  # of the largest entry, other orders of the same sums; measured 1.2e-15
RTOL_BFLOAT16 = 1e-4  # on a CPU everything is computed in float32, from the same rounded numbers; measured 2.8e-6
FORMS = {"per_row": per_row, "per_problem": per_problem, "gram": gram}


def draw_factors(layout: Layout, num_out: int, num_in: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_positions = layout.shape[0] * layout.shape[1]
    shapes = ((num_positions, num_out), (num_positions, num_in), (num_out, num_in), (layout.num_rows,))
    delta_NO, input_NI, direction_OI, scale_R = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    return delta_NO, input_NI, direction_OI, scale_R


def formed(delta_NO: Tensor, input_NI: Tensor, direction_OI: Tensor, layout: Layout, scale_R: Tensor):
    """Return what the definition says, with every row's gradient formed."""
    grad_ROI = torch.stack([delta_NO[row].T @ input_NI[row] for row in layout.rows()])
    scaled_ROI = grad_ROI * scale_R.view(-1, 1, 1)
    norms = [scaled_ROI[rows].sum(dim=0).square().sum() for rows in layout.problems()]
    return (grad_ROI * direction_OI).sum(dim=(1, 2)), torch.stack(norms)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rtol: float) -> None:
    for found, wanted in zip(actual, expected, strict=True):
        assert found.shape == wanted.shape
        scale = max(wanted.abs().max().item(), 1.0)
        assert (found.double() - wanted).abs().max() <= rtol * scale


shapes = {"layout": layouts(), "num_out": st.integers(1, 6), "num_in": st.integers(1, 6), "seed": st.integers(0, 999)}


@settings(max_examples=40, deadline=None)
@given(**shapes, limit=st.sampled_from([1, 7, 40, 2**21]))
@pytest.mark.parametrize("form", list(FORMS))
def test_a_form_equals_the_definition_in_blocks_and_in_one_piece(
    form: str, layout: Layout, num_out: int, num_in: int, seed: int, limit: int
) -> None:
    factors = draw_factors(layout, num_out, num_in, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "cheapest_form", lambda segment: FORMS[form])
        patch.setitem(forms.MAX_GRADIENT_ELEMENTS, "cpu", limit)
        actual = matrix_scores(*factors[:3], layout, factors[3])
    assert_same(actual, formed(*factors[:3], layout, factors[3]), RTOL_FLOAT64)


@settings(max_examples=20, deadline=None)
@given(**shapes)
@pytest.mark.parametrize("form", list(FORMS))
def test_a_form_takes_bfloat16(form: str, layout: Layout, num_out: int, num_in: int, seed: int) -> None:
    delta_NO, input_NI, direction_OI, scale_R = draw_factors(layout, num_out, num_in, seed)
    delta_NO, input_NI = delta_NO.bfloat16(), input_NI.bfloat16()
    scale_R, direction_OI = scale_R.float(), direction_OI.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "cheapest_form", lambda segment: FORMS[form])
        actual = matrix_scores(delta_NO, input_NI, direction_OI, layout, scale_R)
    assert all(each.dtype == torch.float32 for each in actual)
    expected = formed(delta_NO.double(), input_NI.double(), direction_OI.double(), layout, scale_R.double())
    assert_same(actual, expected, RTOL_BFLOAT16)


def test_inputs_wider_than_what_the_layer_computes_in_are_accepted() -> None:
    layout = padded_layout(2, 3, (2,))
    delta_NO, input_NI, direction_OI, scale_R = (t.float() for t in draw_factors(layout, 4, 5, 0))
    actual = matrix_scores(delta_NO.bfloat16(), input_NI, direction_OI, layout, scale_R)
    expected = formed(delta_NO.bfloat16().double(), input_NI.double(), direction_OI.double(), layout, scale_R.double())
    assert_same(actual, expected, RTOL_BFLOAT16)


@pytest.mark.parametrize(
    ("num_rows", "width", "num_features", "expected"),
    [(4, 2, 512, "gram"), (8, 400, 64, "per_row"), (8, 8, 64, "per_problem")],
    ids=["short-problem", "long-rows", "short-rows"],
)
def test_the_cheapest_form_follows_the_lengths(num_rows: int, width: int, num_features: int, expected: str) -> None:
    layout = padded_layout(num_rows, width, (num_rows,))
    delta_NO, input_NI, direction_OI, scale_R = draw_factors(layout, num_features, num_features, 0)
    segment = Segment(delta_NO, input_NI, direction_OI, layout, scale_R)
    assert cheapest_form(segment) is FORMS[expected]
