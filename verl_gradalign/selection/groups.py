# SPDX-License-Identifier: Apache-2.0
"""Groups of finished rollouts: a problem, its trajectories, and what is known of them. Pure functions.

A trajectory's key is `{uid}_{session}_{index}`. A response is a session of the agent loop, whose reward is that of its
last output; where a session gave several trajectories, their derivatives and contributions are added up.

Shape legend: P problems, R responses.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from verl_gradalign.types import Measurements, ProblemScores

# Why a group failed.
FAILED = "failed"
"""A response could not be generated, or its grading raised: verl does not tell these apart."""
REWARD_NOT_FINITE = "reward_not_finite"
"""A response has a reward that is nan or infinite, or none at all."""
NON_FINITE = "non_finite"
"""An advantage, or what one is made of, is nan or infinite though the rewards are numbers."""


@dataclass(frozen=True)
class Problem:
    """A prompt that was sent to the rollout."""

    uid: str
    problem_id: int
    """Row in the train files (or in the trusted files)."""
    data_source: str
    trusted_set: str | None = None
    """Name of the trusted set it belongs to; None: a candidate."""
    forecast_mean: float | None = None
    """Score that was forecast when it was chosen; None: there was no forecast."""
    forecast_deviation: float | None = None
    """Standard deviation of that forecast."""
    is_uniform: bool = False
    """Whether it was drawn uniformly, whatever its forecast."""


@dataclass(frozen=True)
class Group:
    """A problem and its finished trajectories."""

    problem: Problem
    keys: tuple[str, ...]
    """The first half of the group first (`halved`); empty if nothing was generated."""
    num_tokens: int
    """Of all trajectories, prompts included."""
    rewards: tuple[float, ...]
    """One per response, in the keys' order; none of a failed group."""
    is_failed: bool
    """Nothing can be learnt from it, whatever the score: it is never live and never kept."""
    is_live: bool
    advantages: tuple[float, ...] = ()
    """One per key; nan where its tokens have different ones."""
    coefficients: tuple[float, ...] = ()
    """Factor of each key's log-probability in the problem's objective; nan where its tokens have different ones."""
    halves: tuple[int, ...] = ()
    """0 or 1: the half of the group that each key counts to when reliability is measured. Empty: not split."""
    num_response_tokens: int = 0
    """Of all trajectories, prompts excluded."""
    failure: str = FAILED
    """Why it failed, if it did."""

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


def halved(keys: Sequence[str], content: Mapping[str, Iterable[bytes | memoryview]]) -> list[tuple[int, str]]:
    """Return (half, key) of a group's keys, half 0 first.

    Sessions go to the halves in turn, in the order of a hash of what they hold, which `content` has in pieces: which
    response a session got depends on the order in which requests reached the rollout, and a repeated run must find the
    same halves.
    """
    outputs: dict[int, list[tuple[int, str]]] = defaultdict(list)
    hashes: dict[int, blake2b] = defaultdict(blake2b)
    for key in keys:
        session, output = natural_order(key)
        outputs[session].append((output, key))
        for piece in content[key]:
            hashes[session].update(piece)
    in_order = sorted(hashes, key=lambda session: (hashes[session].digest(), session))
    return [(half, key) for half in (0, 1) for session in in_order[half::2] for _, key in sorted(outputs[session])]


def measurements(
    groups: Sequence[Group], scores: ProblemScores | None, num_candidates: int, success_threshold: float
) -> Measurements:
    """Return what is known of the live `groups`; `scores` holds the same problems in the same order, or nothing."""
    sessions = [_sessions(g) for g in groups]
    width = max(map(len, sessions), default=0)

    def table(rows: Iterable[Sequence[float]], fill: float = torch.nan) -> Tensor:
        """Return rows of different lengths as one tensor; none at all is a table of nan."""
        values_PR = torch.full((len(groups), width), fill, dtype=torch.float64)
        for value_R, row in zip(values_PR, rows, strict=False):
            value_R[: len(row)] = torch.tensor(row, dtype=torch.float64)
        return values_PR

    def measured(name: str, *width: int) -> Tensor:
        values = getattr(scores, name, None)
        return torch.full((len(groups), *width), torch.nan, dtype=torch.float64) if values is None else values

    derivatives, contributions = [], []
    if scores is not None and scores.response_derivative_PR is not None:
        for place, (g, by_session) in enumerate(zip(groups, sessions, strict=True)):
            derivative_K = scores.response_derivative_PR[place, : len(g.keys)]
            if scores.contribution_PR is None:
                contribution_K = torch.tensor(g.coefficients, dtype=torch.float64) * derivative_K
            else:
                contribution_K = scores.contribution_PR[place, : len(g.keys)]
            derivatives.append([derivative_K[keys].sum().item() for keys in by_session])
            contributions.append([contribution_K[keys].sum().item() for keys in by_session])
    pairs = list(zip(groups, sessions, strict=True))
    return Measurements(
        problem_id_P=torch.tensor([g.problem.problem_id for g in groups], dtype=torch.int64),
        success_PR=table([[float(r > success_threshold) for r in g.rewards] for g in groups]),
        advantage_PR=table([[g.advantages[keys[-1]] for keys in s] if g.advantages else [] for g, s in pairs]),
        # A group that is not split counts to one half, which leaves the other without an estimate.
        half_PR=table([[g.halves[keys[0]] if g.halves else 0 for keys in s] for g, s in pairs], fill=-1).long(),
        num_candidates=num_candidates,
        dot_P=measured("dot_P"),
        norm_P=measured("norm_P"),
        derivative_PR=table(derivatives),
        contribution_PR=table(contributions),
        half_dot_P2=measured("half_dot_P2", 2),
        direction_norm=scores.direction_norm if scores else float("nan"),
    )


def _sessions(group: Group) -> list[list[int]]:
    """Return the positions of each session's keys, sessions in the keys' order."""
    by_session: dict[int, list[int]] = {}
    for position, key in enumerate(group.keys):
        by_session.setdefault(session_of(key), []).append(position)
    return list(by_session.values())
