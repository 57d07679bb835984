# SPDX-License-Identifier: Apache-2.0
"""The problems between trainer and sampler: sent to the rollout, not yet taken for a selection."""

from collections.abc import Iterable, Iterator

from verl_gradalign.selection.groups import Problem


class InFlight:
    """Candidates and trusted problems by uid, in the order in which they were sent."""

    def __init__(self) -> None:
        self._problems: dict[str, Problem] = {}
        self.num_candidates = 0
        """Candidates that a selection is among. A step that is cut into several updates has one before each."""
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
