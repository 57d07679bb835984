# SPDX-License-Identifier: Apache-2.0
"""One step's selection: from finished groups to the rows that are trained on.

groups -> rewards, advantages -> one scoring call to the FSDP actor -> scores -> kept and rejected, with reasons ->
metrics and selection log -> rejected rows cleared from TransferQueue.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.dealing import audited_problems, build_requests, token_budget
from verl_gradalign.integration.groups import Group, Problem, read_groups
from verl_gradalign.integration.records import alignment_metrics, log_rows, selection_metrics
from verl_gradalign.integration.worker import ScoringReply, ScoringRequest
from verl_gradalign.metrics import named
from verl_gradalign.report.selection_log import SelectionLog
from verl_gradalign.selection.scores import SCORES
from verl_gradalign.selection.select import FAILED, RANDOM, Candidate, select_random, select_top
from verl_gradalign.types import Selection

logger = logging.getLogger(__name__)

ScoreRemotely = Callable[[list[KVBatchMeta], list[ScoringRequest]], list[ScoringReply]]


class AlignmentSelector:
    """Chooses among the groups of a step. Attached to `GradAlignSampler` by the trainer.

    Args:
        config: the `gradalign` block.
        verl_config: the whole verl configuration.
        log: where every candidate of every step is noted.
        free_rollout: puts the rollout replicas to sleep, so that scoring has the device to itself.
    """

    def __init__(
        self, config: GradAlignConfig, verl_config: DictConfig, log: SelectionLog, free_rollout: Callable[[], None]
    ) -> None:
        self._config = config
        self._verl_config = verl_config
        self._log = log
        self._free_rollout = free_rollout
        self._score_remotely: ScoreRemotely | None = None
        self._dp_rank_of: list[int] = []
        self._candidates: list[Problem] = []
        self._trusted: list[Problem] = []
        self._direction_step: int | None = None
        self._num_scorings = 0
        self._has_warned = False
        self.last_selection_s = 0.0

    def attach_workers(self, score_remotely: ScoreRemotely, dp_rank_of: list[int]) -> None:
        """Give the selector its actor: the remote call, and the data-parallel rank of every worker."""
        self._score_remotely = score_remotely
        self._dp_rank_of = dp_rank_of

    def needs_trusted(self, step: int) -> bool:
        """Return whether the trusted set must be rolled out in `step`: there is no direction, or it is stale."""
        if not SCORES[self._config.score].needs_direction:
            return False
        return self._direction_step is None or step - self._direction_step >= self._config.direction.refresh_interval

    def expect(self, candidates: Sequence[Problem], trusted: Sequence[Problem]) -> None:
        """Announce the problems that were sent to the rollout in this step."""
        self._candidates, self._trusted = list(candidates), list(trusted)

    @property
    def num_expected(self) -> int:
        return len(self._candidates) + len(self._trusted)

    def select(
        self, batch: KVBatchMeta, failed: set[str], num_kept: int, global_steps: int
    ) -> tuple[KVBatchMeta, dict[str, float]]:
        """Return the rows to train on and the step's metrics. See `sampler.Selector`."""
        started = time.perf_counter()
        trusted = self._read(self._trusted, batch, failed)
        groups = self._read(self._candidates, batch, failed)
        score = SCORES[self._config.score]
        reply = None
        if score.rank is None:
            # Nothing to choose from: train on exactly what verl's own buffer returned.
            selection = Selection(
                kept=tuple(g.problem.uid for g in groups if g.keys),
                reasons={g.problem.uid: RANDOM if g.keys else FAILED for g in groups},
            )
        else:
            reply = self._score(batch, trusted, groups, global_steps)
            selection = self._choose(groups, reply, num_kept, global_steps)
        kept = self._keep(batch, groups, trusted, selection)
        scores = self._scores(reply)
        self._log.write(
            global_steps, log_rows(global_steps, groups, selection, reply, scores, self._config.success_threshold)
        )
        self.last_selection_s = time.perf_counter() - started
        metrics = selection_metrics(groups, selection, self._config.success_threshold)
        metrics["seconds/selection"] = self.last_selection_s
        if score.needs_direction:
            metrics |= alignment_metrics(trusted, selection, reply, scores)
            if self._direction_step is not None:
                metrics["direction/age"] = global_steps - self._direction_step
        return kept, named(metrics)

    def _read(self, problems: Sequence[Problem], batch: KVBatchMeta, failed: set[str]) -> list[Group]:
        return read_groups(problems, batch, failed, self._config, self._verl_config)

    def _score(
        self, batch: KVBatchMeta, trusted: Sequence[Group], groups: Sequence[Group], step: int
    ) -> ScoringReply | None:
        """Measure the live candidates in the actor. None if there is nothing to measure or no direction to be had."""
        live, live_trusted = [g for g in groups if g.is_live], [g for g in trusted if g.is_live]
        policy = self._config.direction.on_degenerate
        if trusted and not live_trusted and (policy != "previous" or self._direction_step is None):
            return None
        if not live and not live_trusted:
            return None
        self._free_rollout()
        assert self._score_remotely is not None, "the trainer attaches the workers before the first step"
        request = ScoringRequest(
            estimator=self._config.estimator,
            probe=replace(
                self._config.probe,
                response_derivatives=self._config.probe.response_derivatives
                and SCORES[self._config.score].needs_response_derivatives,
            ),
            direction=self._config.direction,
            budget=token_budget(self._config.probe, self._verl_config),
            temperature=float(self._verl_config.actor_rollout_ref.rollout.temperature),
            audited=audited_problems(self._config, len(live), step, self._num_scorings),
        )
        metas, requests = build_requests(batch, live_trusted, live, self._dp_rank_of, request)
        self._num_scorings += 1
        reply = self._score_remotely(metas, requests)[0]
        self._heed(reply)
        return reply

    def _heed(self, reply: ScoringReply) -> None:
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

    def _choose(
        self, groups: Sequence[Group], reply: ScoringReply | None, num_kept: int, global_steps: int
    ) -> Selection:
        """Return the selection by score, or by the configured policy where there is no direction."""
        if reply is not None and reply.is_fresh:
            self._direction_step = global_steps
        seed = (self._config.seed, global_steps)
        candidates = self._as_candidates(groups, reply)
        has_direction = reply is not None and reply.scores is not None
        if has_direction or not any(g.is_live for g in groups):
            return select_top(candidates, num_kept, self._config.dead_groups, seed)
        message = (
            f"step {global_steps}: the trusted set gives no direction (all groups right, wrong or failed, or a "
            f"gradient that is not finite)"
        )
        if self._config.direction.on_degenerate == "stop":
            raise RuntimeError(
                f"{message}; gradalign.direction.on_degenerate=stop. Remedy: use trusted problems of mixed difficulty, "
                "raise gradalign.validation.n, or set gradalign.direction.on_degenerate=previous."
            )
        logger.warning("%s; selecting at random in this step", message)
        return select_random(candidates, num_kept, seed)

    def _as_candidates(self, groups: Sequence[Group], reply: ScoringReply | None) -> list[Candidate]:
        scores = self._scores(reply)
        return [
            Candidate(
                uid=g.problem.uid,
                problem_id=g.problem.problem_id,
                is_failed=g.is_failed,
                is_live=g.is_live,
                score=scores.get(g.problem.uid),
            )
            for g in groups
        ]

    def _scores(self, reply: ScoringReply | None) -> dict[str, float]:
        rank = SCORES[self._config.score].rank
        if reply is None or reply.scores is None or rank is None:
            return {}
        return dict(zip(reply.scores.uid, rank(reply.scores).tolist(), strict=True))

    def _keep(
        self, batch: KVBatchMeta, groups: Sequence[Group], trusted: Sequence[Group], selection: Selection
    ) -> KVBatchMeta:
        """Clear every row that is not trained on, and return the rest, problems in the order they were submitted."""
        kept_uids = set(selection.kept)
        kept = [key for g in groups if g.problem.uid in kept_uids for key in g.keys]
        cleared = sorted(set(batch.keys) - set(kept))
        if cleared:
            tq.kv_clear(keys=cleared, partition_id=batch.partition_id)
        if not kept:
            raise RuntimeError(
                f"none of {len(groups)} candidate groups can be trained on: "
                f"{dict(Counter(selection.reasons.values()))}. Remedy: look for errors of the rollout or of the "
                "reward function above this message."
            )
        return batch.select_keys(kept)
