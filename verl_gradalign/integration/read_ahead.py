# SPDX-License-Identifier: Apache-2.0
"""Groups that are read as they finish, while others are still generated: the selection then reads the last ones only.

verl's trainers allow it, the synchronous one too: its rollout does not return all at once. The agent loop puts each
trajectory into TransferQueue when it is done, and marks its prompt `finished` when all of a group's are
(verl.trainer.ppo.v1.agent_loop_tq); the replay buffer polls these marks and sleeps in between, which is when the
sampler calls `read`. There is no thread: whoever would wait for it has nothing else to do.

Not read ahead: groups whose rows lack something that the actor, a critic or a colocated reward model adds when the
rollout sleeps (`rollouts.needs_completion`), and groups whose advantages depend on others that are not finished.

    ahead.read(finished, tags, is_scored=True, seconds=0.5)
    groups = read_groups(..., ahead=ahead.take(uids, is_scored=True))
"""

import time
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig
from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.reading import ROWS_AT_ONCE, in_parts, is_of_each_group, read_groups
from verl_gradalign.integration.rollouts import needs_completion
from verl_gradalign.selection.groups import Group, Problem

READ_OF_TAGS = "seq_len", "response_len"


class ReadAhead:
    """What is known of finished groups that no selection has taken yet.

    Args:
        config: the `gradalign` block.
        verl_config: the whole verl configuration.
    """

    def __init__(self, config: GradAlignConfig, verl_config: DictConfig) -> None:
        self._config, self._verl_config = config, verl_config
        self._groups: dict[str, Group] = {}
        self._is_scored = True

    def read(
        self, finished: Iterable[Problem], tags: Mapping[str, Mapping[str, Any]], is_scored: bool, seconds: float
    ) -> None:
        """Read finished groups that are not known yet, in parts, until there are none or so many seconds are over.

        `tags` has what verl knows of all rows, by key. `is_scored`: whether the step that takes them measures.
        """
        if is_scored != self._is_scored:
            self._groups, self._is_scored = {}, is_scored
        if not self._may_read(is_scored):
            return
        waiting = [problem for problem in finished if problem.uid not in self._groups]
        keys_of: dict[str, list[str]] = {problem.uid: [] for problem in waiting}
        for key in tags if waiting else ():
            uid = key.split("_", 1)[0]
            if uid in keys_of:
                keys_of[uid].append(key)
        until = time.monotonic() + seconds
        for part in _parts(waiting, keys_of):
            keys = [key for problem in part for key in keys_of[problem.uid]]
            known = [{name: tags[key][name] for name in READ_OF_TAGS} for key in keys]
            batch = KVBatchMeta(keys=keys, tags=known, partition_id="train")
            groups = read_groups(part, batch, set(), self._config, self._verl_config, is_scored)
            self._groups |= {group.problem.uid: group for group in groups}
            if time.monotonic() >= until:
                break

    def _may_read(self, is_scored: bool) -> bool:
        given = self._config, self._verl_config, is_scored
        return is_of_each_group(*given) and not needs_completion(*given)

    def take(self, uids: Iterable[str], is_scored: bool) -> dict[str, Group]:
        """Return those of the groups that are known, by uid, and forget them."""
        if is_scored != self._is_scored:
            return {}
        return {uid: self._groups.pop(uid) for uid in uids if uid in self._groups}

    def retain(self, uids: Container[str]) -> None:
        """Forget every group but these: the others have been evicted."""
        self._groups = {uid: group for uid, group in self._groups.items() if uid in uids}


def _parts(problems: Sequence[Problem], keys_of: Mapping[str, Sequence[str]]) -> Iterable[list[Problem]]:
    """Cut problems into parts of one trusted set, or of candidates, that are read at once."""
    by_set: dict[str | None, list[Problem]] = {}
    for problem in problems:
        by_set.setdefault(problem.trusted_set, []).append(problem)
    for members in by_set.values():
        yield from in_parts(members, lambda problem: len(keys_of[problem.uid]), ROWS_AT_ONCE)
