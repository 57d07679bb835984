# SPDX-License-Identifier: Apache-2.0
"""The FSDP worker with more remote calls: check that a model can be scored, score problems, keep the direction."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_gradalign.config import DirectionConfig, ProbeConfig
from verl_gradalign.integration.engine import VerlEngine, scoring_mode
from verl_gradalign.probe.audit import audited_scores
from verl_gradalign.probe.direction import Direction, no_direction, on_cpu
from verl_gradalign.probe.direction_file import load_direction, save_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout
from verl_gradalign.probe.metric import with_adam_metric, with_candidates_metric
from verl_gradalign.probe.planning import TokenBudget
from verl_gradalign.probe.pool import pool_sum_scores, unit_sum_scores
from verl_gradalign.probe.shards import inner
from verl_gradalign.probe.sketch import sketched_scores
from verl_gradalign.probe.trusted import SetReport, TrustedRows, trusted_direction
from verl_gradalign.types import ProblemRows, ProblemScores


@dataclass(frozen=True)
class ScoringRequest:
    """One rank's share of a scoring call. Problems are the same, in the same order, on all ranks."""

    estimator: str
    probe: ProbeConfig
    direction: DirectionConfig
    budget: TokenBudget
    temperature: float
    source: str | None = "trusted"
    """What the direction is made of: `selection.scores.Score.direction`."""
    set_weights: Mapping[str, float] = field(default_factory=dict)
    """Weight of each trusted set that was rolled out. Empty: score with the stored direction."""
    audited: tuple[int, ...] = ()
    """Candidates to score exactly too."""
    metric_on: tuple[int, ...] = ()
    """Candidates that direction.metric=candidates is measured on."""
    learnability: tuple[float, ...] = ()
    """p(1-p) of each candidate, where the direction is made of them."""
    seed: int = 0
    trusted: Mapping[str, tuple[ProblemRows, ...]] = field(default_factory=dict)
    """Live problems of each trusted set."""
    candidates: tuple[ProblemRows, ...] = ()

    def with_shares(
        self, trusted: Mapping[str, tuple[ProblemRows, ...]], candidates: tuple[ProblemRows, ...]
    ) -> ScoringRequest:
        """Return the request of the rank that holds these shares."""
        return replace(self, trusted=trusted, candidates=candidates)


@dataclass(frozen=True)
class ScoringReply:
    """What a scoring call found. Identical on all ranks, but for the seconds."""

    scores: ProblemScores | None
    """None: there was no usable direction."""
    is_fresh: bool
    """Whether the scores were taken along a direction made in this call of the trusted set."""
    reports: Mapping[str, SetReport]
    """On each trusted set of which a direction was made in this call, and on all under trusted.COMBINED."""
    direction_s: float
    scores_s: float
    cosine_previous: float = math.nan
    """Between the fresh direction and the one before; nan without either."""


class GradAlignWorker(ActorRolloutRefWorker):
    """verl's hybrid worker that can also measure alignment. Scoring leaves no trace in the actor."""

    _direction: Direction | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_check(self, estimator: str, probe: ProbeConfig) -> None:
        """Raise ValueError, before anything is rolled out, if this actor cannot be scored by the estimator."""
        require_no_dropout(self.actor.engine.module)
        ESTIMATORS[estimator](probe).check(self.actor.engine.module)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_reset(self) -> None:
        """Build the model anew from its folder, with a new optimizer, as a new run finds them."""
        self.actor.reset()
        self._direction = None

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def gradalign_score(self, rows: TensorDict, request: ScoringRequest) -> ScoringReply:
        """Make the direction, score the candidates along it. Collective.

        `rows` is this rank's row table (the driver sends keys, verl's bridge fetches the rows); its last row is the
        spare row.
        """
        started = time.perf_counter()
        with scoring_mode(self.actor.engine):
            engine = VerlEngine(self.actor.engine, rows, request.temperature, request.budget)
            direction, fresh, reports = self._direction_for(engine, request)
            direction_s = time.perf_counter() - started
            scores = None if direction is None else _scores(engine, request, direction)
            cosine_previous = _cosine(engine, fresh, self._direction)
        if fresh is not None:
            self._direction = on_cpu(fresh) if request.direction.offload else fresh
        return ScoringReply(
            scores=scores,
            is_fresh=fresh is not None,
            reports=reports,
            direction_s=direction_s,
            scores_s=time.perf_counter() - started - direction_s,
            cosine_previous=cosine_previous,
        )

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_save_direction(self, path: str) -> bool:
        """Write the stored direction to a file that all ranks can read; return whether there is one. Collective."""
        if self._direction is not None:
            with scoring_mode(self.actor.engine):
                save_direction(self.actor.engine.module, self._direction, Path(path), is_writer=self.rank == 0)
        return self._direction is not None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_load_direction(self, path: str, offload: bool) -> None:
        """Take the direction from a file, whatever number of ranks wrote it. Raises ValueError if it does not fit."""
        with scoring_mode(self.actor.engine):
            direction = load_direction(self.actor.engine.module, Path(path))
        self._direction = on_cpu(direction) if offload else direction

    def _direction_for(
        self, engine: VerlEngine, request: ScoringRequest
    ) -> tuple[Direction | None, Direction | None, dict[str, SetReport]]:
        """Return the direction to score along, the one to keep of the trusted set, and reports on it."""
        if request.source != "trusted":
            return no_direction(engine.module), None, {}
        plain: Direction | None = None
        reports: dict[str, SetReport] = {}
        if request.set_weights:
            sets = [TrustedRows(name, w, request.trusted[name]) for name, w in request.set_weights.items()]
            plain, reports = trusted_direction(engine, sets, request.direction, self._direction)
        fresh = None if plain is None or plain.is_degenerate else plain
        may_use_stored = request.direction.on_degenerate == "previous" or not request.set_weights
        used = fresh if fresh is not None else self._direction if may_use_stored else None
        if used is not None and request.direction.metric == "adam":
            used = with_adam_metric(used, engine, self.actor.engine.optimizer)
        elif used is not None and request.direction.metric == "candidates":
            used = with_candidates_metric(used, engine, [request.candidates[i] for i in request.metric_on])
        return used, fresh, reports


def _cosine(engine: VerlEngine, first: Direction | None, second: Direction | None) -> float:
    """Return the cosine of two directions, nan without either. Collective."""
    return math.nan if first is None or second is None else inner(engine, first.shards, second.shards)


def use_own_workers(role_worker_mapping: dict[Any, Any]) -> None:
    """Give the actor's role this worker, before verl starts its processes."""
    for role in role_worker_mapping:
        if "actor" in str(role):
            role_worker_mapping[role] = ray.remote(GradAlignWorker)


def _scores(engine: VerlEngine, request: ScoringRequest, direction: Direction) -> ProblemScores:
    """Return the candidates' scores along the direction, or along that of their own pool. Collective."""
    estimator, probe = ESTIMATORS[request.estimator](request.probe), request.probe
    if request.source in ("pool", "learnability") and probe.pool_dots == "sketch":
        weights = request.learnability if request.source == "learnability" else None
        return sketched_scores(engine, request.candidates, weights, probe.sketch_rank, request.seed)

    def score(problems: Sequence[ProblemRows], along: Direction, audited: tuple[int, ...] = ()) -> ProblemScores:
        return audited_scores(engine, problems, along, estimator, audited, probe.oversized)

    if request.source == "pool":
        return pool_sum_scores(engine, request.candidates, partial(score, audited=request.audited))
    if request.source == "learnability":
        return unit_sum_scores(engine, request.candidates, request.learnability, score, request.audited)
    return score(request.candidates, direction, request.audited)
