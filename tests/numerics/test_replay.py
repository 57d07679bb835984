# SPDX-License-Identifier: Apache-2.0
"""Importance ratios of responses of an earlier policy, truncated, and which responses are left out.

Shape legend: R responses, T response tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verl_gradalign.probe.replay import MAX_RATIO, ReplayTally, effective_shares, importance_ratios

CPU = torch.device("cpu")


def table(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return values (rows, longest), nan beyond a row's end, and the mask."""
    width = max(map(len, rows))
    values_RT = torch.tensor([row + [math.nan] * (width - len(row)) for row in rows], dtype=torch.float64)
    return values_RT, values_RT.isfinite().long()


def of_ratios(rows: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs now, those stored, and the mask, for these ratios."""
    ratio_RT, mask_RT = table(rows)
    stored_RT = torch.linspace(-9.0, -0.5, ratio_RT.numel(), dtype=torch.float64).view_as(ratio_RT)
    return stored_RT + ratio_RT.log(), stored_RT, mask_RT


@settings(max_examples=50)
@given(st.lists(st.lists(st.floats(0.01, 50.0), min_size=1, max_size=6), min_size=1, max_size=5))
def test_weights_are_truncated_ratios_and_zero_for_a_response_of_low_effective_sample(rows: list[list[float]]) -> None:
    now_RT, stored_RT, mask_RT = of_ratios(rows)
    weight_RT = ReplayTally().weigh(now_RT, stored_RT, mask_RT)
    for weight_T, row in zip(weight_RT, rows, strict=True):
        effective = sum(row) ** 2 / (len(row) * sum(w * w for w in row))
        if abs(effective - 0.5) > 1e-9:
            wanted = [min(w, 2.0) if effective > 0.5 else 0.0 for w in row]
            assert weight_T[: len(row)].tolist() == pytest.approx(wanted, rel=1e-12)
        assert not weight_T[len(row) :].any()


def test_tokens_that_do_not_count_are_no_part_of_a_response() -> None:
    now_RT, stored_RT, _ = of_ratios([[1.0, 40.0, 1.0, 1.0]])
    mask_RT = torch.tensor([[1, 0, 1, 1]])
    assert ReplayTally().weigh(now_RT, stored_RT, torch.ones(1, 4)).tolist() == [[0.0] * 4]
    assert ReplayTally().weigh(now_RT, stored_RT, mask_RT).tolist() == [pytest.approx([1.0, 0.0, 1.0, 1.0])]


def test_with_the_same_policy_every_weight_is_one() -> None:
    log_prob_RT = -torch.rand(5, 7)
    assert torch.equal(ReplayTally().weigh(log_prob_RT, log_prob_RT.clone(), torch.ones(5, 7)), torch.ones(5, 7))


def test_no_difference_of_log_probs_overflows() -> None:
    now_RT = torch.tensor([[0.0, 0.0], [-1e30, 0.0], [0.0, -1e30]])
    mask_RT = torch.ones(3, 2)
    ratio_RT = importance_ratios(now_RT, now_RT.flip(0) - 1e30, mask_RT)
    assert ratio_RT.isfinite().all() and effective_shares(ratio_RT, mask_RT).isfinite().all()
    assert (ReplayTally().weigh(now_RT, now_RT.flip(0) - 1e30, mask_RT) <= MAX_RATIO).all()


def test_weights_have_no_gradient() -> None:
    now_RT, stored_RT, mask_RT = of_ratios([[1.0, 1.5]])
    assert not ReplayTally().weigh(now_RT.requires_grad_(), stored_RT, mask_RT).requires_grad


def test_a_log_prob_that_is_not_finite_reaches_the_weights() -> None:
    stored_RT = torch.tensor([[-1.0, math.nan]])
    assert ReplayTally().weigh(torch.zeros(1, 2), stored_RT, torch.ones(1, 2)).isnan().any()


def test_shares_are_of_the_responses_of_all_passes_and_of_no_empty_one() -> None:
    tally = ReplayTally()
    assert tally.shares(None, CPU) == {}
    now_RT, stored_RT, mask_RT = of_ratios([[1.0, 1.0, 3.0], [0.5, 1.5]])
    tally.weigh(now_RT, stored_RT, mask_RT)
    now_RT, stored_RT, mask_RT = of_ratios([[1.0, 1.0, 1.0, 50.0]])
    tally.weigh(now_RT, stored_RT, mask_RT)
    tally.weigh(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))
    effective = 25 / 33, 4 / 5, 53**2 / (4 * 2503)
    assert tally.shares(None, CPU) == {
        "direction/dropped": pytest.approx(1 / 3),
        "direction/effective_sample": pytest.approx(sum(effective) / 3),
        "direction/ratio": pytest.approx((4.0 + 2.0 + 5.0) / 9),
    }
