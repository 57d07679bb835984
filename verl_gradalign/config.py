# SPDX-License-Identifier: Apache-2.0
"""The configuration: one frozen dataclass tree, mirrored by configs/gradalign/base.yaml key for key.

Every field is followed by its meaning, range, default and reason. What can be checked without data, a model or a score
is checked here, once, with messages that name the key, the value and the remedy (`config_fields.py`);
`integration/checks.py` checks the rest. A key must be the same when a run is resumed, unless its field is marked
`neutral`: it does not decide what is selected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from verl_gradalign.config_fields import Block, build, key, neutral
from verl_gradalign.errors import require

SCHEDULES = ("step", "round", "once", "staged", "forecast")
# Literals, as this module imports neither torch nor the probe; tests/unit/test_config.py holds them equal to it.
ESTIMATORS = ("ghost", "backward", "finite_difference", "low_rank", "output_layer")
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
FEATURES = ("source", "prompt", "text")


@dataclass(frozen=True)
class ScoreOptions(Block, name="score_options"):
    """What some scores are set by; the others do not look at it."""

    band_low: float = 0.2
    """accuracy_band: the lowest success rate kept, from 0 to band_high."""
    band_high: float = 0.8
    """accuracy_band: the highest success rate kept, from band_low to 1. 0.2 and 0.8 are the reference code's."""
    z: float = 1.0
    """lower_bound: standard errors taken off the mean, at least 0; 0 is cosine."""

    def _check(self) -> None:
        keys, rule = "score_options.band_low, band_high", "must be two success rates in ascending order"
        remedy = "set gradalign.score_options.band_low=0.2 and band_high=0.8"
        require(0 <= self.band_low <= self.band_high <= 1, keys, [self.band_low, self.band_high], rule, remedy)
        require(0 <= self.z < math.inf, "score_options.z", self.z, "must be 0 or more", "set 1")


@dataclass(frozen=True)
class CurriculumConfig(Block, name="curriculum"):
    """Which problems are candidates when, and how long the kept ones are trained on. Schedule `step` needs none."""

    steps_per_round: int = key(10, least=1)
    """round: steps trained on the problems kept, the round's first included; at least 1. 10 is the reference's."""
    num_candidates: int | None = key(None, least=1)
    """round: candidates of a round, the next ones of a seeded shuffle. None: oversample x batch x steps_per_round."""
    keep: float | None = None
    """Problems kept of the candidates: a share from 0 to 1, or a whole number from 1 on (1.0 is the share: all).
    None: `step` keeps a batch, `round` the share 1 / oversample; `once` and `staged` must name it (per stage)."""
    n: int | None = key(None, least=1)
    """round, once, staged: responses per candidate, at least rollout.n. None: rollout.n. The step that scores trains
    on the first rollout.n of them, so none is generated twice."""
    warmup_steps: int = key(0, least=0)
    """once: steps of plain training on a random part of the pool before the pool is scored, 0 or more."""
    warmup_problems: int | None = None
    """once, staged: problems of that random part, at least a batch. None: the whole pool."""
    stages: tuple[int, ...] = ()
    """staged: the steps, ascending, in which the problems not yet released are scored and the best `keep` released.
    Steps before the first are warm-up."""

    def _check(self) -> None:
        keep, rule = self.keep, "must be a share above 0 up to 1, or a whole number"
        is_share_or_count = keep is None or 0 < keep <= 1 or (keep > 1 and keep == int(keep))
        require(is_share_or_count, "curriculum.keep", keep, rule, "set 0.25, or 1000")
        stages, rule = list(self.stages), "must be steps from 1 on, in ascending order"
        is_ascending = stages == sorted(set(stages)) and all(step >= 1 for step in stages)
        require(is_ascending, "curriculum.stages", stages, rule, "set for instance [20,120,220]")


@dataclass(frozen=True)
class ReliabilityConfig(Block, name="reliability"):
    """How far a selection can be trusted, and what to do when it cannot. Measured on halves of the responses, in the
    passes that are made anyway."""

    min_reliability: float | None = None
    """Below it the step falls back to `fallback`: a correlation from -1 to 1. None: never."""
    of: str = key("scores", one_of=("scores", "direction"))
    """What min_reliability bounds: `scores` (Spearman-Brown corrected rank correlation of the candidates' scores) or
    `direction` (corrected cosine of v)."""
    fallback: str = key("random", one_of=("random", "accuracy_greedy", "accuracy_band"))
    """The score used in a step below it: random, accuracy_greedy or accuracy_band."""
    shrinkage: float = 0.0
    """How far a problem's score is drawn to the mean of its earlier scores: with k of them by shrinkage * k / (k + 1),
    from 0 (off) to 1 (the running mean)."""

    def _check(self) -> None:
        least, rule = self.min_reliability, "is a correlation, so from -1 to 1"
        is_correlation = least is None or -1 <= least <= 1
        require(is_correlation, "reliability.min_reliability", least, rule, "set 0.1, or null to switch it off")
        value = self.shrinkage
        require(0 <= value <= 1, "reliability.shrinkage", value, "must be from 0 to 1", "set 0 to switch it off")


@dataclass(frozen=True)
class TrustedSetConfig(Block):
    """One of several trusted sets, each with a separate direction."""

    name: str = ""
    """Names its metrics: gradalign/direction/<name>/..."""
    files: tuple[str, ...] = ()
    """As validation.files: parquet, json or jsonl in verl's schema."""
    weight: float = 1.0
    """Its unit direction's weight in the combined direction, above 0."""
    n: int | None = None
    """Responses per problem, at least 1. None: validation.n."""

    def _check(self) -> None:
        key = f"validation.sets[{self.name}]"
        require(self.name.isidentifier(), "validation.sets.name", self.name, "must be a plain word", "name each set")
        require(bool(self.files), f"{key}.files", list(self.files), "is empty", "name a file with trusted problems")
        require(0 < self.weight < math.inf, f"{key}.weight", self.weight, "must be above 0", "set 1, or drop the set")
        require(self.n is None or self.n >= 1, f"{key}.n", self.n, "must be at least 1", "leave it out, or 8")


@dataclass(frozen=True)
class ValidationConfig(Block, name="validation"):
    """The trusted set, whose policy gradient is the direction."""

    files: tuple[str, ...] = ()
    """Parquet, json or jsonl files in verl's schema. Its problems must not stand in data.train_files. Required by
    every score that needs a direction."""
    n: int | None = key(None, least=1)
    """Responses per trusted problem (k_v), at least 1. None: actor_rollout_ref.rollout.n. More responses give a less
    noisy direction; the noise of |v| falls with the square root of problems x n."""
    sets: tuple[TrustedSetConfig, ...] = ()
    """Instead of `files`: several trusted sets. Each gives a separate unit direction, so sets with rewards of another
    size count alike; the weighted sum of them is the direction."""

    def _check(self) -> None:
        names = [trusted.name for trusted in self.sets]
        are_distinct = not (self.files and self.sets) and len(set(names)) == len(names)
        rule = "stands beside validation.files, or names a set twice"
        require(are_distinct, "validation.sets", names, rule, "give every set a separate name, and no validation.files")

    def trusted_sets(self) -> tuple[TrustedSetConfig, ...]:
        """Return the trusted sets; `files` alone are one set named `trusted`."""
        if self.files:
            return (TrustedSetConfig("trusted", self.files, 1.0, self.n),)
        return tuple(replace(trusted, n=trusted.n or self.n) for trusted in self.sets)


@dataclass(frozen=True)
class DirectionConfig(Block, name="direction"):
    """How the direction is kept up to date."""

    refresh_interval: int | None = key(None, least=1)
    """Steps in which the whole trusted set is rolled out once; the policy moves every step, larger values save trusted
    responses. None: 10 with schedule forecast, else 1."""
    rolling: bool | None = None
    """Whether every step rolls out its share of the trusted problems, a tenth of them where refresh_interval is 10,
    instead of all of them in one step. Then, and where `replay` is above 1, v is made anew in every step from responses
    that are kept. None: true with schedule forecast, else false."""
    replay: int | None = key(None, least=1)
    """Turns of the trusted set whose responses are kept, and read again at the present policy: importance ratios
    truncated at 2, a response left out once its effective sample is below half. None: 5 with schedule forecast, else 1.
    """
    part: float = 0.25
    """Where responses are kept: how many of them v is made from in a step, at random, as a share of an update's rows;
    above 0. A small part that changes beats a large one that is held."""
    train_on_trusted: bool = False
    """Whether the trusted responses generated in a step are trained on too, in the place of as many others."""
    audit: float = 0.1
    """train_on_trusted: the share of the trusted problems, at random, that enters neither v nor training, from 0 to
    below 1. The gap of their accuracy to the others' tells how far the trusted set is learnt by heart."""
    on_degenerate: str = key("previous", one_of=("previous", "random", "stop"))
    """What to do in a step whose trusted groups give no direction (all right, all wrong, all failed, or not finite):
    `previous` uses the last good one (`random` while there is none, as after a resume if none is saved), `random`
    selects at random, `stop` ends the run. Every such step is counted and logged."""
    aggregation: str = key("aggregate", one_of=("aggregate", "per_problem_unit"))
    """`aggregate`: the gradient of all trusted responses together, as published; problems of middling difficulty weigh
    more. `per_problem_unit`: each problem's unit gradient, averaged; costs a second pass over the trusted set."""
    ema: float | None = None
    """Weight of the earlier directions in a moving average over refreshes (exponential, bias-corrected), from 0 (the
    newest alone) to below 1. The policy moves slowly, so old rollouts still carry signal. Above 0 checkpoints hold v, 4
    bytes a parameter. None: 0.8 with schedule forecast where responses are kept, else 0."""
    metric: str = key("none", one_of=("none", "adam", "candidates"))
    """`adam` divides v elementwise by the square root of the actor's (bias-corrected) second moments, as its optimizer
    does to a gradient; without effect until the first update. `candidates` divides it by the root mean square over live
    candidates' gradients (plus a tenth of its mean), one backward pass for each. `none`: v, the published method."""
    metric_problems: int = key(32, least=2)
    """metric=candidates: how many of the live candidates it is measured on, at random, at least 2."""
    offload: bool = neutral(True)
    """Whether v lies in CPU memory between its uses, as while the rollout is awake. It is brought back once per use."""

    def _check(self) -> None:
        require(
            0 <= (self.ema or 0) < 1, "direction.ema", self.ema, "must be from 0 to below 1", "set 0 to switch it off"
        )
        require(0 < self.part < math.inf, "direction.part", self.part, "must be above 0", "set 0.25")
        require(0 <= self.audit < 1, "direction.audit", self.audit, "must be from 0 to below 1", "set 0.1")

    @property
    def keeps_responses(self) -> bool:
        """Whether v is made in every step from kept responses, not in some steps from those just generated."""
        return bool(self.rolling) or (self.replay or 1) > 1


@dataclass(frozen=True)
class ForecastConfig(Block, name="forecast"):
    """schedule=forecast: which problems are chosen before anything is generated, and by what."""

    floor: float = 0.125
    """Share of every batch that is drawn uniformly, from 0 to 1. It keeps measuring what the forecast avoids, and shows
    by comparison whether the forecast pays; 1 is plain random training, measured."""
    memory: float = 20.0
    """Steps after which a measurement weighs a third: the policy moves. Above 1."""
    features: tuple[str, ...] = ("source", "prompt")
    """What a problem is known by before it was ever measured. `source`: data_source and log.columns. `prompt`: the
    policy's own hidden states over the prompt, one forward pass without generation. `text`: hashed n-grams of the
    prompt, no model. Or your function of a problem's row, `path/to/file.py:function`, that returns numbers."""
    num_features: int = key(32, least=1)
    """Numbers that `prompt`, `text` or a function's values are projected to, each, at least 1."""
    feature_interval: int | None = key(None, least=1)
    """prompt: steps after which a problem's hidden states are taken anew. None: never."""
    rest: int = key(5, least=0)
    """Steps before a problem may be trained on again, 0 or more; fewer where the pool is too small for that."""
    per: str = key("response", one_of=("response", "token"))
    """What the forecast is divided by: nothing, or the predicted length of the problem's responses, for alignment by
    generated token."""
    on_no_lift: str = key("keep", one_of=("keep", "uniform"))
    """What to do while the measured lift of forecast problems over uniform ones may be 1 (its interval contains it):
    `keep` goes on, `uniform` draws all but a few uniformly until these show a lift again."""

    def _check(self) -> None:
        require(0 <= self.floor <= 1, "forecast.floor", self.floor, "must be from 0 to 1", "set 0.125")
        require(1 < self.memory < math.inf, "forecast.memory", self.memory, "must be above 1", "set 20")
        unknown = [name for name in self.features if name not in FEATURES and ":" not in name]
        remedy = f"use {', '.join(FEATURES)}, or name a function as path/to/file.py:function"
        is_known = not unknown and len(set(self.features)) == len(self.features)
        require(is_known, "forecast.features", list(self.features), "holds an unknown name, or one twice", remedy)


@dataclass(frozen=True)
class ProbeConfig(Block, name="probe"):
    """How the estimators work, and how they are watched."""

    max_tokens_per_rank: int | None = neutral(None, least=1)
    """Positions of one micro-batch of one rank, padding included; of ranks that share rows (Ulysses), each one's. None:
    the actor's own budget (ppo_max_token_len_per_gpu, or ppo_micro_batch_size_per_gpu times the longest row)."""
    oversized: str = key("accumulate", one_of=("accumulate", "sketch", "backward", "stop"))
    """Larger problems take several micro-batches. For a norm `accumulate` adds their gradient up, 4 bytes a trained
    parameter; `sketch` estimates it, and its error; `backward` takes them one by one, slowly. `stop` ends the run."""
    response_derivatives: bool = True
    """Whether d_ij, the derivative of each response's log-probability along v, is measured where a score uses it; the
    others need only sums over a problem, which are cheaper the shorter the responses."""
    rank: int = key(16, least=1)
    """low_rank: singular directions kept of each matrix of the direction, at least 1."""
    relative_step: float = 1e-3
    """finite_difference: the step as a share of |theta|, above 0. In bf16 good from 0.6e-3 to 2.3e-3 (one toy); much
    smaller drowns in rounding, much larger bends."""
    pool_dots: str = key("exact", one_of=("exact", "sketch"))
    """learnalign, pool_cosine: how candidates are compared with their own pool. `exact`: the pool's weighted gradient
    is formed, then every candidate is scored along it. `sketch`: one pass that keeps a random projection of each
    candidate's gradient, and estimates its own rank correlation with the exact scores."""
    sketch_rank: int = key(16, least=2)
    """sketch (both): random directions on each side of a matrix, even, at least 2. Of pool_dots rank correlation with
    the exact scores on a tiny model: 0.70, 0.84, 0.94, 0.96 at 4, 8, 16, 32."""
    fidelity_problems: int = key(8, least=3)
    """Estimators that are not exact: problems scored with `backward` too in every selection, at least 3, to report
    the rank correlation with the exact scores."""
    canary_interval: int = neutral(10, least=0)
    """Exact estimators: every so many selections, the first included, a few problems are rescored with `backward`.
    0: never."""
    canary_problems: int = neutral(2, least=1)
    """How many, at least 1, drawn at random."""
    canary_threshold: float = neutral(0.05)
    """Largest error, as a share of the gradient's norm, that does not stop the run. Half precision differs by about
    1e-2, a layer that was missed by far more."""

    def _check(self) -> None:
        step, threshold = self.relative_step, self.canary_threshold
        require(0 < step < math.inf, "probe.relative_step", step, "must be above 0", "set 0.001")
        require(0 < threshold < math.inf, "probe.canary_threshold", threshold, "must be above 0", "set 0.05")
        require(self.sketch_rank % 2 == 0, "probe.sketch_rank", self.sketch_rank, "must be even", "set 16")


@dataclass(frozen=True)
class LogConfig(Block, name="log"):
    """The selection log, and what is shown of it meanwhile."""

    dir: str | None = None
    """Folder of the Parquet parts. None: `<trainer.default_local_dir>/gradalign`."""
    columns: tuple[str, ...] = ()
    """Keys of the problems' extra_info that the composition of candidates and kept ones is reported by, and that become
    columns of the log. data_source is always reported."""
    sample_problems: int = key(16, least=0)
    """Problems of every scored step whose prompt, answer and a best and a worst response are kept as text, those that
    look least trustworthy first; 0 or more. 0: none, and the report lists suspicious problems without their text."""
    sample_chars: int = key(4000, least=1)
    """Length that each of these texts is cut to, in characters, at least 1."""
    steps_per_part: int = key(100, least=2)
    """Steps whose parts are merged into one file, at least 2: few files, quickly read, and little to rewrite."""
    max_gb: float | None = 8.0
    """Size of the log in GB (1e9 bytes), above 0; beyond it the oldest steps are dropped, with a warning. None: no
    limit. A row takes about 20 to 60 bytes, a sampled problem up to about 9,000."""
    pages_interval: int = key(20, least=0)
    """wandb: steps between two tables of problems (top, bottom, most uncertain) and figures; 0: never."""
    pages_problems: int = key(10, least=1)
    """wandb: problems of each kind in the table, at least 1."""

    def _check(self) -> None:
        limit = self.max_gb
        require(limit is None or limit > 0, "log.max_gb", limit, "must be above 0", "set 8, or null for no limit")
        names = [name for name in self.columns if not name]
        require(not names, "log.columns", list(self.columns), "holds an empty name", "name keys of extra_info")


@dataclass(frozen=True)
class GradAlignConfig(Block):
    """Everything under `gradalign:`.

    Raises: ValueError that names the key, the value and the remedy.
    """

    score: str = "cosine"
    """What candidates are ranked by: a name of `selection.scores.SCORES`, or your own function as `module:function` or
    `path/to/file.py:function` (recipes/how_to/own_score.md)."""
    schedule: str = key("step", one_of=SCHEDULES)
    """When candidates are scored. `step`: every step scores its own candidates and trains on the best. `round`: every
    curriculum.steps_per_round steps. `once`: after curriculum.warmup_steps, the whole pool. `staged`: at
    curriculum.stages, the problems not yet released. `forecast`: none are rolled out that are not trained on; problems
    are chosen by a forecast of their score, which every step's measurements improve."""
    measure: str = key("before", one_of=("before", "update"))
    """When gradients are measured. `before`: in a pass between rollout and update. `update`: in passing, by the update
    that is made anyway; with schedule forecast, for scores of dot products and derivatives (no norms)."""
    oversample: float = 4.0
    """Candidates looked at per problem trained on, at least 1. schedule forecast only forecasts them; the others roll
    them out, and the rollout cost of a step grows with it. 4 keeps the top quarter, the share of the published
    noisy-reward experiment."""
    dead_groups: str = key("drop", one_of=("drop", "rank"))
    """Groups without a non-zero advantage, or whose advantages cancel over equal responses. `drop`: trained on only
    where live groups do not fill the batch. `rank`: they score 0 and are ranked, so they beat every negatively aligned
    problem (what the reference code does)."""
    advantage: str = key("trainer", one_of=("trainer", "centred"))
    """`trainer`: what algorithm.adv_estimator gives, so that scores see the gradient that training will take; where it
    needs more than rewards, groups and a critic, `centred` with a warning. `centred`: reward minus the group's mean."""
    loss_agg_mode: str | None = key(None, one_of=LOSS_AGG_MODES)
    """Token weights within a problem. None: actor_rollout_ref.actor.loss_agg_mode."""
    estimator: str = key("ghost", one_of=ESTIMATORS)
    """How gradients are measured: a name of `probe.estimators.ESTIMATORS`. Exact: `ghost`, about the cost of an update
    over the same tokens, and `backward`, one problem at a time, for models that ghost has no rules for. Cheaper and
    approximate: `finite_difference`, `low_rank`, `output_layer`; they report their fidelity."""
    success_threshold: float = 0.0
    """A response counts as a success when its reward (any number, in the reward's own unit) is above this. Used for
    success rates in metrics and the log, and by scores that ask for them."""
    seed: int = key(0, least=0)
    """Seeds the shuffle that breaks ties and the random score, 0 or more."""
    regime: str | None = None
    """Set by a file of configs/regime that changes keys of this block, to its name; see `checks.read_config`."""
    poll_interval_s: float = neutral(0.5)
    """Seconds between two looks at the rollouts still running, above 0. verl's own replay buffer waits 2.0 s."""
    score_options: ScoreOptions = field(default_factory=ScoreOptions)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    forecast: ForecastConfig = field(default_factory=ForecastConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    direction: DirectionConfig = field(default_factory=DirectionConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    reliability: ReliabilityConfig = field(default_factory=ReliabilityConfig)
    log: LogConfig = field(default_factory=LogConfig, metadata={"is_neutral": True})

    def _check(self) -> None:
        rule = "must be a number from 1 on; below 1 there are fewer candidates than the batch holds"
        remedy = "set 1 or more; 4 keeps a quarter of the candidates"
        require(1 <= self.oversample < math.inf, "oversample", self.oversample, rule, remedy)
        require(self.poll_interval_s > 0, "poll_interval_s", self.poll_interval_s, "must be above 0", "set 0.5")
        rule, remedy = "needs schedule forecast: others choose by what is measured", "set gradalign.measure=before"
        require(self.measure == "before" or self.is_forecast, "measure", self.measure, rule, remedy)
        self._fill_in_direction()

    @property
    def is_forecast(self) -> bool:
        return self.schedule == "forecast"

    @property
    def measures_in_update(self) -> bool:
        return self.measure == "update"

    def _fill_in_direction(self) -> None:
        """Fill in the keys of `direction` whose default depends on the schedule."""
        own = self.direction
        interval, rolling, replay = (10, True, 5) if self.is_forecast else (1, False, 1)
        kept = replace(own, rolling=rolling if own.rolling is None else own.rolling, replay=own.replay or replay)
        # Of parts that change in every step; directions that are held would be remembered for too long.
        ema = 0.8 if self.is_forecast and kept.keeps_responses and own.ema is None else own.ema or 0.0
        filled = replace(kept, refresh_interval=own.refresh_interval or interval, ema=ema)
        object.__setattr__(self, "direction", filled)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> GradAlignConfig:
        """Build the configuration from the plain container under `gradalign:`.

        Raises: ValueError for unknown keys, values of the wrong type and whatever the fields forbid.
        """
        return build(cls, values, prefix="gradalign")
