# SPDX-License-Identifier: Apache-2.0
"""The trusted sets, the direction that is made of them, and how gradients are measured along it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from verl_gradalign.errors import require, require_choice

ON_DEGENERATE = ("previous", "random", "stop")
AGGREGATIONS = ("aggregate", "per_problem_unit")
METRICS_OF_DIRECTION = ("none", "adam", "candidates")
OVERSIZED = ("backward", "stop")
POOL_DOTS = ("exact", "sketch")


@dataclass(frozen=True)
class TrustedSetConfig:
    """One of several trusted sets, each with a direction of its own."""

    name: str = ""
    """Names its metrics: gradalign/direction/<name>/..."""
    files: tuple[str, ...] = ()
    """As validation.files: parquet, json or jsonl in verl's schema."""
    weight: float = 1.0
    """Its unit direction's weight in the combined direction, above 0."""
    n: int | None = None
    """Responses per problem, at least 1. None: validation.n."""

    def __post_init__(self) -> None:
        key = f"validation.sets[{self.name}]"
        require(self.name.isidentifier(), "validation.sets.name", self.name, "must be a plain word", "name each set")
        require(bool(self.files), f"{key}.files", list(self.files), "is empty", "name a file with trusted problems")
        require(0 < self.weight < math.inf, f"{key}.weight", self.weight, "must be above 0", "set 1, or drop the set")
        require(self.n is None or self.n >= 1, f"{key}.n", self.n, "must be at least 1", "leave it out, or 8")


@dataclass(frozen=True)
class ValidationConfig:
    """The trusted set, whose policy gradient is the direction."""

    files: tuple[str, ...] = ()
    """Parquet, json or jsonl files in verl's schema. Its problems must not stand in data.train_files. Required by
    every score that needs a direction."""
    n: int | None = None
    """Responses per trusted problem (k_v), at least 1. None: actor_rollout_ref.rollout.n. More responses give a less
    noisy direction; the noise of |v| falls with the square root of problems x n."""
    sets: tuple[TrustedSetConfig, ...] = ()
    """Instead of `files`: several trusted sets. Each gives a unit direction of its own, so sets with rewards of another
    size count alike; the weighted sum of them is the direction."""

    def __post_init__(self) -> None:
        require(self.n is None or self.n >= 1, "validation.n", self.n, "must be at least 1", "leave it out, or 8")
        names = [trusted.name for trusted in self.sets]
        require(
            not (self.files and self.sets) and len(set(names)) == len(names),
            "validation.sets",
            names,
            "stands beside validation.files, or names a set twice",
            "give every set a name of its own, and no validation.files",
        )

    def trusted_sets(self) -> tuple[TrustedSetConfig, ...]:
        """Return the trusted sets; `files` alone are one set named `trusted`."""
        if self.files:
            return (TrustedSetConfig("trusted", self.files, 1.0, self.n),)
        return tuple(replace(trusted, n=trusted.n or self.n) for trusted in self.sets)


@dataclass(frozen=True)
class DirectionConfig:
    """How the direction is kept up to date."""

    refresh_interval: int = 1
    """Steps between two directions made from fresh rollouts of the trusted set. 1: every step, the default, because
    the policy moves every step; larger values save the trusted rollouts."""
    on_degenerate: str = "previous"
    """What to do in a step whose trusted groups give no direction (all right, all wrong, all failed, or a gradient
    that is not finite): `previous` uses the last good one (`random` while there is none), `random` selects at random,
    `stop` ends the run. Every such step is counted and logged."""
    aggregation: str = "aggregate"
    """`aggregate`: the gradient of all trusted responses together, as published; problems of middling difficulty weigh
    more. `per_problem_unit`: each problem's unit gradient, averaged; costs a second pass over the trusted set."""
    ema: float = 0.0
    """Weight of the earlier directions in a moving average over refreshes (exponential, bias-corrected), from 0 to
    below 1. 0: the newest alone. The policy moves slowly, so old rollouts still carry signal."""
    metric: str = "none"
    """`adam` divides v elementwise by the square root of the actor's (bias-corrected) second moments, as its optimizer
    does to a gradient; without effect until the first update. `candidates` divides it by the root mean square over live
    candidates' gradients (plus a tenth of its mean), one backward pass for each. `none`: v, the published method."""
    metric_problems: int = 32
    """metric=candidates: how many of the live candidates it is measured on, at random, at least 2."""
    offload: bool = False
    """Whether v lies in CPU memory between its uses: saves 4 bytes per parameter and rank count, costs transfers."""

    def __post_init__(self) -> None:
        require(
            self.refresh_interval >= 1,
            "direction.refresh_interval",
            self.refresh_interval,
            "must be at least 1",
            "set 1 to refresh the direction every step",
        )
        require_choice("direction.on_degenerate", self.on_degenerate, ON_DEGENERATE)
        require_choice("direction.metric", self.metric, METRICS_OF_DIRECTION)
        require_choice("direction.aggregation", self.aggregation, AGGREGATIONS)
        require(0 <= self.ema < 1, "direction.ema", self.ema, "must be from 0 to below 1", "set 0 to switch it off")
        least = self.metric_problems
        require(least >= 2, "direction.metric_problems", least, "must be at least 2", "set 32")


@dataclass(frozen=True)
class ProbeConfig:
    """How the estimators work, and how they are watched."""

    max_tokens_per_rank: int | None = None
    """Positions of one micro-batch of one rank, padding included. None: the actor's own budget
    (ppo_max_token_len_per_gpu, or ppo_micro_batch_size_per_gpu times the longest row)."""
    oversized: str = "backward"
    """Problems larger than that: `backward` scores them one at a time on all ranks, exactly, with one warning and a
    count; `stop` ends the run."""
    response_derivatives: bool = True
    """Whether d_ij, the derivative of each response's log-probability along v, is measured where a score uses it; the
    others need only sums over a problem, which are cheaper the shorter the responses."""
    rank: int = 16
    """low_rank: singular directions kept of each matrix of the direction, at least 1."""
    relative_step: float = 1e-3
    """finite_difference: the step as a share of |theta|, above 0. In bf16 good from 0.6e-3 to 2.3e-3 (one toy); much
    smaller drowns in rounding, much larger bends."""
    pool_dots: str = "exact"
    """learnalign, pool_cosine: how candidates are compared with their own pool. `exact`: the pool's weighted gradient
    is formed, then every candidate is scored along it. `sketch`: one pass that keeps a random projection of each
    candidate's gradient, and estimates its own rank correlation with the exact scores."""
    sketch_rank: int = 16
    """sketch: random directions on each side of a matrix, even, at least 2. Rank correlation with the exact scores on a
    tiny model: 0.70, 0.84, 0.94, 0.96 at 4, 8, 16, 32."""
    fidelity_problems: int = 8
    """Estimators that are not exact: problems scored with `backward` too in every selection, at least 3, to report
    the rank correlation with the exact scores."""
    canary_interval: int = 10
    """Exact estimators: every so many selections, the first included, a few problems are rescored with `backward`.
    0: never."""
    canary_problems: int = 2
    """How many, at least 1, drawn at random."""
    canary_threshold: float = 0.05
    """Largest error, as a share of the gradient's norm, that does not stop the run. Half precision differs by about
    1e-2, a layer that was missed by far more."""

    def __post_init__(self) -> None:
        least_of = {"rank": 1, "sketch_rank": 2, "fidelity_problems": 3, "canary_interval": 0, "canary_problems": 1}
        for key, least in least_of.items():
            value = getattr(self, key)
            require(value >= least, f"probe.{key}", value, f"must be at least {least}", f"set {least} or more")
        for key, default in (("relative_step", 1e-3), ("canary_threshold", 0.05)):
            value = getattr(self, key)
            require(0 < value < math.inf, f"probe.{key}", value, "must be above 0", f"set {default}")
        limit = self.max_tokens_per_rank
        require(
            limit is None or limit >= 1,
            "probe.max_tokens_per_rank",
            limit,
            "must be at least 1",
            "leave it out, or 16384",
        )
        require_choice("probe.oversized", self.oversized, OVERSIZED)
        require_choice("probe.pool_dots", self.pool_dots, POOL_DOTS)
        require(self.sketch_rank % 2 == 0, "probe.sketch_rank", self.sketch_rank, "must be even", "set 16")
