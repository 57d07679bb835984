# SPDX-License-Identifier: Apache-2.0
"""`trainer.v1.trainer_mode=gradalign_score`: verl's workers roll out a whole pool and score it; nothing is trained.

First all problems are answered, the trusted ones before the others, and written to a folder group by group as they
finish. Then the rollout sleeps, and the actor scores what was written, by the calls that training makes. Everything
that is in the folder is not done again (`store.py`); what is kept is decided from it later
(`results.py`). The command is `verl-gradalign score`.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse
from verl_gradalign.files import replace_file
from verl_gradalign.integration.offline.rows import PARTITION, load_rows, read_rows
from verl_gradalign.integration.offline.store import Measured, Member, ScoringStore
from verl_gradalign.integration.prompts import PromptTable, problems_of
from verl_gradalign.integration.rollouts import read_step
from verl_gradalign.integration.sampler import GradAlignSampler
from verl_gradalign.integration.trainer import SelectionTrainer
from verl_gradalign.log.columns import reply_metrics, trusted_metrics
from verl_gradalign.probe.trusted import COMBINED
from verl_gradalign.selection.groups import Problem
from verl_gradalign.selection.scores import score_of

logger = logging.getLogger(__name__)

# Chunks in flight: the rollout must not run dry while a chunk's last groups are waited for.
CHUNKS_IN_FLIGHT = 2


class ScoringSampler(GradAlignSampler):
    """verl's replay buffer, from which finished groups are taken in any number, failed ones too."""

    def take(self, least: int, on_poll: Callable[[int], None]) -> tuple[KVBatchMeta, list[str], set[str]]:
        """Wait for at least `least` finished groups; return all that are, their uids, and which of them failed."""
        last = time.time()
        while True:
            self._sync_metadata_from_transfer_queue()
            done = self.finished_keys[PARTITION] | self.failure_keys[PARTITION]
            on_poll(len(done))
            if len(done) >= least:
                break
            last = self._wait_for_next_poll(PARTITION, last)
        failed = set(self.failure_keys[PARTITION])
        uids, snapshot, _ = self._select_prompt_uids(PARTITION, done, len(done))
        return self._materialize_batch(PARTITION, uids, snapshot), uids, failed


@register_trainer("gradalign_score")
class GradAlignScoringTrainer(SelectionTrainer, PPOTrainerSync):
    """Rolls out and scores the pool once. Its own settings are the block `scoring`: folder, chunk, checkpoint."""

    verl_mode = "sync"
    sampler_class = ScoringSampler

    def __init__(self, config: DictConfig) -> None:
        check_scoring(config)
        self._store = ScoringStore(config.scoring.folder)
        self._chunk = int(config.scoring.chunk)
        self._progress: dict[str, Any] = {}
        super().__init__(config)

    def _use_own_sampler(self, verl_config: DictConfig) -> None:
        super()._use_own_sampler(verl_config)
        verl_config.trainer.v1.sampler.custom_sampler.path = f"pkg://{__name__}"

    def _load_checkpoint(self) -> None:
        """Load the actor's weights alone: neither a training's data loader nor its selection is gone on with."""
        self.global_steps = 0
        checkpoint = self.config.scoring.checkpoint
        if checkpoint is not None:
            self.actor_rollout_wg.load_checkpoint(local_path=str(checkpoint), del_local_after_load=False)

    def fit(self, agent_loop_manager: Any) -> None:
        """Roll out what is not rolled out yet, then score what is not scored yet."""
        self.agent_loop_manager = agent_loop_manager
        self.curr_step_profile = False
        self._roll_out()
        self.free_rollout()
        self._score_all()
        self._shutdown_dump_executor()

    def _tables(self) -> dict[str | None, tuple[PromptTable, int]]:
        """Return each trusted set's problems, then the pool's (None), and how often each is answered."""
        tables: dict[str | None, tuple[PromptTable, int]] = {}
        tables |= {name: (table, n or self._rollout_n) for name, (table, n) in self._trusted.items()}
        return tables | {None: (self._pool, self._rollout_n)}

    def _roll_out(self) -> None:
        """Answer all problems, and write groups as they finish.

        Raises: RuntimeError if no problem of the pool could be answered.
        """
        done = self._store.members()
        tables = self._tables()
        waiting = deque(chunks_of(tables, done, self._chunk))
        self._report(
            rolled_out=len(done), to_roll_out=sum(len(table) for table, _ in tables.values()), phase="rolling out"
        )
        in_flight: dict[str, Problem] = {}
        failed: list[Problem] = []
        started = time.perf_counter()
        while waiting or in_flight:
            while waiting and len(in_flight) < CHUNKS_IN_FLIGHT * self._chunk:
                name, ids = waiting.popleft()
                table, n = tables[name]
                batch = table.batch(ids, self.global_steps, n)
                in_flight |= {problem.uid: problem for problem in problems_of(batch, name)}
                self._submit_batch_to_rollout(batch)
            before = int(self._progress["rolled_out"])
            finished, uids, failures = self.replay_buffer.take(
                min(self._chunk, len(in_flight)), lambda n, before=before: self._report(rolled_out=before + n)
            )
            taken = [in_flight.pop(uid) for uid in uids]
            failed += [problem for problem in taken if problem.uid in failures]
            rows = read_rows(finished, [problem for problem in taken if problem.uid not in failures])
            if rows:
                self._store.write_rollouts(rows, time.perf_counter() - started)
            if finished.keys:
                tq.kv_clear(keys=finished.keys, partition_id=PARTITION)
            self._report(rolled_out=before + len(taken))
            started = time.perf_counter()
        if not any(name is None for name, _ in self._store.members()):
            raise RuntimeError(
                f"none of {len(self._pool)} problems could be rolled out. Remedy: look for errors of the rollout or of "
                "the reward function above this message."
            )
        self._store.write_failed(failed)

    def _score_all(self) -> None:
        """Have the actor score what was rolled out, file by file or all at once as the score demands."""
        names = trusted_names(self.gradalign)
        num_trusted = self._store.num_trusted(names)
        units = self._store.units(is_whole=needs_whole_pool(self.gradalign))
        done = {measured.files for measured in self._store.measured(num_trusted)}
        sizes = {unit: self._store.num_candidates(unit) for unit in units}
        scored = sum(sizes[unit] for unit in units if unit in done)
        self._report(phase="scoring", scored=scored, to_score=sum(sizes.values()))
        has_direction = not names
        for number, unit in enumerate(units):
            if unit in done:
                continue
            rows = [row for path in unit for row in self._store.read_rollouts(path, trusted=False)]
            if not has_direction:
                files = self._store.rollout_files()
                rows += [row for path in files for row in self._store.read_rollouts(path.name, trusted=True)]
            self._store.write_measured(self._measure(unit, rows, num_trusted, step=1 + number))
            has_direction = True
            scored += sizes[unit]
            self._report(scored=scored)

    def _measure(
        self, unit: tuple[str, ...], rows: list[dict[str, Any]], num_trusted: tuple[int, ...], step: int
    ) -> Measured:
        """Put rows back into TransferQueue, have them scored, and clear them."""
        batch, problems = load_rows(rows)
        groups, trusted = read_step(problems, batch, set(), self.gradalign, self.config)
        reply = self._measure_groups(batch, groups, trusted, step)
        if trusted and (reply is None or not reply.is_fresh):
            raise RuntimeError(
                "the trusted set gives no direction: all of its groups are right, wrong or failed, or its gradient is "
                "not finite. Remedy: use trusted problems of mixed difficulty, or raise --trusted-responses."
            )
        tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
        metrics = {} if reply is None else reply_metrics(reply, len(self._trusted) > 1)
        if trusted:
            metrics |= trusted_metrics(trusted, is_degenerate=False)
        combined = None if reply is None else reply.reports.get(COMBINED)
        return Measured(
            files=unit,
            trusted=num_trusted,
            groups=tuple(groups),
            scores=None if reply is None else reply.scores,
            half_cosine=float("nan") if combined is None else combined.half_cosine,
            metrics={name: float(value) for name, value in metrics.items()},
        )

    def _report(self, **values: Any) -> None:
        """Tell whoever watches the folder how far this is."""
        if {**self._progress, **values} != self._progress:
            self._progress |= values
            replace_file(self._store.folder / "progress.json", json.dumps(self._progress))


def trusted_names(config: GradAlignConfig) -> list[str]:
    """Return the trusted sets that the score compares with, none if it does not look at them."""
    return [s.name for s in config.validation.trusted_sets()] if score_of(config.score).needs_direction else []


def check_scoring(verl_config: DictConfig) -> None:
    """Raise ValueError for what offline scoring does not do."""
    if verl_config.get("scoring") is None:
        refuse("trainer.v1.trainer_mode", "gradalign_score", "has no block `scoring`", "run `verl-gradalign score`")
    if verl_config.algorithm.adv_estimator == "gae":
        refuse("algorithm.adv_estimator", "gae", "there is no critic to score with", "set it to grpo")
    if (verl_config.algorithm.get("filter_groups") or {}).get("enable"):
        why = "every problem of the pool is scored, so none is left to replace a filtered one"
        refuse("algorithm.filter_groups.enable", True, why, "set it to False; dead groups are kept only to fill up")


def needs_whole_pool(config: GradAlignConfig) -> bool:
    """Return whether a problem's score depends on the other problems that are measured with it."""
    return score_of(config.score).direction in ("pool", "learnability") or config.direction.metric == "candidates"


def chunks_of(
    tables: Mapping[str | None, tuple[PromptTable, int]], done: set[Member], size: int
) -> list[tuple[str | None, list[int]]]:
    """Return the problems that are not done, in order, in chunks of one table each."""
    chunks: list[tuple[str | None, list[int]]] = []
    for name, (table, _) in tables.items():
        todo = [i for i in table.problem_ids.tolist() if (name, i) not in done]
        chunks += [(name, todo[k : k + size]) for k in range(0, len(todo), size)]
    return chunks
