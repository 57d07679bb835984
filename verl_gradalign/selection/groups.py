# SPDX-License-Identifier: Apache-2.0
"""Groups of finished rollouts: a problem, its trajectories, and what is known of them. Pure functions.

A trajectory's key is `{uid}_{session}_{index}`. A response is a session of the agent loop, whose reward is that of its
last output; where a session gave several trajectories, their derivatives and contributions are added up.

Shape legend: P problems, R responses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from verl_gradalign.types import Measurements, ProblemScores

__all__ = ["Group", "Problem", "halved", "keys_by_uid", "measurements", "natural_order", "session_of"]


@dataclass(frozen=True)
class Problem:
    """A prompt that was sent to the rollout."""

    uid: str
    problem_id: int
    """Row in the train files (or in the trusted files)."""
    data_source: str
    trusted_set: str | None = None
    """Name of the trusted set it belongs to; None: a candidate."""


@dataclass(frozen=True)
class Group:
    """A problem and its finished trajectories."""

    problem: Problem
    keys: tuple[str, ...]
    """The first half of the group first (`halved`); empty if nothing was generated."""
    num_tokens: int
    """Of all trajectories, prompts included."""
    rewards: tuple[float, ...]
    """One per response, in the keys' order."""
    is_failed: bool
    is_live: bool
    advantages: tuple[float, ...] = ()
    """One per key; nan where its tokens have different ones."""
    coefficients: tuple[float, ...] = ()
    """Factor of each key's log-probability in the problem's objective; nan where its tokens have different ones."""
    halves: tuple[int, ...] = ()
    """0 or 1: the half of the group that each key counts to when reliability is measured. Empty: not split."""
    num_response_tokens: int = 0
    """Of all trajectories, prompts excluded."""

    def success_rate(self, threshold: float) -> float:
        """Return the share of responses with a reward above `threshold`; NaN without responses."""
        if not self.rewards:
            return float("nan")
        return sum(reward > threshold for reward in self.rewards) / len(self.rewards)


def session_of(key: str) -> int:
    """Return the session number of a trajectory's key."""
    return int(key.rsplit("_", 2)[1])


def natural_order(key: str) -> tuple[int, int]:
    """Return what trajectory keys of a problem are sorted by: session, then output."""
    _, session, output = key.rsplit("_", 2)
    return int(session), int(output)


def keys_by_uid(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return trajectory keys by their problem's uid, in session and output order."""
    by_uid: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        by_uid[key.split("_", 1)[0]].append(key)
    for members in by_uid.values():
        members.sort(key=natural_order)
    return by_uid


def halved(keys: Sequence[str], content: Mapping[str, bytes]) -> list[tuple[int, str]]:
    """Return (half, key) of a group's keys, half 0 first.

    Sessions go to the halves in turn, in the order of a hash of what they hold: which response a session got depends
    on the order in which requests reached the rollout, and a repeated run must find the same halves.
    """
    sessions: dict[int, list[str]] = defaultdict(list)
    for key in keys:
        sessions[session_of(key)].append(key)
    digests = {s: blake2b(b"".join(content[key] for key in members)).digest() for s, members in sessions.items()}
    places = {session: place for place, session in enumerate(sorted(sessions, key=lambda s: (digests[s], s)))}

    def order(key: str) -> tuple[int, int, int]:
        session, output = natural_order(key)
        return places[session] % 2, places[session], output

    return [(order(key)[0], key) for key in sorted(keys, key=order)]


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
