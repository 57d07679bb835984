# SPDX-License-Identifier: Apache-2.0
"""The configuration: one frozen dataclass tree, mirrored by configs/gradalign/base.yaml key for key.

Every field is followed by its meaning, range, default and reason. What can be checked without data or a model is
checked here, once, with messages that name the key, the value and the remedy; `integration/checks.py` checks the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

SCHEDULES = ("step",)
DEAD_GROUPS = ("drop", "rank")
ADVANTAGES = ("trainer", "centred")
ON_DEGENERATE = ("previous", "random", "stop")
METRICS_OF_DIRECTION = ("none", "adam")
OVERSIZED = ("backward", "stop")


def require(holds: bool, key: str, value: object, rule: str, remedy: str) -> None:
    """Raise ValueError "gradalign.<key>=<value>: <rule>. Remedy: <remedy>" unless `holds`."""
    if not holds:
        raise ValueError(f"gradalign.{key}={value!r}: {rule}. Remedy: {remedy}.")


def require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    require(
        value in choices, key, value, f"unknown; known are {', '.join(choices)}", f"set gradalign.{key}={choices[0]}"
    )


@dataclass(frozen=True)
class ValidationConfig:
    """The trusted set, whose policy gradient is the direction."""

    files: tuple[str, ...] = ()
    """Parquet, json or jsonl files in verl's schema. Its problems must not stand in data.train_files. Required by
    every score that needs a direction."""
    n: int | None = None
    """Responses per trusted problem (k_v). None: actor_rollout_ref.rollout.n. More responses give a less noisy
    direction; the noise of |v| falls with the square root of problems x n."""

    def __post_init__(self) -> None:
        require(self.n is None or self.n >= 1, "validation.n", self.n, "must be at least 1", "leave it out, or 8")


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
    metric: str = "none"
    """`adam` divides v elementwise by the square root of the actor's (bias-corrected) second moments, as its optimizer
    does to a gradient; without effect until the first update. `none`: v as it is, the published method."""
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
        for key, least in (("rank", 1), ("fidelity_problems", 3), ("canary_interval", 0), ("canary_problems", 1)):
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


@dataclass(frozen=True)
class LogConfig:
    """The selection log."""

    dir: str | None = None
    """Folder of the Parquet parts. None: `<trainer.default_local_dir>/gradalign`."""


@dataclass(frozen=True)
class GradAlignConfig:
    """Everything under `gradalign:`.

    Raises: ValueError that names the key, the value and the remedy.
    """

    score: str = "cosine"
    """What candidates are ranked by: a name of `selection.scores.SCORES` (cosine, dot, random)."""
    schedule: str = "step"
    """When candidates are scored. `step`: every step scores its own candidates and trains on the best."""
    oversample: float = 4.0
    """Candidates rolled out per problem trained on, at least 1. The rollout cost of a step grows with it; 4 keeps
    the top quarter, the share of the published noisy-reward experiment."""
    dead_groups: str = "drop"
    """Groups without a non-zero advantage, or whose advantages cancel over equal responses. `drop`: trained on only
    where live groups do not fill the batch. `rank`: they score 0 and are ranked, so they beat every negatively aligned
    problem (what the reference code does)."""
    advantage: str = "trainer"
    """`trainer`: what algorithm.adv_estimator gives, so that scores see the gradient that training will take.
    `centred`: reward minus the group's mean, for estimators whose advantages do not exist before the selection."""
    loss_agg_mode: str | None = None
    """Token weights within a problem. None: actor_rollout_ref.actor.loss_agg_mode."""
    estimator: str = "ghost"
    """How gradients are measured: a name of `probe.estimators.ESTIMATORS`. Exact: `ghost`, about the cost of an update
    over the same tokens, and `backward`, one problem at a time, for models that ghost has no rules for. Cheaper and
    approximate: `finite_difference`, `low_rank`, `output_layer`; they report their fidelity."""
    success_threshold: float = 0.0
    """A response counts as a success when its reward is above this. Used for success rates in metrics and the log."""
    seed: int = 0
    """Seeds the shuffle that breaks ties and the random score."""
    poll_interval_s: float = 0.5
    """Seconds between two looks at the rollouts still running, above 0. verl's own replay buffer waits 2.0 s."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    direction: DirectionConfig = field(default_factory=DirectionConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        from verl_gradalign.probe.estimators import ESTIMATORS
        from verl_gradalign.probe.objective import LOSS_AGG_MODES
        from verl_gradalign.selection.scores import SCORES

        require_choice("score", self.score, tuple(SCORES))
        require_choice("schedule", self.schedule, SCHEDULES)
        require_choice("estimator", self.estimator, tuple(ESTIMATORS))
        require_choice("dead_groups", self.dead_groups, DEAD_GROUPS)
        require_choice("advantage", self.advantage, ADVANTAGES)
        if self.loss_agg_mode is not None:
            require_choice("loss_agg_mode", self.loss_agg_mode, LOSS_AGG_MODES)
        require(
            1 <= self.oversample < math.inf,
            "oversample",
            self.oversample,
            "must be a number from 1 on; below 1 there are fewer candidates than the batch holds",
            "set 1 or more; 4 keeps a quarter of the candidates",
        )
        require(self.seed >= 0, "seed", self.seed, "must be 0 or more", "set 0")
        require(self.poll_interval_s > 0, "poll_interval_s", self.poll_interval_s, "must be above 0", "set 0.5")
        require(
            not SCORES[self.score].needs_direction or bool(self.validation.files),
            "validation.files",
            list(self.validation.files),
            f"score {self.score} needs a trusted set",
            "set gradalign.validation.files=<trusted.parquet>, or gradalign.score=random to train without one",
        )
        require(
            not SCORES[self.score].needs_norm or ESTIMATORS[self.estimator].gives_norm,
            "estimator",
            self.estimator,
            f"score {self.score} needs gradient norms, which it does not give",
            "set gradalign.estimator=ghost or gradalign.score=dot",
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> GradAlignConfig:
        """Build the configuration from the plain container under `gradalign:`.

        Raises: ValueError for unknown keys, values of the wrong type and whatever the fields forbid.
        """
        return _build(cls, values, prefix="gradalign")


def _build(cls: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """Build dataclass `cls` from a nested mapping, recursing into nested dataclasses."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix}={values!r}: must be a block of keys. Remedy: set {prefix}.<key>=<value> instead.")
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"{prefix}.{key}={value!r}: unknown key. Remedy: use one of {', '.join(sorted(known))}.")
    return cls(**{key: _convert(hints[key], value, f"{prefix}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Return `value` as the type `hint` asks for, or raise ValueError naming the key."""
    if is_dataclass(hint):
        return _build(hint, {} if value is None else value, key)
    allowed = [t for t in getattr(hint, "__args__", (hint,)) if t is not Ellipsis]
    if getattr(hint, "__origin__", None) is tuple:
        items = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return tuple(_convert(allowed[0], item, key) for item in items)
    if value is None and type(None) in allowed:
        return None
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, tuple(allowed)) and not (isinstance(value, bool) and bool not in allowed):
        return value
    names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
    raise ValueError(f"{key}={value!r}: must be {names}. Remedy: remove the override to use the default.")
