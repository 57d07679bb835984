# SPDX-License-Identifier: Apache-2.0
"""What an update has measured of its rows, put together by group."""

import math

import pytest
import torch

from verl_gradalign.selection.groups import Group, Problem, measurements
from verl_gradalign.selection.scores import SCORES, ScoreOptions
from verl_gradalign.selection.update_scores import scores_of_update

FIRST = Group(
    problem=Problem("a", 3, "tasks"),
    keys=("a_0_0", "a_2_0", "a_1_0"),
    num_tokens=30,
    rewards=(1.0, 0.0, 0.0),
    is_failed=False,
    is_live=True,
    advantages=(2.0, -1.0, -1.0),
    coefficients=(-0.2, 0.1, 0.1),
    halves=(0, 0, 1),
)
SECOND = Group(Problem("b", 7, "tasks"), ("b_0_0",), 10, (1.0,), False, True, (1.0,), (-0.1,))
# The update's rows stand in an order of its own, a padding row among them.
KEYS = ["b_0_0", "a_1_0", "padding", "a_0_0", "a_2_0"]
CONTRIBUTION_R = torch.tensor([5.0, 0.5, 99.0, 2.0, 1.0], dtype=torch.float64)
DERIVATIVE_R = torch.tensor([0.7, -0.5, 99.0, -2.0, 1.0], dtype=torch.float64)


def scored(groups, keys=KEYS):
    return scores_of_update(groups, keys, CONTRIBUTION_R, DERIVATIVE_R, 4.0, {"update/sum_error": 0.0})


def test_a_groups_dot_is_the_sum_of_its_rows_whatever_their_order():
    scores = scored([FIRST, SECOND])
    assert scores.uid == ("a", "b") and scores.norm_P is None and scores.direction_norm == 4.0
    assert scores.dot_P.tolist() == [3.5, 5.0]
    assert scores.half_dot_P2[0].tolist() == [3.0, 0.5]
    assert scores.half_dot_P2[1].isnan().all(), "a group that is not split has no halves"
    assert scores.num_tokens_P.tolist() == [30, 10]


def test_measurements_take_the_contributions_that_the_update_made_not_coefficients_of_another_scale():
    m = measurements([FIRST, SECOND], scored([FIRST, SECOND]), 2, 0.0)
    assert m.contribution_PR[0].tolist() == [2.0, 1.0, 0.5]
    assert m.derivative_PR[0].tolist() == [-2.0, 1.0, -0.5]
    # sqrt(n / (n - 1) sum (x - mean)^2)
    mean = 3.5 / 3
    assert m.dot_error_P[0] == pytest.approx(math.sqrt(1.5 * sum((x - mean) ** 2 for x in (2.0, 1.0, 0.5))))
    rank = SCORES["correlation"].rank
    assert rank is not None
    # Advantages (2, -1, -1) with -d = (2, -1, 0.5), centred.
    expected = (2 * 1.5 + 1.5 - 0.0) / math.sqrt(6 * (1.5**2 + 1.5**2))
    assert rank(m, ScoreOptions())[0].item() == pytest.approx(expected)


def test_a_row_that_was_not_measured_makes_its_whole_group_unknown_and_no_other():
    scores = scored([FIRST, SECOND], keys=[key if key != "a_1_0" else "lost" for key in KEYS])
    assert scores.dot_P[0].isnan() and scores.dot_P[1] == 5.0


def test_no_group_gives_an_empty_table():
    scores = scored([])
    assert scores.dot_P.shape == (0,) and scores.half_dot_P2.shape == (0, 2)
