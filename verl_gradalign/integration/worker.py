# SPDX-License-Identifier: Apache-2.0
"""The FSDP worker with one more remote call: score problems against the trusted set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_gradalign.integration.engine import VerlEngine, scoring_mode
from verl_gradalign.probe.direction import Direction, compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout
from verl_gradalign.types import ProblemRows, ProblemScores


@dataclass(frozen=True)
class ScoringRequest:
    """One rank's share of a scoring call. Problems are the same, in the same order, on all ranks."""

    trusted: tuple[ProblemRows, ...]
    """Live trusted problems. Empty: score with the stored direction."""
    candidates: tuple[ProblemRows, ...]
    estimator: str
    temperature: float
    keeps_previous: bool
    """Whether a degenerate fresh direction may be replaced by the stored one."""


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
    def init_model(self) -> None:
        """Build the models, and refuse an actor with dropout before anything is rolled out."""
        super().init_model()
        require_no_dropout(self.actor.engine.module)

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def gradalign_score(self, rows: TensorDict, request: ScoringRequest) -> ScoringReply:
        """Make the direction from the trusted rows, score the candidates along it. Collective.

        `rows` is this rank's row table (the driver sends keys, verl's bridge fetches the rows); its last row is the
        spare row.
        """
        engine = self.actor.engine
        started = time.perf_counter()
        with scoring_mode(engine):
            probe = VerlEngine(engine, rows, request.temperature)
            fresh = compute_direction(probe, request.trusted) if request.trusted else None
            direction_s = time.perf_counter() - started
            direction = self._usable(fresh, request.keeps_previous or not request.trusted)
            scores = None
            if direction is not None:
                scores = ESTIMATORS[request.estimator]().score(probe, request.candidates, direction)
        if fresh is not None and not fresh.is_degenerate:
            self._direction = fresh
        return ScoringReply(
            scores=scores,
            fresh_norm=None if fresh is None else fresh.norm,
            is_fresh=direction is fresh and fresh is not None,
            direction_s=direction_s,
            scores_s=time.perf_counter() - started - direction_s,
        )

    def _usable(self, fresh: Direction | None, may_use_stored: bool) -> Direction | None:
        """Return the fresh direction, else the stored one where that is allowed, else None."""
        if fresh is not None and not fresh.is_degenerate:
            return fresh
        return self._direction if may_use_stored else None


def deal(problems: Sequence[tuple[str, Sequence[str], int]], dp_size: int) -> list[list[list[str]]]:
    """Return, for every data-parallel rank and problem, the keys of the rows that the rank computes.

    `problems` are (uid, keys, num_tokens). Rows are dealt in turn, and each problem starts one rank further on, so no
    rank is always the one with the most.
    """
    return [
        [[key for k, key in enumerate(keys) if (k + i) % dp_size == rank] for i, (_, keys, _) in enumerate(problems)]
        for rank in range(dp_size)
    ]


def build_shares(
    problems: Sequence[tuple[str, Sequence[str], int]], dealt: Sequence[Sequence[str]], positions: dict[str, int]
) -> tuple[ProblemRows, ...]:
    """Return one rank's `ProblemRows`, given its dealt keys and the position of each key in its row table."""
    return tuple(
        ProblemRows(uid=uid, rows=tuple(positions[key] for key in mine), num_rows=len(keys), num_tokens=num_tokens)
        for (uid, keys, num_tokens), mine in zip(problems, dealt, strict=True)
    )
