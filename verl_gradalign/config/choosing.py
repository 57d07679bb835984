# SPDX-License-Identifier: Apache-2.0
"""What candidates are, how they are chosen among, and when a choice is not trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from verl_gradalign.errors import require, require_choice

RELIABILITIES = ("scores", "direction")
FALLBACKS = ("random", "accuracy_greedy", "accuracy_band")


@dataclass(frozen=True)
class ScoreOptions:
    """What some scores are set by; the others do not look at it."""

    band_low: float = 0.2
    """accuracy_band: the lowest success rate kept, from 0 to band_high."""
    band_high: float = 0.8
    """accuracy_band: the highest success rate kept, from band_low to 1. 0.2 and 0.8 are the reference code's."""
    z: float = 1.0
    """lower_bound: standard errors taken off the mean, at least 0; 0 is cosine."""

    def __post_init__(self) -> None:
        band = [self.band_low, self.band_high]
        require(
            0 <= self.band_low <= self.band_high <= 1,
            "score_options.band_low, band_high",
            band,
            "must be two success rates in ascending order",
            "set gradalign.score_options.band_low=0.2 and band_high=0.8",
        )
        require(0 <= self.z < math.inf, "score_options.z", self.z, "must be 0 or more", "set 1")


@dataclass(frozen=True)
class CurriculumConfig:
    """Which problems are candidates when, and how long the kept ones are trained on. Schedule `step` needs none."""

    steps_per_round: int = 10
    """round: steps trained on the problems kept, the round's first included; at least 1. 10 is the reference's."""
    num_candidates: int | None = None
    """round: candidates of a round, the next ones of a seeded shuffle. None: oversample x batch x steps_per_round."""
    keep: float | None = None
    """Problems kept of the candidates: a share from 0 to 1, or a whole number from 1 on (1.0 is the share: all).
    None: `step` keeps a batch, `round` the share 1 / oversample; `once` and `staged` must name it (per stage)."""
    n: int | None = None
    """round, once, staged: responses per candidate, at least rollout.n. None: rollout.n. The step that scores trains
    on the first rollout.n of them, so none is generated twice."""
    warmup_steps: int = 0
    """once: steps of plain training on a random part of the pool before the pool is scored, 0 or more."""
    warmup_problems: int | None = None
    """once, staged: problems of that random part, at least a batch. None: the whole pool."""
    stages: tuple[int, ...] = ()
    """staged: the steps, ascending, in which the problems not yet released are scored and the best `keep` released.
    Steps before the first are warm-up."""

    def __post_init__(self) -> None:
        for key, least in (("steps_per_round", 1), ("num_candidates", 1), ("n", 1), ("warmup_steps", 0)):
            value = getattr(self, key)
            require(
                value is None or value >= least, f"curriculum.{key}", value, f"must be at least {least}", "leave it"
            )
        require(
            self.keep is None or 0 < self.keep <= 1 or (self.keep > 1 and self.keep == int(self.keep)),
            "curriculum.keep",
            self.keep,
            "must be a share above 0 up to 1, or a whole number",
            "set 0.25, or 1000",
        )
        is_ascending = all(first < second for first, second in zip(self.stages, self.stages[1:], strict=False))
        require(
            is_ascending and all(step >= 1 for step in self.stages),
            "curriculum.stages",
            list(self.stages),
            "must be steps from 1 on, in ascending order",
            "set for instance [20,120,220]",
        )


@dataclass(frozen=True)
class ReliabilityConfig:
    """How far a selection can be trusted, and what to do when it cannot. Measured on halves of the responses, in the
    passes that are made anyway."""

    min_reliability: float | None = None
    """Below it the step falls back to `fallback`: a correlation from -1 to 1. None: never."""
    of: str = "scores"
    """What min_reliability bounds: `scores` (Spearman-Brown corrected rank correlation of the candidates' scores) or
    `direction` (corrected cosine of v)."""
    fallback: str = "random"
    """The score used in a step below it: random, accuracy_greedy or accuracy_band."""
    shrinkage: float = 0.0
    """How far a problem's score is drawn to the mean of its earlier scores: with k of them by shrinkage * k / (k + 1),
    from 0 (off) to 1 (the running mean)."""

    def __post_init__(self) -> None:
        least = self.min_reliability
        require(
            least is None or -1 <= least <= 1,
            "reliability.min_reliability",
            least,
            "is a correlation, so from -1 to 1",
            "set 0.1, or null to switch it off",
        )
        require_choice("reliability.of", self.of, RELIABILITIES)
        require_choice("reliability.fallback", self.fallback, FALLBACKS)
        value = self.shrinkage
        require(0 <= value <= 1, "reliability.shrinkage", value, "must be from 0 to 1", "set 0 to switch it off")
