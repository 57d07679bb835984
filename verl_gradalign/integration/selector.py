# SPDX-License-Identifier: Apache-2.0
"""One step's selection: from finished groups to the rows that are trained on.

groups -> rewards, advantages -> one scoring call to the FSDP actor -> scores -> kept and rejected, with reasons ->
metrics and selection log -> every other row cleared from TransferQueue.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Protocol

import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.requests import audited_problems, build_requests, drawn, token_budget
from verl_gradalign.integration.rollouts import needs_values, read_groups
from verl_gradalign.log.run_log import StepRecorder
from verl_gradalign.metrics import named
from verl_gradalign.probe.call import ScoringReply, ScoringRequest
from verl_gradalign.probe.trusted import COMBINED
from verl_gradalign.selection.chooser import Choice, Chooser
from verl_gradalign.selection.curriculum import Curriculum, Draw
from verl_gradalign.selection.groups import Group, Problem, measurements, natural_order, session_of
from verl_gradalign.selection.scores import learnability, score_of
from verl_gradalign.selection.select import REASONS
from verl_gradalign.types import Selection

logger = logging.getLogger(__name__)

ScoreRemotely = Callable[[list[KVBatchMeta], list[ScoringRequest]], list[ScoringReply]]


class Host(Protocol):
    """What the selector asks of the trainer while it works on a finished batch."""

    def free_rollout(self) -> None:
        """Put the rollout replicas to sleep, so that scoring has the device to itself."""
        ...

    def complete(self, batch: KVBatchMeta) -> None:
        """Add to the rows what their advantages need and the rollout did not give: rewards, a critic's values."""
        ...


class AlignmentSelector:
    """Chooses among the groups of a step. Attached to the sampler by the trainer.

    Args:
        config: the `gradalign` block.
        verl_config: the whole verl configuration.
        recorder: notes every candidate of every step.
        host: the trainer.
        num_problems: rows of the train files.
        curriculum: decides what is trained on between selections; None where verl's own data loader does.
    """

    def __init__(
        self,
        config: GradAlignConfig,
        verl_config: DictConfig,
        recorder: StepRecorder,
        host: Host,
        num_problems: int,
        curriculum: Curriculum | None,
    ) -> None:
        self._config = config
        self._verl_config = verl_config
        self._recorder = recorder
        self._host = host
        self._score = score_of(config.score)
        self._curriculum = curriculum
        self._chooser = Chooser(config, num_problems)
        self._score_remotely: ScoreRemotely | None = None
        self._dp_rank_of: list[int] = []
        self._in_flight: dict[str, Problem] = {}
        self._draw = Draw((), 0)
        self._direction_step: int | None = None
        self._is_direction_lost = False
        self._num_scorings = 0
        self._has_warned = False
        self.last_selection_s = 0.0

    def attach_workers(self, score_remotely: ScoreRemotely, dp_rank_of: list[int]) -> None:
        """Give the selector its actor: the remote call, and the data-parallel rank of every worker."""
        self._score_remotely = score_remotely
        self._dp_rank_of = dp_rank_of

    def needs_trusted(self, step: int) -> bool:
        """Return whether the trusted sets must be rolled out in `step`: there is no direction, or it is stale."""
        if not self._score.needs_direction:
            return False
        made = self._direction_step
        return made is None or not self.has_direction or step - made >= self._config.direction.refresh_interval

    def expect(self, draw: Draw) -> None:
        """Announce what the step rolls out."""
        self._draw = draw

    def register(self, problems: Sequence[Problem]) -> None:
        """Announce problems that are sent to the rollout."""
        self._in_flight.update({problem.uid: problem for problem in problems})

    @property
    def num_candidates(self) -> int:
        """Candidates that the step's selection is among."""
        return len(self._draw.problem_ids)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def in_flight(self) -> set[str]:
        """Return the uids of all problems that were sent to the rollout and not yet taken."""
        return set(self._in_flight)

    @property
    def has_direction(self) -> bool:
        return self._direction_step is not None and not self._is_direction_lost

    def is_trusted(self, uid: str) -> bool:
        """Return whether a problem in flight is a trusted one."""
        return uid in self._in_flight and self._in_flight[uid].trusted_set is not None

    def trusted_in_flight(self) -> set[str]:
        """Return the uids of trusted problems not yet used."""
        return {uid for uid in self._in_flight if self.is_trusted(uid)}

    def forget(self, uids: Iterable[str]) -> None:
        """Take back problems whose groups were evicted."""
        for uid in uids:
            self._in_flight.pop(uid, None)

    def select(
        self, batch: KVBatchMeta, uids: Sequence[str], failed: set[str], batch_size: int, step: int
    ) -> tuple[KVBatchMeta, dict[str, float]]:
        """Return the rows to train on and the step's metrics. See `sampler.Selector`."""
        started = time.perf_counter()
        taken = [self._in_flight.pop(uid) for uid in self._in_order(uids)]
        if self._verl_config.trainer.v1.trainer_mode == "gradalign":
            self._in_flight.clear()  # synchronous: what was not taken has been evicted
        if self._needs_completion() and batch.keys:
            self._host.free_rollout()
            self._host.complete(batch)
        groups = self._read([p for p in taken if p.trusted_set is None], batch, failed)
        trusted = self._read_trusted(taken, batch, failed)
        if self._draw.is_scored:
            choice, reply = self._score_and_choose(batch, groups, trusted, step)
        else:
            choice, reply = self._chooser.take_all(groups, is_planned=self._curriculum is not None), None
        metrics = self._recorder.record(step, partial(_responses, batch.partition_id), groups, choice, reply, trusted)
        kept = self._keep(batch, groups, choice.selection, step)
        metrics["tokens/trained"] = sum(tag["response_len"] for tag in kept.tags)
        self.last_selection_s = time.perf_counter() - started
        metrics["seconds/selection"] = self.last_selection_s
        # A step that scores nothing trains on what the direction chose, though it was not saved with a checkpoint.
        if self._direction_step is not None and (self.has_direction or not self._draw.is_scored):
            metrics["direction/age"] = step - self._direction_step
        return kept, named(metrics)

    def state(self) -> dict[str, Any]:
        """Return everything that decides the next selection, but for the direction itself."""
        return {
            "direction_step": self._direction_step,
            "num_scorings": self._num_scorings,
            "chooser": self._chooser.state(),
            "curriculum": None if self._curriculum is None else self._curriculum.state(),
            "in_flight": [asdict(problem) for problem in self._in_flight.values()],
        }

    def restore(self, state: Mapping[str, Any], has_direction: bool) -> None:
        """Continue from a checkpoint's state. Without the direction a new one is made in the next step that scores."""
        self._direction_step, self._is_direction_lost = state["direction_step"], not has_direction
        self._num_scorings = state["num_scorings"]
        self._chooser.restore(state["chooser"])
        if self._curriculum is not None:
            self._curriculum.restore(state["curriculum"])
        self.register([Problem(**values) for values in state["in_flight"]])

    def _in_order(self, uids: Sequence[str]) -> list[str]:
        """Return the uids in the order in which they were sent to the rollout."""
        chosen = set(uids)
        return [uid for uid in self._in_flight if uid in chosen]

    def _needs_completion(self) -> bool:
        reward_model = self._verl_config.reward.reward_model
        is_colocated = reward_model.enable and not reward_model.enable_resource_pool
        return is_colocated or (self._draw.is_scored and needs_values(self._config, self._verl_config))

    def _read(self, problems: Sequence[Problem], batch: KVBatchMeta, failed: set[str]) -> list[Group]:
        return read_groups(problems, batch, failed, self._config, self._verl_config, self._draw.is_scored)

    def _read_trusted(self, taken: Sequence[Problem], batch: KVBatchMeta, failed: set[str]) -> dict[str, list[Group]]:
        """Return the groups of each trusted set that was rolled out."""
        names = [s.name for s in self._config.validation.trusted_sets()]
        members = {name: [p for p in taken if p.trusted_set == name] for name in names}
        return {name: self._read(problems, batch, failed) for name, problems in members.items() if problems}

    def _score_and_choose(
        self, batch: KVBatchMeta, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], step: int
    ) -> tuple[Choice, ScoringReply | None]:
        """Return what was chosen, and the actor's reply if it was asked."""
        live = [g for g in groups if g.is_live]
        reply = self._measure(batch, live, trusted, step) if self._score.needs_gradients else None
        if reply is not None and reply.is_fresh:
            self._direction_step, self._is_direction_lost = step, False
            self._chooser.note_direction(reply.reports[COMBINED].half_cosine)
        scores = None if reply is None else reply.scores
        return self._chooser.choose(groups, scores, self._draw.num_kept, step), reply

    def _measure(
        self, batch: KVBatchMeta, live: Sequence[Group], trusted: Mapping[str, Sequence[Group]], step: int
    ) -> ScoringReply | None:
        """Measure the live candidates in the actor. None if there is nothing to measure or no direction to be had."""
        config = self._config
        live_trusted = {name: [g for g in groups if g.is_live] for name, groups in trusted.items()}
        has_live_trusted = any(live_trusted.values())
        policy = config.direction.on_degenerate
        if trusted and not has_live_trusted and (policy != "previous" or not self.has_direction):
            return None
        if not live and not has_live_trusted:
            return None
        self._host.free_rollout()
        assert self._score_remotely is not None, "the trainer attaches the workers before the first step"
        weights = {s.name: s.weight for s in config.validation.trusted_sets()} if has_live_trusted else {}
        m = measurements(live, None, len(live), config.success_threshold)
        wants_derivatives = config.probe.response_derivatives and self._score.needs_response_derivatives
        request = ScoringRequest(
            estimator=config.estimator,
            probe=replace(config.probe, response_derivatives=wants_derivatives),
            direction=config.direction,
            budget=token_budget(config.probe, self._verl_config),
            temperature=float(self._verl_config.actor_rollout_ref.rollout.temperature),
            source=self._score.direction,
            set_weights=weights,
            audited=audited_problems(config, len(live), step, self._num_scorings),
            metric_on=drawn(f"{config.seed} {step} metric", config.direction.metric_problems, len(live)),
            learnability=tuple(learnability(m).tolist()),
            seed=config.seed,
        )
        metas, requests = build_requests(batch, live_trusted, live, self._dp_rank_of, request)
        self._num_scorings += 1
        reply = self._score_remotely(metas, requests)[0]
        self._check_diagnostics(reply)
        return reply

    def _check_diagnostics(self, reply: ScoringReply) -> None:
        """Warn of problems too large for the estimator, once; stop if the canary disagrees."""
        diagnostics = reply.scores.diagnostics if reply.scores is not None else {}
        if diagnostics.get("oversized") and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d problems are larger than a micro-batch of %d tokens and were scored one at a time (exactly, but "
                "slowly); further ones are only counted (gradalign/probe/oversized). Raise "
                "gradalign.probe.max_tokens_per_rank if memory allows",
                diagnostics["oversized"],
                token_budget(self._config.probe, self._verl_config).max_tokens,
            )
        error = diagnostics.get("canary/relative_error", 0.0)
        if not error <= self._config.probe.canary_threshold:
            raise RuntimeError(
                f"scores of estimator {self._config.estimator} differ from exact backward passes by {error:.2g} of the "
                f"gradient's norm, more than gradalign.probe.canary_threshold={self._config.probe.canary_threshold}. "
                "Remedy: set gradalign.estimator=backward and report the model; in half precision raise the threshold "
                "if errors are small and steady."
            )

    def _keep(self, batch: KVBatchMeta, groups: Sequence[Group], selection: Selection, step: int) -> KVBatchMeta:
        """Clear every row that is not trained on in this step, and return the rest, in the order they were sent.

        A candidate may have more responses than training takes: its first rollout.n are trained on.
        """
        trained = set(selection.kept.tolist())
        is_planned = self._config.schedule != "step" and self._draw.is_scored
        if self._curriculum is not None and is_planned and trained:
            ids = self._curriculum.keep(step, [groups[i].problem.problem_id for i in selection.kept])
            trained = {i for i in trained if groups[i].problem.problem_id in set(ids)}
        num_sessions = self._verl_config.actor_rollout_ref.rollout.n
        rows = [sorted(groups[i].keys, key=natural_order) for i in sorted(trained)]
        kept = [key for keys in rows for key in keys if session_of(key) < num_sessions]
        cleared = sorted(set(batch.keys) - set(kept))
        if cleared:
            tq.kv_clear(keys=cleared, partition_id=batch.partition_id)
        if not kept:
            reasons = Counter(REASONS[code] for code in selection.reason_P)
            raise RuntimeError(
                f"none of {len(groups)} candidate groups can be trained on: {dict(reasons)}. Remedy: look for errors "
                "of the rollout or of the reward function above this message."
            )
        return batch.select_keys(kept)


def _responses(partition_id: str, keys: list[str]) -> Sequence[Any]:
    """Return the token ids of some trajectories' responses."""
    return list(
        tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["responses"])["responses"].unbind()
    )
