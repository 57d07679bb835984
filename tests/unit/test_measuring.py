# SPDX-License-Identifier: Apache-2.0
"""Groups and the actor's reply, put together as what scores look at."""

import math

import torch

from verl_gradalign.config import ScoreOptions
from verl_gradalign.selection.groups import Group, Problem, measurements
from verl_gradalign.selection.scores import SCORES
from verl_gradalign.types import ProblemScores


def group(uid, rewards, outputs=1, advantages=None):
    order = sorted(range(len(rewards)), key=lambda k: (k % 2, k))
    keys = [f"{uid}_{k}_{o}" for k in order for o in range(outputs)]
    halves = tuple(k % 2 for k in order for _ in range(outputs))
    rewards = [rewards[k] for k in order]
    advantages = advantages or [r - sum(rewards) / len(rewards) for r in rewards for _ in range(outputs)]
    coefficients = tuple(-a / len(keys) for a in advantages)
    return Group(
        Problem(uid, len(uid), "x"),
        tuple(keys),
        1,
        tuple(rewards),
        False,
        True,
        tuple(advantages),
        coefficients,
        halves,
    )


def scores_of(groups, derivative_PR):
    dots = [
        sum(c * d for c, d in zip(g.coefficients, row, strict=False))
        for g, row in zip(groups, derivative_PR, strict=True)
    ]
    return ProblemScores(
        uid=tuple(g.problem.uid for g in groups),
        dot_P=torch.tensor(dots, dtype=torch.float64),
        norm_P=torch.ones(len(groups), dtype=torch.float64),
        num_tokens_P=torch.ones(len(groups), dtype=torch.int64),
        response_derivative_PR=torch.tensor(derivative_PR, dtype=torch.float64),
        direction_norm=2.0,
    )


def test_responses_keep_their_place_and_their_half():
    groups = [group("a", [1.0, 0.0, 1.0]), group("bb", [0.0, 1.0])]
    derivative = [[0.1, 0.2, 0.3], [0.4, 0.5, math.nan]]
    m = measurements(groups, scores_of(groups, derivative), num_candidates=5, success_threshold=0.5)
    assert m.problem_id_P.tolist() == [1, 2] and m.num_candidates == 5 and m.direction_norm == 2.0
    assert m.half_PR.tolist() == [[0, 0, 1], [0, 1, -1]]  # sessions 0, 2, 1
    assert m.success_PR[0].tolist() == [1.0, 1.0, 0.0] and m.success_rate_P.tolist() == [2 / 3, 0.5]
    torch.testing.assert_close(m.derivative_PR, torch.tensor(derivative, dtype=torch.float64), equal_nan=True)
    torch.testing.assert_close(m.contribution_PR.nansum(1), m.dot_P)
    assert m.half_dot_P2.isnan().all()


def test_outputs_of_one_session_count_as_one_response():
    g = group("a", [1.0, 0.0], outputs=2)
    m = measurements([g], scores_of([g], [[0.1, 0.2, -0.3, -0.5]]), 1, 0.0)
    torch.testing.assert_close(m.derivative_PR, torch.tensor([[0.3, -0.8]], dtype=torch.float64))
    torch.testing.assert_close(m.contribution_PR.sum(1), m.dot_P)
    assert m.advantage_PR.tolist() == [[0.5, -0.5]] and m.success_PR.tolist() == [[1.0, 0.0]]
    assert SCORES["correlation"].rank(m, ScoreOptions()).item() == -1.0


def test_without_a_reply_only_rewards_are_known():
    groups = [group("a", [1.0, 0.0, 0.0, 0.0])]
    m = measurements(groups, None, 1, 0.0)
    assert m.dot_P.isnan().all() and m.norm_P.isnan().all() and math.isnan(m.direction_norm)
    assert SCORES["accuracy_greedy"].rank(m, ScoreOptions()).item() == 0.25
    assert measurements([], None, 0, 0.0).success_rate_P.shape == (0,)
