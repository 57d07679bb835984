# SPDX-License-Identifier: Apache-2.0
"""The FSDP worker with two more remote calls: check that a model can be scored, and score problems."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_gradalign.config import DirectionConfig, ProbeConfig
from verl_gradalign.integration.engine import VerlEngine, scoring_mode
from verl_gradalign.probe.audit import audited_scores
from verl_gradalign.probe.direction import Direction, compute_direction, on_cpu, with_adam_metric
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout
from verl_gradalign.probe.planning import TokenBudget
from verl_gradalign.types import ProblemRows, ProblemScores


@dataclass(frozen=True)
class ScoringRequest:
    """One rank's share of a scoring call. Problems are the same, in the same order, on all ranks."""

    estimator: str
    probe: ProbeConfig
    direction: DirectionConfig
    budget: TokenBudget
    temperature: float
    audited: tuple[int, ...] = ()
    """Candidates to score exactly too."""
    trusted: tuple[ProblemRows, ...] = ()
    """Live trusted problems. Empty: score with the stored direction."""
    candidates: tuple[ProblemRows, ...] = ()

    def with_shares(self, trusted: tuple[ProblemRows, ...], candidates: tuple[ProblemRows, ...]) -> ScoringRequest:
        """Return the request of the rank that holds these shares."""
        return replace(self, trusted=trusted, candidates=candidates)


@dataclass(frozen=True)
class ScoringReply:
    """What a scoring call found. Identical on all ranks, but for the seconds."""

    scores: ProblemScores | None
    """None: there was no usable direction."""
    fresh_norm: float | None
    """|v| of the direction made in this call; None if none was made."""
    is_fresh: bool
    """Whether the scores were taken along the direction made in this call."""
    direction_s: float
    scores_s: float


class GradAlignWorker(ActorRolloutRefWorker):
    """verl's hybrid worker that can also measure alignment. Scoring leaves no trace in the actor."""

    _direction: Direction | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_check(self, estimator: str, probe: ProbeConfig) -> None:
        """Raise ValueError, before anything is rolled out, if this actor cannot be scored by the estimator."""
        require_no_dropout(self.actor.engine.module)
        ESTIMATORS[estimator](probe).check(self.actor.engine.module)

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def gradalign_score(self, rows: TensorDict, request: ScoringRequest) -> ScoringReply:
        """Make the direction from the trusted rows, score the candidates along it. Collective.

        `rows` is this rank's row table (the driver sends keys, verl's bridge fetches the rows); its last row is the
        spare row.
        """
        started = time.perf_counter()
        with scoring_mode(self.actor.engine):
            engine = VerlEngine(self.actor.engine, rows, request.temperature, request.budget)
            fresh = self._fresh_direction(engine, request) if request.trusted else None
            direction_s = time.perf_counter() - started
            may_use_stored = request.direction.on_degenerate == "previous" or not request.trusted
            direction = self._usable(fresh, may_use_stored)
            scores = None
            if direction is not None:
                estimator = ESTIMATORS[request.estimator](request.probe)
                scores = audited_scores(
                    engine, request.candidates, direction, estimator, request.audited, request.probe.oversized
                )
        if fresh is not None and not fresh.is_degenerate:
            self._direction = fresh
        return ScoringReply(
            scores=scores,
            fresh_norm=None if fresh is None else fresh.norm,
            is_fresh=direction is fresh and fresh is not None,
            direction_s=direction_s,
            scores_s=time.perf_counter() - started - direction_s,
        )

    def _fresh_direction(self, engine: VerlEngine, request: ScoringRequest) -> Direction:
        direction = compute_direction(engine, request.trusted)
        if request.direction.metric == "adam":
            direction = with_adam_metric(direction, engine, self.actor.engine.optimizer)
        return on_cpu(direction) if request.direction.offload else direction

    def _usable(self, fresh: Direction | None, may_use_stored: bool) -> Direction | None:
        """Return the fresh direction, else the stored one where that is allowed, else None."""
        if fresh is not None and not fresh.is_degenerate:
            return fresh
        return self._direction if may_use_stored else None
