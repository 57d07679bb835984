# SPDX-License-Identifier: Apache-2.0
"""The trusted problems over a run: rolled out in turns, their responses kept, a part of these read in every step.

for name, problem_ids in store.due(step).items(): ...                 # send them to the rollout
store.keep(trusted, batch, step, add_log_probs)                       # before their rows are cleared
part = store.draw(step)
if part:
    reply = workers.gradalign_make_direction(*store.requests(part, dp_rank_of))[0]
metrics |= store.metrics(part)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.engine import STORED_LOG_PROBS
from verl_gradalign.integration.reading import odd_groups
from verl_gradalign.integration.requests import build_direction_requests, token_budget
from verl_gradalign.integration.trusted_rows import PARTITION, clear_rows, copy_rows, load_rows, save_rows
from verl_gradalign.probe.call import DirectionRequest
from verl_gradalign.selection.groups import Group
from verl_gradalign.selection.kept_groups import Kept, KeptGroups
from verl_gradalign.selection.trusted_turns import TrustedTurns

Part = Mapping[str, Sequence[Kept]]
"""Rollouts by trusted set."""


class TrustedStore:
    """Says which trusted problems are rolled out, and keeps their responses.

    Args:
        config: the `gradalign` block.
        verl_config: the whole verl configuration.
        problem_ids: the problems of each trusted set, by its name.
    """

    def __init__(
        self, config: GradAlignConfig, verl_config: DictConfig, problem_ids: Mapping[str, Sequence[int]]
    ) -> None:
        assert config.direction.replay is not None
        self._config, self._verl_config = config, verl_config
        self._turns = TrustedTurns(config, problem_ids)
        self._kept = KeptGroups(config.direction.replay, config.seed)

    def due(self, step: int) -> dict[str, list[int]]:
        """Return the problems of each trusted set that a step rolls out; see `TrustedTurns.due`."""
        return self._turns.due(step, self._kept.newest)

    def keep(
        self,
        trusted: Mapping[str, Sequence[Group]],
        batch: KVBatchMeta,
        step: int,
        add_log_probs: Callable[[KVBatchMeta], object],
    ) -> None:
        """Keep finished groups, and forget those that are too old. Failed groups are not kept.

        Rows are copied of those that v may be made from: live ones, outside the audit. `batch` knows the rows of all
        groups; `add_log_probs` stores STORED_LOG_PROBS, at the present policy, beside the rows that it is given, as
        verl's `_compute_old_log_prob` does.
        """
        groups = [g for members in trusted.values() for g in members if not g.is_failed]
        for_v = [g for g in groups if g.is_live and not self._is_audited(g)]
        odd: set[str] = set()
        if for_v:
            copies = copy_rows(batch, [key for g in for_v for key in g.keys])
            add_log_probs(copies)
            members = {g.problem.uid: list(g.keys) for g in for_v}
            log_probs = tq.kv_batch_get(keys=copies.keys, partition_id=PARTITION, select_fields=[STORED_LOG_PROBS])
            odd = set(odd_groups(log_probs, members, [STORED_LOG_PROBS]))
            clear_rows([key for uid in odd for key in members[uid]])
        with_rows = {g.problem.uid for g in for_v} - odd
        length = {key: int(tag["seq_len"]) for key, tag in zip(batch.keys, batch.tags, strict=True)}
        fresh = [g if g.problem.uid in with_rows else replace(g, keys=(), halves=()) for g in groups]
        clear_rows(self._kept.add(Kept(g, tuple(length[key] for key in g.keys), step) for g in fresh))

    def _is_audited(self, group: Group) -> bool:
        return group.problem.problem_id in self._turns.audit[str(group.problem.trusted_set)]

    def trainable(self, trusted: Mapping[str, Sequence[Group]]) -> list[Group]:
        """Return the groups just generated that may be trained on: none without `direction.train_on_trusted`."""
        if not self._config.direction.train_on_trusted:
            return []
        groups = [g for members in trusted.values() for g in members]
        return [g for g in groups if not g.is_failed and not self._is_audited(g)]

    def num_trainable(self, step: int) -> int:
        """Return how many groups of those that a step rolls out may be trained on, if none fails."""
        if not self._config.direction.train_on_trusted:
            return 0
        return sum(i not in self._turns.audit[name] for name, ids in self.due(step).items() for i in ids)

    def draw(self, step: int) -> Part:
        """Return what v is made from in a step; empty if nothing that is kept gives a gradient."""
        rows_per_update = self._verl_config.data.train_batch_size * self._verl_config.actor_rollout_ref.rollout.n
        return self._kept.draw(step, self._config.direction.part * rows_per_update)

    def requests(self, part: Part, dp_rank_of: Sequence[int]) -> tuple[list[KVBatchMeta], list[DirectionRequest]]:
        """Return what each worker receives to make the direction of a part, which is not empty."""
        config = self._config
        request = DirectionRequest(
            direction=config.direction,
            budget=token_budget(config.probe, self._verl_config),
            temperature=float(self._verl_config.actor_rollout_ref.rollout.temperature),
            set_weights={s.name: s.weight for s in config.validation.trusted_sets()},
        )
        rows = [row for members in part.values() for k in members for row in zip(k.group.keys, k.lengths, strict=True)]
        keys, tags = [key for key, _ in rows], [{"seq_len": length} for _, length in rows]
        batch = KVBatchMeta(keys=keys, tags=tags, partition_id=PARTITION)
        groups = {name: [kept.group for kept in members] for name, members in part.items()}
        return build_direction_requests(batch, groups, dp_rank_of, request)

    def metrics(self, part: Part) -> dict[str, float]:
        """Return how much is kept and was read in a step, and how well the trusted problems are answered."""
        audit, threshold = self._turns.audit, self._config.success_threshold
        used = [kept for members in part.values() for kept in members]
        values: dict[str, float] = {
            "direction/kept_responses": sum(len(kept.group.keys) for kept in self._kept),
            "direction/part_responses": sum(len(kept.group.keys) for kept in used),
            "tokens/direction": sum(sum(kept.lengths) for kept in used),
        }
        of_v = self._kept.accuracy(audit, are_left_out=True, threshold=threshold)
        of_audit = self._kept.accuracy(audit, are_left_out=False, threshold=threshold)
        if of_v is not None:
            values["direction/accuracy"] = of_v
        if of_audit is not None:
            values["direction/audit_accuracy"] = of_audit
        if of_v is not None and of_audit is not None:
            values["direction/audit_gap"] = of_v - of_audit
        return values

    def state(self) -> list[dict[str, Any]]:
        """Return what is kept, but for the rows (`save_rows`)."""
        return self._kept.state()

    def save_rows(self, path: Path) -> None:
        """Write the rows of all that is kept."""
        save_rows(path, self._groups_with_rows())

    def restore(self, state: Sequence[Mapping[str, Any]], path: Path) -> None:
        """Continue from a checkpoint's state and its file of rows. Raises ValueError if they do not belong together."""
        self._kept.restore(state)
        load_rows(path, self._groups_with_rows())

    def _groups_with_rows(self) -> list[tuple[str, ...]]:
        return [kept.group.keys for kept in self._kept if kept.group.keys]
