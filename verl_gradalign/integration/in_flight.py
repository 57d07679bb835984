# SPDX-License-Identifier: Apache-2.0
"""The problems between trainer and sampler: sent to the rollout, not yet taken for a selection."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from verl_gradalign.selection.groups import Problem
from verl_gradalign.types import Picks


class InFlight:
    """Candidates and trusted problems by uid, in the order in which they were sent."""

    def __init__(self) -> None:
        self._problems: dict[str, Problem] = {}
        self.num_candidates = 0
        """Candidates that a selection is among. A step that is cut into several updates has one before each."""
        self.takes_trusted_singly = False
        """Whether finished trusted groups are of use without the others in flight, as where responses are kept."""
        self.takes_trusted = True
        """Whether trusted groups are of use to the next selection; else they stay in flight."""
        self.waits_for_trusted = False
        """Whether candidates cannot be scored before the trusted problems in flight are finished."""

    def __len__(self) -> int:
        return len(self._problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems.values())

    def add(self, problems: Iterable[Problem]) -> None:
        """Note problems that are sent to the rollout."""
        self._problems.update({problem.uid: problem for problem in problems})

    def take(self, uids: Iterable[str]) -> list[Problem]:
        """Remove problems, and return them in the order in which they were sent, whatever order they finished in."""
        wanted = set(uids)
        return [self._problems.pop(uid) for uid in list(self._problems) if uid in wanted]

    def retain(self, uids: Iterable[str]) -> None:
        """Forget every problem but these."""
        self.take(set(self._problems) - set(uids))

    def is_trusted(self, uid: str) -> bool:
        """Return whether a problem in flight is a trusted one."""
        return uid in self._problems and self._problems[uid].trusted_set is not None

    def trusted(self) -> set[str]:
        """Return the uids of the trusted problems in flight."""
        return {uid for uid in self._problems if self.is_trusted(uid)}


def with_forecasts(problems: Sequence[Problem], picks: Picks) -> list[Problem]:
    """Return the problems, each with its own forecast, which travels with it: asynchronous groups finish steps later.

    Raises: ValueError if the picks are of other problems, or in another order.
    """
    if [problem.problem_id for problem in problems] != picks.problem_id_P.tolist():
        raise ValueError(f"{len(problems)} problems were sent, and the {len(picks.problem_id_P)} picks are of others")
    columns = picks.mean_P.tolist(), picks.deviation_P.tolist(), picks.is_uniform_P.tolist()
    return [
        replace(problem, forecast_mean=mean, forecast_deviation=deviation, is_uniform=is_uniform)
        for problem, mean, deviation, is_uniform in zip(problems, *columns, strict=True)
    ]


def picks_of(problems: Iterable[Problem]) -> Picks:
    """Return what was forecast of problems when each of them was chosen; trusted ones and others without are left out.

    Of a problem that is there twice, as a small pool's may be, the first one counts.
    """
    chosen: dict[int, Problem] = {}
    for problem in problems:
        if problem.forecast_mean is not None:
            chosen.setdefault(problem.problem_id, problem)
    return Picks(
        problem_id_P=np.array(list(chosen), dtype=np.int64),
        mean_P=np.array([problem.forecast_mean for problem in chosen.values()], dtype=np.float64),
        deviation_P=np.array([problem.forecast_deviation for problem in chosen.values()], dtype=np.float64),
        is_uniform_P=np.array([problem.is_uniform for problem in chosen.values()], dtype=bool),
    )
