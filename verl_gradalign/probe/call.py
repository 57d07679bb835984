# SPDX-License-Identifier: Apache-2.0
"""One measuring call in the actor: a request, the direction it is measured along, an estimator, a reply.

    reply, fresh = measure(engine, request, stored_direction, optimizer)

Every rank makes the same call with its own share of the problems. Shape legend: P problems.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from verl_gradalign.config import DirectionConfig, ProbeConfig
from verl_gradalign.probe.audit import audited_scores
from verl_gradalign.probe.direction import Direction, compute_direction, inner, no_direction, on_device
from verl_gradalign.probe.engine import GradientEngine, TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.fsdp import local_part
from verl_gradalign.probe.gradient import trainable_parameters
from verl_gradalign.probe.sketch import sketched_scores
from verl_gradalign.probe.trusted import SetReport, trusted_direction, with_adam_metric, with_candidates_metric
from verl_gradalign.types import ProblemRows, ProblemScores

Scorer = Callable[..., ProblemScores]
"""Scores (problems, direction, audited=()), e.g. around `audit.audited_scores`. Collective."""


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
    trusted: Mapping[str, Sequence[ProblemRows]] = field(default_factory=dict)
    """Live problems of each trusted set."""
    candidates: Sequence[ProblemRows] = ()
    coefficients: tuple[float, ...] = ()
    """One for all tokens of each row of this rank's table, for an engine whose rows come without; nan where they
    differ."""


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

    def of_direction(self) -> DirectionReply:
        """Return what was found of the direction alone."""
        return DirectionReply(self.is_fresh, self.reports, self.direction_s, self.cosine_previous)


@dataclass(frozen=True)
class DirectionRequest:
    """One rank's share of the rows that a direction is made of, apart from any scoring."""

    direction: DirectionConfig
    budget: TokenBudget
    temperature: float
    set_weights: Mapping[str, float]
    """Weight of each trusted set; a set without live problems is left out."""
    trusted: Mapping[str, Sequence[ProblemRows]] = field(default_factory=dict)
    """Live problems of each trusted set, the same, in the same order, on all ranks."""
    coefficients: tuple[float, ...] = ()
    """As in `ScoringRequest`."""


@dataclass(frozen=True)
class DirectionReply:
    """What was found of a direction that was made. Fields as in `ScoringReply`. Identical on all ranks, but for the
    seconds."""

    is_fresh: bool
    """Whether there is a direction; if not, the one before stays stored."""
    reports: Mapping[str, SetReport]
    direction_s: float
    cosine_previous: float = math.nan
    shares: Mapping[str, float] = field(default_factory=dict)
    """What was found of responses of earlier policies, by metric name."""

    def with_scores(self, reply: ScoringReply | None) -> ScoringReply:
        """Return one reply for the call that made the direction and the one that scored along it, if there was one."""
        parts = self.is_fresh, self.reports, self.direction_s, self.cosine_previous
        if reply is None:
            return ScoringReply(None, parts[0], parts[1], parts[2], 0.0, parts[3])
        # The scoring call's own time with the direction is that of its metric.
        seconds = self.direction_s + reply.direction_s
        return ScoringReply(reply.scores, parts[0], parts[1], seconds, reply.scores_s, parts[3])


def make_direction(
    engine: GradientEngine, request: DirectionRequest, stored: Direction | None
) -> tuple[DirectionReply, Direction | None]:
    """Return a reply, and the direction of the request's problems, None if it is degenerate. Collective.

    It is returned without `direction.metric`, which is that of the step in which it is used (`in_metric`).
    """
    started = time.perf_counter()
    fresh, reports = _fresh(engine, request, stored)
    seconds = time.perf_counter() - started
    return DirectionReply(fresh is not None, reports, seconds, _cosine(engine, fresh, stored)), fresh


def measure(
    engine: GradientEngine, request: ScoringRequest, stored: Direction | None, optimizer: Any
) -> tuple[ScoringReply, Direction | None]:
    """Score the candidates along the direction; return the reply, and the direction if it is new. Collective.

    `stored` is the direction kept of an earlier call, `optimizer` the actor's (for direction.metric=adam).
    """
    started = time.perf_counter()
    direction, fresh, reports = _direction_for(engine, request, stored, optimizer)
    direction_s = time.perf_counter() - started
    scores = None if direction is None else _scores(engine, request, direction)
    scores_s = time.perf_counter() - started - direction_s
    cosine_previous = _cosine(engine, fresh, stored)
    return ScoringReply(scores, fresh is not None, reports, direction_s, scores_s, cosine_previous), fresh


def _cosine(engine: GradientEngine, fresh: Direction | None, stored: Direction | None) -> float:
    """Return the cosine of the fresh direction with the one whose place it takes, nan without either. Collective."""
    return math.nan if fresh is None or stored is None else inner(engine, fresh.shards, stored.shards)


def _fresh(
    engine: GradientEngine, request: ScoringRequest | DirectionRequest, stored: Direction | None
) -> tuple[Direction | None, dict[str, SetReport]]:
    """Return the direction of the request's trusted problems, None if it is degenerate, and reports. Collective."""
    made, reports = trusted_direction(engine, request.trusted, request.set_weights, request.direction, stored)
    # A degenerate direction is not kept: the last good one stays for the steps to come.
    return None if made.is_degenerate else made, reports


def _direction_for(
    engine: GradientEngine, request: ScoringRequest, stored: Direction | None, optimizer: Any
) -> tuple[Direction | None, Direction | None, dict[str, SetReport]]:
    """Return the direction to score along, the one to keep of the trusted set, and reports on it. Collective."""
    if request.source != "trusted":
        return no_direction(engine.module), None, {}
    fresh: Direction | None = None
    reports: dict[str, SetReport] = {}
    if request.set_weights:
        fresh, reports = _fresh(engine, request, stored)
    may_use_stored = request.direction.on_degenerate == "previous" or not request.set_weights
    # Here and not before: while a direction is made, the stored one would be one more shard in the device's memory.
    home = local_part(trainable_parameters(engine.module)[0][1]).device
    used = fresh or (on_device(stored, home) if stored is not None and may_use_stored else None)
    if used is not None:
        measured_on = [request.candidates[i] for i in request.metric_on]
        used = in_metric(engine, used, request.direction, optimizer, measured_on)
    return used, fresh, reports


def in_metric(
    engine: GradientEngine,
    direction: Direction,
    config: DirectionConfig,
    optimizer: Any,
    candidates: Sequence[ProblemRows] = (),
) -> Direction:
    """Return the direction in `direction.metric`: that of this step's moments, or of these candidates. Collective.

    A direction is stored without it.
    """
    if config.metric == "adam":
        return with_adam_metric(direction, engine, optimizer)
    if config.metric == "candidates":
        return with_candidates_metric(direction, engine, candidates)
    return direction


def _scores(engine: GradientEngine, request: ScoringRequest, direction: Direction) -> ProblemScores:
    """Return the candidates' scores along the direction, or along that of their own pool. Collective."""
    estimator, probe, candidates = ESTIMATORS[request.estimator](request.probe), request.probe, request.candidates

    def score(problems: Sequence[ProblemRows], along: Direction, audited: tuple[int, ...] = ()) -> ProblemScores:
        return audited_scores(engine, problems, along, estimator, audited, probe.oversized)

    if request.source not in ("pool", "learnability"):
        return score(candidates, direction, request.audited)
    weights = request.learnability if request.source == "learnability" else None
    if probe.pool_dots == "sketch":
        return sketched_scores(engine, candidates, weights, probe.sketch_rank, request.seed)
    return pool_scores(engine, candidates, weights, score, request.audited)


def pool_scores(
    engine: GradientEngine,
    problems: Sequence[ProblemRows],
    weights: Sequence[float] | None,
    score: Scorer,
    audited: tuple[int, ...] = (),
) -> ProblemScores:
    """Return the scores along u = sum_j w_j g_j / |g_j| of the problems' own, without weights sum_j g_j. Collective.

    LearnAlign's row mean of w_i w_j cos(g_i, g_j), self included, is w_i <g_i, u> / (|g_i| n): one pass for the norms,
    one for u, one along u; without weights the norms are not needed first. `sketch.sketched_scores` estimates the same
    in one pass. Problems whose norm is zero or not finite are left out of u; where none is left, the direction's norm
    is 0 and so are the dot products. Only the pass along u is audited.

    Raises: ValueError if `score` gives no norms.
    Source: LearnAlign (arXiv 2506.11480) section 3; `align` of GradAlign's reference code (arXiv 2602.21492).
    """
    if not problems:
        direction = no_direction(engine.module)
    elif weights is None:
        direction = compute_direction(engine, problems)
    else:
        norm_P = _norms(score(problems, no_direction(engine.module)))
        direction = _unit_sum(engine, problems, weights, norm_P.tolist())
    scores = score(problems, direction, audited=audited)
    _norms(scores)
    return scores


def _unit_sum(
    engine: GradientEngine, problems: Sequence[ProblemRows], weights: Sequence[float], norms: Sequence[float]
) -> Direction:
    """Return the direction of sum_j w_j g_j / |g_j|. Collective; the norms are the same on all ranks."""
    weighted = zip(problems, weights, norms, strict=True)
    known = [(problem, w, norm) for problem, w, norm in weighted if w > 0 and 0 < norm < math.inf]
    if not known:
        return no_direction(engine.module)
    # An fp16 scaler is used to gradients of the candidates' size; those of size 1 may overflow under it.
    size = sum(norm for _, _, norm in known) / len(known)
    direction = compute_direction(engine, [replace(p, scale=size * w / norm) for p, w, norm in known])
    return replace(direction, norm=direction.norm / size)


def _norms(scores: ProblemScores) -> Tensor:
    if scores.norm_P is None:
        trouble = "the estimator gives no gradient norms, which candidates are compared with their own pool by"
        raise ValueError(f"{trouble}. Remedy: set gradalign.estimator=ghost.")
    return scores.norm_P
