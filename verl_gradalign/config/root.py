# SPDX-License-Identifier: Apache-2.0
"""Everything under `gradalign:`, built from the plain container that Hydra composes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from verl_gradalign.config.choosing import CurriculumConfig, ReliabilityConfig, ScoreOptions
from verl_gradalign.config.measuring import DirectionConfig, ProbeConfig, ValidationConfig
from verl_gradalign.errors import require, require_choice

SCHEDULES = ("step", "round", "once", "staged")
DEAD_GROUPS = ("drop", "rank")
ADVANTAGES = ("trainer", "centred")


@dataclass(frozen=True)
class LogConfig:
    """The selection log, and what is shown of it meanwhile."""

    dir: str | None = None
    """Folder of the Parquet parts. None: `<trainer.default_local_dir>/gradalign`."""
    columns: tuple[str, ...] = ()
    """Keys of the problems' extra_info that the composition of candidates and kept ones is reported by, and that become
    columns of the log. data_source is always reported."""
    sample_problems: int = 16
    """Problems of every scored step whose prompt, answer and a best and a worst response are kept as text, those that
    look least trustworthy first; 0 or more. 0: none, and the report lists suspicious problems without their text."""
    sample_chars: int = 4000
    """Length that each of these texts is cut to, in characters, at least 1."""
    steps_per_part: int = 100
    """Steps whose parts are merged into one file, at least 2: few files, quickly read, and little to rewrite."""
    max_gb: float | None = 8.0
    """Size of the log in GB (1e9 bytes), above 0; beyond it the oldest steps are dropped, with a warning. None: no
    limit. A row takes about 20 to 60 bytes, a sampled problem up to about 9,000."""
    pages_interval: int = 20
    """wandb: steps between two tables of problems (top, bottom, most uncertain) and figures; 0: never."""
    pages_problems: int = 10
    """wandb: problems of each kind in the table, at least 1."""

    def __post_init__(self) -> None:
        least_of = {"sample_problems": 0, "sample_chars": 1, "steps_per_part": 2, "pages_interval": 0}
        for key, least in {**least_of, "pages_problems": 1}.items():
            value = getattr(self, key)
            require(value >= least, f"log.{key}", value, f"must be at least {least}", f"set {least} or more")
        limit = self.max_gb
        require(limit is None or limit > 0, "log.max_gb", limit, "must be above 0", "set 8, or null for no limit")
        names = [name for name in self.columns if not name]
        require(not names, "log.columns", list(self.columns), "holds an empty name", "name keys of extra_info")


@dataclass(frozen=True)
class GradAlignConfig:
    """Everything under `gradalign:`.

    Raises: ValueError that names the key, the value and the remedy.
    """

    score: str = "cosine"
    """What candidates are ranked by: a name of `selection.scores.SCORES`, or your own function as `module:function` or
    `path/to/file.py:function` (README, "Your own score")."""
    schedule: str = "step"
    """When candidates are scored. `step`: every step scores its own candidates and trains on the best. `round`: every
    curriculum.steps_per_round steps. `once`: after curriculum.warmup_steps, the whole pool. `staged`: at
    curriculum.stages, the problems not yet released."""
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
    """A response counts as a success when its reward (any number, in the reward's own unit) is above this. Used for
    success rates in metrics and the log, and by scores that ask for them."""
    seed: int = 0
    """Seeds the shuffle that breaks ties and the random score, 0 or more."""
    regime: str | None = None
    """Set by a file of configs/regime that changes keys of this block, to its name; see `checks.read_config`."""
    poll_interval_s: float = 0.5
    """Seconds between two looks at the rollouts still running, above 0. verl's own replay buffer waits 2.0 s."""
    score_options: ScoreOptions = field(default_factory=ScoreOptions)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    direction: DirectionConfig = field(default_factory=DirectionConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        from verl_gradalign.probe.estimators import ESTIMATORS
        from verl_gradalign.probe.objective import LOSS_AGG_MODES

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
        self._check_score()

    def _check_score(self) -> None:
        """Refuse a score that the other keys do not allow to be measured."""
        from verl_gradalign.probe.estimators import ESTIMATORS
        from verl_gradalign.selection.scores import score_of

        score, estimator = score_of(self.score), ESTIMATORS[self.estimator]
        require(
            not score.needs_direction or bool(self.validation.trusted_sets()),
            "validation.files",
            list(self.validation.files),
            f"score {self.score} needs a trusted set",
            "set gradalign.validation.files=<trusted.parquet>, or gradalign.score=random to train without one",
        )
        require(
            not score.needs_norm or estimator.gives_norm,
            "estimator",
            self.estimator,
            f"score {self.score} needs gradient norms, which it does not give",
            "set gradalign.estimator=ghost or gradalign.score=dot",
        )
        require(
            not score.needs_response_derivatives
            or (estimator.gives_response_derivative and self.probe.response_derivatives),
            "estimator",
            self.estimator,
            f"score {self.score} needs each response's derivative, which is not given by it, or switched off",
            "set gradalign.estimator=ghost and gradalign.probe.response_derivatives=true, or gradalign.score=cosine",
        )
        is_of_pool = score.direction in ("pool", "learnability")
        require(
            not is_of_pool or self.probe.pool_dots == "exact" or self.estimator == "ghost",
            "probe.pool_dots",
            self.probe.pool_dots,
            f"a sketch is taken by ghost's taps, not by {self.estimator}",
            "set gradalign.estimator=ghost, or gradalign.probe.pool_dots=exact",
        )
        least = self.reliability.min_reliability
        is_measured = score.is_split and score.rank is not None
        is_measured = is_measured if self.reliability.of == "scores" else score.needs_direction
        require(
            least is None or is_measured,
            "reliability.min_reliability",
            least,
            f"the reliability of {self.reliability.of} is not known for score {self.score}",
            "set it to null, or use a score along a trusted direction",
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
