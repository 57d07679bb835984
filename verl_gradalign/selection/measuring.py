# SPDX-License-Identifier: Apache-2.0
"""The live candidates' groups, and what the actor measured of them, as `Measurements`. Pure functions.

A response is a session of the agent loop; where a session put out several trajectories, their derivatives and
contributions are added up.

Shape legend: P problems, R responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from verl_gradalign.integration.rollouts import Group, session_of
from verl_gradalign.types import Measurements, ProblemScores

__all__ = ["measurements"]


def measurements(
    groups: Sequence[Group], scores: ProblemScores | None, num_candidates: int, success_threshold: float
) -> Measurements:
    """Return what is known of the live `groups`; `scores` holds the same problems in the same order, or nothing."""
    sessions = [_sessions(g) for g in groups]
    width = max((len(s) for s in sessions), default=0)
    derivative_PR = _unknown(len(groups), width)
    contribution_PR = _unknown(len(groups), width)
    if scores is not None and scores.response_derivative_PR is not None:
        for index, (g, by_session) in enumerate(zip(groups, sessions, strict=True)):
            derivative_K = scores.response_derivative_PR[index, : len(g.keys)]
            coefficient_K = torch.tensor(g.coefficients, dtype=torch.float64)
            for place, keys in enumerate(by_session.values()):
                derivative_PR[index, place] = derivative_K[keys].sum()
                contribution_PR[index, place] = (coefficient_K[keys] * derivative_K[keys]).sum()
    # A group that is not split counts to one half, which leaves the other without an estimate.
    halves = [
        [g.halves[keys[0]] if g.halves else 0 for keys in s.values()] for g, s in zip(groups, sessions, strict=True)
    ]
    half_PR = _filled(halves, width, -1).long()
    return Measurements(
        problem_id_P=torch.tensor([g.problem.problem_id for g in groups], dtype=torch.int64),
        success_PR=_filled([[float(r > success_threshold) for r in g.rewards] for g in groups], width, torch.nan),
        advantage_PR=_filled(
            [
                [g.advantages[keys[-1]] for keys in by_session.values()] if g.advantages else []
                for g, by_session in zip(groups, sessions, strict=True)
            ],
            width,
            torch.nan,
        ),
        half_PR=half_PR,
        num_candidates=num_candidates,
        dot_P=_unknown(len(groups)) if scores is None else scores.dot_P,
        norm_P=_unknown(len(groups)) if scores is None or scores.norm_P is None else scores.norm_P,
        derivative_PR=derivative_PR,
        contribution_PR=contribution_PR,
        half_dot_P2=_half_dots(scores, len(groups)),
        direction_norm=float("nan") if scores is None else scores.direction_norm,
    )


def _half_dots(scores: ProblemScores | None, num_problems: int) -> Tensor:
    if scores is None or scores.half_dot_P2 is None:
        return _unknown(num_problems, 2)
    return scores.half_dot_P2


def _sessions(group: Group) -> dict[int, list[int]]:
    """Return the positions of each session's keys, sessions in the keys' order."""
    by_session: dict[int, list[int]] = {}
    for position, key in enumerate(group.keys):
        by_session.setdefault(session_of(key), []).append(position)
    return by_session


def _unknown(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.float64)


def _filled(rows: Sequence[Sequence[float]], width: int, fill: float) -> Tensor:
    """Return rows of different lengths as one float64 tensor."""
    values = torch.full((len(rows), width), fill, dtype=torch.float64)
    for index, row in enumerate(rows):
        if len(row):
            values[index, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return values
