# SPDX-License-Identifier: Apache-2.0
"""What a forecast is told of a step's candidates."""

import dataclasses
import math

import numpy as np
import torch

from tests.unit.tables import candidates_of
from tests.unit.test_scores import OPTIONS, make_pool
from verl_gradalign.selection.chooser import observations
from verl_gradalign.selection.reliability import score_errors
from verl_gradalign.selection.scores import SCORES


def table_of(m):
    """Eight candidates: the five live ones of `m`, two dead ones and a failed one, mixed."""
    is_live_P = np.array([1, 0, 1, 1, 0, 1, 0, 1], dtype=bool)
    is_failed_P = np.arange(8) == 6
    table = candidates_of(np.arange(10, 18), is_failed_P, is_live_P, np.full(8, np.nan))
    return dataclasses.replace(table, response_tokens_P=np.arange(8) * 10.0)


def test_live_groups_have_their_score_dead_ones_zero_and_failed_ones_nothing():
    m = make_pool(0, num_problems=5, min_responses=3).measurements()
    for name in ("dot", "cosine", "accuracy_greedy"):
        o = observations(table_of(m), m, SCORES[name], OPTIONS)
        live = [0, 2, 3, 5, 7]
        np.testing.assert_array_equal(o.value_P[live], SCORES[name].rank(m, OPTIONS).numpy())
        np.testing.assert_array_equal(o.error_P[live], score_errors(m, SCORES[name], OPTIONS).numpy())
        assert o.value_P[[1, 4]].tolist() == [0, 0] and np.isnan(o.error_P[[1, 4, 6]]).all()
        assert math.isnan(o.value_P[6])
        assert o.problem_id_P.tolist() == list(range(10, 18)) and o.response_tokens_P[3] == 30


def test_what_was_not_measured_or_is_not_finite_is_nothing():
    m = make_pool(0, num_problems=5, min_responses=3).measurements()
    bad = dataclasses.replace(m, dot_P=m.dot_P.masked_fill(torch.arange(5) == 1, math.inf))
    o = observations(table_of(m), bad, SCORES["dot"], OPTIONS)
    assert np.isnan([o.value_P[2], o.error_P[2]]).all() and np.isfinite(o.value_P[[0, 3, 5, 7]]).all()
    nothing = observations(table_of(m), None, SCORES["dot"], OPTIONS)
    assert np.isnan(nothing.value_P[[0, 2, 3, 5, 7, 6]]).all() and nothing.value_P[[1, 4]].tolist() == [0, 0]
    assert np.isnan(observations(table_of(m), m, SCORES["random"], OPTIONS).value_P[[0, 2, 3, 5, 7]]).all()
