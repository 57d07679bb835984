# SPDX-License-Identifier: Apache-2.0
"""Which rollouts of the trusted problems are kept, which of them a step's direction is made from, and how many succeed.

It knows groups and keys; where their rows lie is another's (`integration/trusted_store.py`).

    fallen_out = kept.add(Kept(group, lengths, step) for group in groups)
    part = kept.draw(step, num_rows=16)
"""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from verl_gradalign.selection.groups import Group, Problem


@dataclass(frozen=True)
class Kept:
    """One rollout of a trusted problem."""

    group: Group
    """Without keys if no rows are kept of it: it is dead, or not for v. Its rewards are known all the same."""
    lengths: tuple[int, ...]
    """Tokens of each key's row, prompt included."""
    step: int
    """In which it was finished."""

    @property
    def set_name(self) -> str:
        return str(self.group.problem.trusted_set)


class KeptGroups:
    """The last rollouts of every trusted problem.

    Args:
        replay: how many of a problem are kept.
        seed: of the draws.
    """

    def __init__(self, replay: int, seed: int) -> None:
        self._replay, self._seed = replay, seed
        self._of_problem: dict[tuple[str, int], list[Kept]] = {}

    def __iter__(self) -> Iterator[Kept]:
        """Yield all in an order that does not depend on when they arrived: by set, problem and step."""
        return (kept for place in sorted(self._of_problem) for kept in self._of_problem[place])

    @property
    def newest(self) -> int | None:
        """The latest step of which a rollout is kept."""
        return max((kept.step for kept in self), default=None)

    def add(self, fresh: Iterable[Kept]) -> list[str]:
        """Keep further rollouts; return the keys of those that are too old now."""
        fallen_out: list[str] = []
        for kept in fresh:
            of_problem = self._of_problem.setdefault((kept.set_name, kept.group.problem.problem_id), [])
            of_problem.append(kept)
            of_problem.sort(key=lambda each: each.step)
            fallen_out += [key for old in of_problem[: -self._replay] for key in old.group.keys]
            del of_problem[: -self._replay]
        return fallen_out

    def draw(self, step: int, num_rows: float) -> dict[str, list[Kept]]:
        """Return rollouts at random, whole ones, until they have so many rows; at least one, if any has rows.

        Each set gives in proportion to the rows that are kept of it, and at least one rollout. How old they are does
        not matter. Sets without any are left out.
        """
        by_set: dict[str, list[Kept]] = {}
        for kept in self:
            if kept.group.keys:
                by_set.setdefault(kept.set_name, []).append(kept)
        sizes = {name: sum(len(kept.group.keys) for kept in members) for name, members in by_set.items()}
        part: dict[str, list[Kept]] = {}
        for name, members in by_set.items():
            wanted, found = num_rows * sizes[name] / sum(sizes.values()), 0
            for kept in random.Random(f"{self._seed} {step} part {name}").sample(members, len(members)):
                part.setdefault(name, []).append(kept)
                found += len(kept.group.keys)
                if found >= wanted:
                    break
        return part

    def accuracy(self, problems: Mapping[str, frozenset[int]], are_left_out: bool, threshold: float) -> float | None:
        """Return the mean success rate, at their latest rollouts, of these problems, or of all but these.

        None if there are none. `problems` are by set.
        """
        rates = [
            members[-1].group.success_rate(threshold)
            for (name, problem_id), members in self._of_problem.items()
            if (problem_id in problems.get(name, ())) != are_left_out
        ]
        return sum(rates) / len(rates) if rates else None

    def state(self) -> list[dict[str, Any]]:
        """Return all that is kept, but for the rows."""
        return [asdict(kept) for kept in self]

    def restore(self, state: Iterable[Mapping[str, Any]]) -> None:
        """Keep what a state holds, in the place of what is kept."""
        self._of_problem = {}
        self.add(Kept(_group(each["group"]), tuple(each["lengths"]), each["step"]) for each in state)


def _group(values: Mapping[str, Any]) -> Group:
    """Return the group of `dataclasses.asdict`, whose tuples may have become lists."""
    parts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return Group(**parts | {"problem": Problem(**values["problem"])})
