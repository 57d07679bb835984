# SPDX-License-Identifier: Apache-2.0
"""`trainer.v1.trainer_mode=gradalign_score`: verl's workers roll out a whole pool and score it; nothing is trained.

First all problems are answered, the trusted ones before the others, and written to a folder group by group as they
finish. Then the rollout sleeps, and the actor scores what was written, by the calls that training makes. Everything
that is in the folder (`store.py`) is not done again; what is kept is decided later (`results.py`).
"""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_gradalign.errors import refuse
from verl_gradalign.files import replace_file
from verl_gradalign.integration.offline.store import (
    OF_POOL,
    ROLLOUTS,
    Measured,
    Member,
    ScoringStore,
    Unit,
    keys_of,
    uid_of,
)
from verl_gradalign.integration.prompts import PromptTable, problems_of
from verl_gradalign.integration.reading import without_reward
from verl_gradalign.integration.rollouts import read_step
from verl_gradalign.integration.sampler import GradAlignSampler
from verl_gradalign.integration.selection_trainer import SelectionTrainer
from verl_gradalign.log.columns import reply_metrics, trusted_metrics
from verl_gradalign.selection.groups import Problem, keys_by_uid, natural_order

PARTITION = "train"
OF_PROBLEM = ("trusted_set", "problem_id", "data_source")

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
                uids, snapshot, _ = self._select_prompt_uids(PARTITION, done, len(done))
                return self._materialize_batch(PARTITION, uids, snapshot), uids, set(self.failure_keys[PARTITION])
            last = self._wait_for_next_poll(PARTITION, last)


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
        """Load the actor's weights alone: neither a training's data loader nor its selection is resumed."""
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

    def _roll_out(self) -> None:
        """Answer all problems, and write groups as they finish.

        Raises: RuntimeError if no problem of the pool could be answered.
        """
        # The trusted sets first, as nothing can be scored without the direction.
        tables: dict[str | None, tuple[PromptTable, int | None]] = dict(self._trusted.items())
        tables[None] = (self._pool, None)
        done = self._store.members()
        waiting = deque(chunks_of({name: t.problem_ids.tolist() for name, (t, _) in tables.items()}, done, self._chunk))
        num_problems = sum(len(table) for table, _ in tables.values())
        self._report(rolled_out=len(done), to_roll_out=num_problems, phase="rolling out")
        failed: list[Problem] = []
        started = time.perf_counter()
        while waiting or len(self._in_flight):
            while waiting and len(self._in_flight) < CHUNKS_IN_FLIGHT * self._chunk:
                name, ids = waiting.popleft()
                table, n = tables[name]
                batch = table.batch(ids, self.global_steps, n or self._rollout_n)
                self._in_flight.add(problems_of(batch, name))
                self._submit_batch_to_rollout(batch)
            least, before = min(self._chunk, len(self._in_flight)), int(self._progress["rolled_out"])
            finished, uids, failures = self.replay_buffer.take(
                least, lambda n, before=before: self._report(rolled_out=before + n)
            )
            taken = self._in_flight.take(uids)
            failures |= without_reward(PARTITION, keys_by_uid(finished.keys))
            failed += [problem for problem in taken if problem.uid in failures]
            rows = read_rows(finished, [problem for problem in taken if problem.uid not in failures])
            if len(rows):
                self._store.write_rollouts(rows, time.perf_counter() - started)
            if finished.keys:
                tq.kv_clear(keys=finished.keys, partition_id=PARTITION)
            self._report(rolled_out=before + len(taken))
            started = time.perf_counter()
        if not any(name is None for name, _ in self._store.members()):
            raise RuntimeError(
                f"none of {len(self._pool)} problems could be rolled out, or none has a reward. {self._ask_reward()}"
            )
        self._store.write_failed(failed)

    def _score_all(self) -> None:
        """Have the actor score what was rolled out, file by file or all at once as the score demands."""
        units, num_trusted = self._store.units(self.gradalign), self._store.num_trusted(self.gradalign)
        sizes = {unit: self._store.num_of_pool(unit) for unit in units}
        scored = sum(sizes[unit] for unit, measured in units.items() if measured is not None)
        self._report(phase="scoring", scored=scored, to_score=sum(sizes.values()))
        trusted = self._store.rollouts(~OF_POOL)
        for step, unit in enumerate(units, start=1):
            if units[unit] is None:
                rows = pa.concat_tables([self._store.rollouts(OF_POOL, unit), trusted])
                self._store.write_measured(self._measure(unit, rows, num_trusted, step))
                trusted = trusted.slice(0, 0)  # the actor keeps the direction
                scored += sizes[unit]
                self._report(scored=scored)

    def _measure(self, unit: Unit, rows: pa.Table, num_trusted: tuple[int, ...], step: int) -> Measured:
        """Put the stored rows back into TransferQueue, have the actor measure their groups, and clear them.

        Without trusted problems among them the direction of an earlier call is used.
        Raises: RuntimeError if the trusted problems give no direction.
        """
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
        scores = None if reply is None or reply.scores is None else replace(reply.scores, diagnostics={})
        return Measured(unit, num_trusted, tuple(groups), scores, {k: float(v) for k, v in metrics.items()})

    def _report(self, **values: Any) -> None:
        """Tell whoever watches the folder how far this is."""
        if {**self._progress, **values} != self._progress:
            self._progress |= values
            replace_file(self._store.folder / "progress.json", json.dumps(self._progress))


def check_scoring(verl_config: DictConfig) -> None:
    """Raise ValueError for what offline scoring does not do."""
    if verl_config.get("scoring") is None:
        refuse("trainer.v1.trainer_mode", "gradalign_score", "has no block `scoring`", "run `verl-gradalign score`")
    if verl_config.algorithm.adv_estimator == "gae":
        refuse("algorithm.adv_estimator", "gae", "there is no critic to score with", "set it to grpo")
    if (verl_config.algorithm.get("filter_groups") or {}).get("enable"):
        why = "every problem of the pool is scored, so none is left to replace a filtered one"
        refuse("algorithm.filter_groups.enable", True, why, "set it to False; dead groups are kept only to fill up")


def chunks_of(
    problem_ids: Mapping[str | None, Sequence[int]], done: set[Member], size: int
) -> list[tuple[str | None, list[int]]]:
    """Return the problems that are not done, in order, in chunks of one trusted set or of the pool (None) each."""
    waiting = {name: [i for i in ids if (name, i) not in done] for name, ids in problem_ids.items()}
    return [(name, ids[start : start + size]) for name, ids in waiting.items() for start in range(0, len(ids), size)]


def read_rows(batch: KVBatchMeta, problems: Sequence[Problem]) -> pa.Table:
    """Return the problems' rows of a finished batch as they are stored, out of TransferQueue, problems in order.

    Raises: ValueError for rows that are not plain text.
    """
    by_uid = keys_by_uid(batch.keys)
    owners = {key: problem for problem in problems for key in by_uid.get(problem.uid, ())}
    if not owners:
        return ROLLOUTS.empty_table()
    fields = ["prompts", "responses", "response_mask", "rm_scores", "position_ids"]
    data = tq.kv_batch_get(keys=list(owners), partition_id=batch.partition_id, select_fields=fields)
    prompts, responses, masks, rewards, positions = ([row.tolist() for row in data[name].unbind()] for name in fields)
    for problem, prompt, response, position in zip(owners.values(), prompts, responses, positions, strict=True):
        if position != list(range(len(prompt) + len(response))):
            raise ValueError(
                f"problem {problem.problem_id} of {problem.data_source}: its positions are not those of plain text, "
                "and images, videos and sounds are not stored. Remedy: score problems of text only."
            )
    whose = {name: [getattr(p, name) for p in owners.values()] for name in OF_PROBLEM}
    sessions, outputs = zip(*map(natural_order, owners), strict=True)
    tokens = {"prompt": prompts, "response": responses, "response_mask": masks, "rewards": rewards}
    return pa.table({**whose, "session": sessions, "output": outputs, **tokens}, schema=ROLLOUTS)


def load_rows(rows: pa.Table) -> tuple[KVBatchMeta, list[Problem]]:
    """Put stored rows into TransferQueue as the agent loop does; return their keys, and the problems in order."""
    whose = zip(*(rows[name].to_pylist() for name in OF_PROBLEM), strict=True)
    problems = dict.fromkeys(Problem(uid_of(name, i), i, source, name) for name, i, source in whose)
    prompts, responses, masks = (
        [torch.tensor(tokens, dtype=torch.int64) for tokens in rows[name].to_pylist()]
        for name in ("prompt", "response", "response_mask")
    )
    input_ids = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    columns = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": masks,
        "loss_mask": masks,
        "input_ids": input_ids,
        "position_ids": [torch.arange(len(tokens)) for tokens in input_ids],
        "rm_scores": [torch.tensor(rewards) for rewards in rows["rewards"].to_pylist()],
    }
    fields = {name: torch.nested.as_nested_tensor(parts, layout=torch.jagged) for name, parts in columns.items()}
    tags = [
        {"prompt_len": len(prompt), "response_len": len(response), "seq_len": len(prompt) + len(response)}
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    keys = keys_of(rows)
    tq.kv_batch_put(keys=keys, partition_id=PARTITION, fields=TensorDict(fields, len(keys)), tags=tags)
    return KVBatchMeta(keys=keys, tags=tags, partition_id=PARTITION), list(problems)
