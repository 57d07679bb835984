# SPDX-License-Identifier: Apache-2.0
"""Which trusted problems a step rolls out, and which of them are set aside to be watched. No state, no rollouts.

turns = TrustedTurns(config, {"trusted": table.problem_ids})
turns.due(step, newest=None)
turns.audit["trusted"]
"""

import random
from collections.abc import Mapping, Sequence

from verl_gradalign.config import GradAlignConfig


class TrustedTurns:
    """A seeded walk over every trusted set: each turn of refresh_interval steps visits each problem exactly once.

    With `rolling` a step visits its share, in an order that is another one in every turn; without, all are visited in
    one step.

    Args:
        config: the `gradalign` block.
        problem_ids: the problems of each trusted set, by its name.
    """

    def __init__(self, config: GradAlignConfig, problem_ids: Mapping[str, Sequence[int]]) -> None:
        assert config.direction.refresh_interval is not None
        self._interval, self._is_rolling = config.direction.refresh_interval, bool(config.direction.rolling)
        self._seed = config.seed
        self._problem_ids = {name: [int(problem_id) for problem_id in ids] for name, ids in problem_ids.items()}
        share = config.direction.audit if config.direction.train_on_trusted else 0.0
        self.audit = {name: self._audited(name, share) for name in self._problem_ids}
        """By set: the problems that enter neither v nor training, though they are rolled out."""

    def _audited(self, name: str, share: float) -> frozenset[int]:
        ids = self._problem_ids[name]
        # One at least, where another is left for v.
        num = max(round(share * len(ids)), 1) if share > 0 and len(ids) > 1 else 0
        return frozenset(random.Random(f"{self._seed} audit {name}").sample(ids, min(num, len(ids) - 1)))

    def due(self, step: int, newest: int | None) -> dict[str, list[int]]:
        """Return the problems of each set that `step` (from 1 on) rolls out; sets without any are left out.

        `newest`: the step of the latest responses that are kept, None if there are none.
        """
        if self._is_rolling:
            due = {name: self._share(name, *divmod(step - 1, self._interval)) for name in self._problem_ids}
        else:
            is_due = newest is None or step - newest >= self._interval
            due = {name: list(ids) for name, ids in self._problem_ids.items() if is_due}
        return {name: ids for name, ids in due.items() if ids}

    def _share(self, name: str, turn: int, place: int) -> list[int]:
        """Return what the step at `place` of a turn visits: all shares of a turn are as large, to one problem."""
        ids = self._problem_ids[name]
        order = random.Random(f"{self._seed} turn {turn} {name}").sample(ids, len(ids))
        return order[len(ids) * place // self._interval : len(ids) * (place + 1) // self._interval]
