# SPDX-License-Identifier: Apache-2.0
"""From what was measured of a step's groups to the kept ones: scores, their reliability, and what replaces them.

    chooser = Chooser(config, num_problems)
    choice = chooser.choose(groups, reply.scores, num_kept=128, step=7)

Shape legend: P candidates.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from verl_gradalign.config import GradAlignConfig, ScoreOptions
from verl_gradalign.rank_correlation import spearman_brown
from verl_gradalign.selection.candidates import Candidates, tabulate
from verl_gradalign.selection.groups import NON_FINITE, Group, measurements
from verl_gradalign.selection.history import ProblemRecord
from verl_gradalign.selection.reliability import Reliability, score_errors, score_reliability
from verl_gradalign.selection.scores import Score, score_of
from verl_gradalign.selection.select import RANDOM, SCHEDULED, select_all, select_picks, select_random, select_top
from verl_gradalign.types import Measurements, Observations, ProblemScores, Selection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """What was kept of a step's candidates, the table that it was chosen from, and how reliable the scores were."""

    selection: Selection
    candidates: Candidates
    metrics: Mapping[str, float] = field(default_factory=dict)
    observations: Observations | None = None
    """What a forecast learns of the step; None where nothing was measured."""


class Chooser:
    """Ranks by the configured score; remembers each problem's scores and how reliable the direction was."""

    def __init__(self, config: GradAlignConfig, num_problems: int) -> None:
        self._config = config
        self._score = score_of(config.score)
        self._record = ProblemRecord(num_problems)
        self._direction_reliability = math.nan

    def note_direction(self, half_cosine: float) -> None:
        """Note the cosine between the two halves of a fresh direction."""
        self._direction_reliability = spearman_brown(half_cosine)

    def take_all(self, groups: Sequence[Group], is_planned: bool) -> Choice:
        """Keep every group that could be generated: nothing is chosen in this step."""
        candidates = tabulate(groups, self._config.success_threshold)
        return Choice(select_all(candidates, SCHEDULED if is_planned else RANDOM), candidates)

    def choose(self, groups: Sequence[Group], scores: ProblemScores | None, num_kept: int, step: int) -> Choice:
        """Keep the best `num_kept` of the groups; `scores` are those of the live ones, None without a direction."""
        seed = (self._config.seed, step)
        candidates = tabulate(groups, self._config.success_threshold)
        live = [g for g in groups if g.is_live]
        if self._score.rank is None:
            return Choice(select_random(candidates, num_kept, seed), candidates)
        if self._score.needs_gradients and live and scores is None:
            self.note_no_direction(step, "selecting at random in this step")
            return Choice(select_random(candidates, num_kept, seed), candidates)
        m = measurements(live, scores, len(groups), self._config.success_threshold)
        candidates = candidates.measured(m).of_live(score_P=self._remembered(m))
        reliability = score_reliability(m, self._score, self._config.score_options)
        is_unreliable = self._is_unreliable(reliability)
        if is_unreliable:
            selection = self._fall_back(candidates, m, num_kept, seed)
        else:
            selection = select_top(candidates, num_kept, self._config.dead_groups, seed)
        return Choice(selection, candidates, _reliability_metrics(reliability, is_unreliable))

    def take_picks(self, groups: Sequence[Group], scores: ProblemScores | None) -> Choice:
        """Keep every group that a forecast chose and that did not fail; `scores` are as for `choose`.

        Without scores that are asked for, nothing is observed.
        """
        candidates = tabulate(groups, self._config.success_threshold)
        live = [g for g in groups if g.is_live]
        is_uniform_P = np.array([g.problem.is_uniform for g in groups], dtype=bool)
        if self._score.needs_gradients and live and scores is None:
            return Choice(select_picks(candidates, is_uniform_P), candidates)
        assert self._score.rank is not None, "score random ranks nothing, and is refused"
        m = measurements(live, scores, len(groups), self._config.success_threshold)
        options = self._config.score_options
        candidates = candidates.measured(m).of_live(score_P=self._score.rank(m, options).double().numpy())
        # What the update has measured is trained on already.
        usable = candidates if self._config.measures_in_update else self._usable(candidates)
        metrics = _reliability_metrics(score_reliability(m, self._score, options), is_unreliable=False)
        observed = observations(usable, m, self._score, options)
        return Choice(select_picks(usable, is_uniform_P), usable, metrics, observed)

    def state(self) -> dict[str, Any]:
        """Return what later choices depend on, for the checkpoint."""
        return {"direction_reliability": self._direction_reliability, "record": self._record.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self._direction_reliability = state["direction_reliability"]
        self._record.restore(state["record"])

    def _remembered(self, m: Measurements) -> np.ndarray:
        """Return the live problems' scores, drawn to their earlier ones as configured, and note them."""
        assert self._score.rank is not None
        score = self._score.rank(m, self._config.score_options).double().numpy()
        ids = m.problem_id_P.numpy()
        shrunk = self._record.shrunk(ids, score, self._config.reliability.shrinkage)
        self._record.add(ids, score)
        return shrunk

    def _is_unreliable(self, scores: Reliability) -> bool:
        """Return whether the reliability asked for is known and too low."""
        least = self._config.reliability.min_reliability
        value = scores.corrected if self._config.reliability.of == "scores" else self._direction_reliability
        return least is not None and value < least

    def _fall_back(self, candidates: Candidates, m: Measurements, num_kept: int, seed: tuple[int, int]) -> Selection:
        """Return the choice by the score configured for steps whose reliability is too low."""
        fallback = score_of(self._config.reliability.fallback)
        if fallback.rank is None:
            return select_random(self._usable(candidates), num_kept, seed)
        by_fallback = candidates.of_live(score_P=fallback.rank(m, self._config.score_options))
        return select_top(self._usable(by_fallback), num_kept, self._config.dead_groups, seed)

    def _usable(self, candidates: Candidates) -> Candidates:
        """Return the table in which candidates have failed whose gradient is not finite: none must be trained on."""
        is_finite_P = np.isfinite(candidates.dot_P) if self._score.direction else np.full(len(candidates), True)
        if self._score.needs_norm:
            is_finite_P &= np.isfinite(candidates.norm_P)
        return candidates.failing(candidates.is_live_P & ~is_finite_P, NON_FINITE)

    def note_no_direction(self, step: int, consequence: str) -> None:
        """Warn of a step without a direction, or stop there, as configured."""
        message = (
            f"step {step}: the trusted set gives no direction (all groups right, wrong or failed, or a gradient that "
            "is not finite)"
        )
        if self._config.direction.on_degenerate == "stop":
            raise RuntimeError(
                f"{message}; gradalign.direction.on_degenerate=stop. Remedy: use trusted problems of mixed difficulty, "
                "raise gradalign.validation.n, or set gradalign.direction.on_degenerate=previous."
            )
        logger.warning("%s; %s", message, consequence)


def _reliability_metrics(reliability: Reliability, is_unreliable: bool) -> dict[str, float]:
    return {
        "reliability/scores_spearman": reliability.spearman,
        "reliability/scores": reliability.corrected,
        "reliability/scores_problems": float(reliability.num_problems),
        "reliability/fallback": float(is_unreliable),
    }


def observations(candidates: Candidates, m: Measurements | None, score: Score, options: ScoreOptions) -> Observations:
    """Return the scores of all candidates, with standard errors.

    A dead group's score is 0: nothing is to be learnt from it now, which is worth knowing. A failed group's, and one
    that is not finite, are nan.

    Args:
        m: of the live candidates, in their order; None: nothing was measured, as in a step without a direction.
    """
    value_P = np.where(candidates.is_live_P | candidates.is_failed_P, np.nan, 0.0)
    error_P = np.full(len(candidates), np.nan)
    if m is not None and score.rank is not None:
        value_L = score.rank(m, options).double().numpy()
        is_finite_L = np.isfinite(value_L)
        value_P[candidates.is_live_P] = np.where(is_finite_L, value_L, np.nan)
        error_P[candidates.is_live_P] = np.where(is_finite_L, score_errors(m, score, options).numpy(), np.nan)
    return Observations(candidates.problem_id_P, value_P, error_P, candidates.response_tokens_P)
