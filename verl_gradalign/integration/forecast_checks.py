# SPDX-License-Identifier: Apache-2.0
"""What schedule forecast, measuring in the update and kept trusted responses cannot be combined with, and why.

`checks.py` runs these beside its own. Each raises ValueError for one thing, with the key, its value and the remedy.
"""

import logging
import math

from omegaconf import DictConfig, OmegaConf

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse, require
from verl_gradalign.integration.trainer_modes import SEPARATE
from verl_gradalign.selection.scores import score_of

logger = logging.getLogger(__name__)

OF_UPDATE = ("low_rank", "ghost")
"""Estimators of the update's own backward pass: the direction's factors, or the whole direction."""
MODE, ANY_SCHEDULE = "trainer.v1.trainer_mode", "gradalign_colocate_async"


def _otherwise(config: GradAlignConfig) -> str:
    """Return what leaves schedule forecast: measuring in the update, and without norms, belongs to it alone."""
    before = ", gradalign.measure=before and gradalign.estimator=ghost" if config.measures_in_update else ""
    return f"gradalign.schedule=step{before}"


def _check_ranking(config: GradAlignConfig) -> None:
    is_random = score_of(config.score).rank is None
    rule = f"ranks nothing, so schedule {config.schedule} has nothing to forecast"
    remedy = (
        f"set gradalign.score=dot (gradalign.forecast.floor=1 draws at random and measures), or {_otherwise(config)}"
    )
    require(not (config.is_forecast and is_random), "score", config.score, rule, remedy)


def _check_comparable(config: GradAlignConfig) -> None:
    is_of_candidates = score_of(config.score).is_of_candidates
    rule = (
        "compares a step's candidates with each other, so its values say nothing of another step, and no forecast fits"
    )
    remedy = f"set gradalign.score=dot, or {_otherwise(config)}"
    require(not (config.is_forecast and is_of_candidates), "score", config.score, rule, remedy)


def _check_norms_of_update(config: GradAlignConfig) -> None:
    score = score_of(config.score)
    is_in_vain = config.measures_in_update and score.needs_norm and not score.is_of_candidates
    rule = "needs gradient norms, and the update (gradalign.measure=update) gives dot products only"
    remedy = "set gradalign.score=dot, or gradalign.measure=before and gradalign.estimator=ghost"
    if ":" in config.score:
        remedy += ", or name a Score that does not ask for norms"
    require(not is_in_vain, "score", config.score, rule, remedy)


def _check_something_measured(config: GradAlignConfig) -> None:
    score = score_of(config.score)
    is_in_vain = config.measures_in_update and score.rank is not None and not score.needs_gradients
    rule = f"score {config.score} looks at rewards alone, so there is nothing to measure in the update"
    require(not is_in_vain, "measure", config.measure, rule, "set gradalign.measure=before, or gradalign.score=dot")


def _check_estimator_of_update(config: GradAlignConfig) -> None:
    is_known = not config.measures_in_update or config.estimator in OF_UPDATE
    rule = "measures in a pass of its own, not in the update (gradalign.measure=update)"
    remedy = "set gradalign.estimator=low_rank (rank probe.rank), or gradalign.estimator=ghost (the whole direction)"
    require(is_known, "estimator", config.estimator, rule, remedy)


def _check_metric(config: GradAlignConfig) -> None:
    direction = config.direction
    is_too_early = direction.metric == "candidates" and (config.measures_in_update or direction.keeps_responses)
    rule = "needs candidates' gradients before the direction is used, and it is made before there are any"
    remedy = "set gradalign.direction.metric=none, or gradalign.direction.metric=adam"
    require(not is_too_early, "direction.metric", direction.metric, rule, remedy)


def _check_kept_responses(config: GradAlignConfig) -> None:
    direction = config.direction
    is_now_and_then = config.schedule in ("round", "once", "staged")
    rule = f"makes a direction in every step, and schedule {config.schedule} measures now and then"
    remedy = "set gradalign.direction.rolling=null"
    require(not (is_now_and_then and direction.rolling), "direction.rolling", direction.rolling, rule, remedy)
    is_replayed = is_now_and_then and (direction.replay or 1) > 1
    require(not is_replayed, "direction.replay", direction.replay, rule, "set gradalign.direction.replay=null")


def _check_trained_trusted(config: GradAlignConfig) -> None:
    direction, key, off = (
        config.direction,
        "direction.train_on_trusted",
        "set gradalign.direction.train_on_trusted=false",
    )
    if not direction.train_on_trusted:
        return
    rule = "needs schedule forecast, whose batches have room for them: other schedules fill theirs with what they chose"
    require(config.is_forecast, key, True, rule, off)
    rule = f"score {config.score} has no use for a trusted set, so none is rolled out"
    require(score_of(config.score).needs_direction, key, True, rule, f"{off}, or gradalign.score=dot")
    rule = "responses must be kept: in a burst every refresh_interval steps they would be most of that step's batch"
    require(direction.keeps_responses, key, True, rule, f"{off}, or gradalign.direction.rolling=true")


def _check_fallback(config: GradAlignConfig) -> None:
    least = config.reliability.min_reliability
    rule = "schedule forecast chooses before anything is measured, so there is nothing to fall back from"
    remedy = "set it to null; a noisy measurement weighs little in the forecast anyway"
    require(not config.is_forecast or least is None, "reliability.min_reliability", least, rule, remedy)


def _check_shrinkage(config: GradAlignConfig) -> None:
    value = config.reliability.shrinkage
    rule = "the forecast draws a problem's measurements together itself, by how noisy each of them is"
    require(
        not config.is_forecast or not value,
        "reliability.shrinkage",
        value,
        rule,
        "set gradalign.reliability.shrinkage=0",
    )


CONFIG_CHECKS = (
    _check_ranking,
    _check_comparable,
    _check_norms_of_update,
    _check_something_measured,
    _check_estimator_of_update,
    _check_metric,
    _check_kept_responses,
    _check_trained_trusted,
    _check_fallback,
    _check_shrinkage,
)


def _check_size_of_trusted_groups(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Groups of a batch have one size."""
    rollout_n = verl_config.actor_rollout_ref.rollout.n
    if not config.direction.train_on_trusted:
        return
    for trusted in config.validation.trusted_sets():
        if (trusted.n or rollout_n) != rollout_n:
            named = next((s for s in config.validation.sets if s.name == trusted.name and s.n), None)
            key = f"gradalign.validation.sets[{named.name}].n" if named else "gradalign.validation.n"
            why = (
                f"trusted groups are trained on (gradalign.direction.train_on_trusted), and groups of a batch have one "
                f"size, {rollout_n} (actor_rollout_ref.rollout.n)"
            )
            remedy = "leave it out, or set gradalign.direction.train_on_trusted=false"
            refuse(key, trusted.n, why, remedy)


def _check_coefficients_of_update(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """A response's derivative is its contribution divided by the coefficient that all its tokens have in the loss."""
    if not (config.measures_in_update and score_of(config.score).needs_response_derivatives):
        return
    actor, data = verl_config.actor_rollout_ref.actor, verl_config.data
    bypass, batch = "algorithm.rollout_correction.bypass_mode", int(data.train_batch_size)
    own = {"entropy_coeff": 0, "use_kl_loss": False, "ppo_mini_batch_size": batch}
    wanted = {f"actor_rollout_ref.actor.{name}": (actor.get(name), good) for name, good in own.items()}
    wanted[bypass] = (OmegaConf.select(verl_config, bypass), False)
    for key, (value, good) in wanted.items():
        is_whole_batch = key.endswith("ppo_mini_batch_size") and int(value) >= batch
        if value and value != good and not is_whole_batch:
            why = f"tokens of a response then differ in the loss, and score {config.score} needs one factor for each"
            refuse(key, value, why, f"set {key}={good}, or gradalign.score=dot")


def _check_filter_of_forecast(config: GradAlignConfig, verl_config: DictConfig) -> None:
    filters = verl_config.algorithm.get("filter_groups") or {}
    if config.is_forecast and filters.get("enable"):
        logger.warning(
            "algorithm.filter_groups.enable=True: groups that it leaves out are rolled out for nothing and never reach "
            "the forecast, which so does not learn where there is nothing to be learned. Without it dead groups are "
            "trained on (they change nothing), and avoided from then on"
        )


def _check_schedule_of_separate(config: GradAlignConfig, verl_config: DictConfig) -> None:
    if _is_separate(verl_config) and not config.is_forecast:
        why = (
            f"is refused under {MODE}={SEPARATE}: a step is cut into several updates, and a selection among candidates "
            "would have to be made ahead of each"
        )
        remedy = f"write +gradalign=forecast (score dot, or one of rewards alone), or set {MODE}={ANY_SCHEDULE}"
        refuse("gradalign.schedule", config.schedule, why, remedy)


def _check_measure_of_separate(config: GradAlignConfig, verl_config: DictConfig) -> None:
    is_before = config.is_forecast and not config.measures_in_update and score_of(config.score).needs_gradients
    if _is_separate(verl_config) and is_before:
        why = (
            f"is refused under {MODE}={SEPARATE}, which would need a pass of its own ahead of each of a step's updates"
        )
        score = " with gradalign.score=dot" if score_of(config.score).needs_norm else ""
        estimator = "" if config.estimator in OF_UPDATE else " and gradalign.estimator=low_rank"
        remedy = f"set gradalign.measure=update{score}{estimator}, or {MODE}={ANY_SCHEDULE}"
        refuse("gradalign.measure", "before", why, remedy)


def _check_trained_trusted_of_separate(config: GradAlignConfig, verl_config: DictConfig) -> None:
    if _is_separate(verl_config) and config.direction.train_on_trusted:
        why = (
            f"is refused under {MODE}={SEPARATE}: an update there is of one mini-batch "
            "(actor_rollout_ref.actor.ppo_mini_batch_size), which the step's picks fill"
        )
        refuse("gradalign.direction.train_on_trusted", True, why, f"set it to false, or {MODE}={ANY_SCHEDULE}")


def _check_stop_ahead(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Groups of the first steps are trained on before any trusted group is there, which is no failure."""
    is_ahead = verl_config.trainer.v1.trainer_mode in (ANY_SCHEDULE, SEPARATE)
    if is_ahead and config.is_forecast and config.direction.on_degenerate == "stop":
        why = "would end the run in its first step: while others are generated, the trusted groups finish later"
        refuse("gradalign.direction.on_degenerate", "stop", why, "set it to previous, or train synchronously")


def _is_separate(verl_config: DictConfig) -> bool:
    return bool(verl_config.trainer.v1.trainer_mode == SEPARATE)


VERL_CHECKS = (
    _check_size_of_trusted_groups,
    _check_coefficients_of_update,
    _check_filter_of_forecast,
    _check_schedule_of_separate,
    _check_measure_of_separate,
    _check_trained_trusted_of_separate,
    _check_stop_ahead,
)


def check_pool(config: GradAlignConfig, num_problems: int, batch_size: int) -> None:
    """Warn of a shortlist that is most of the pool: the best of all problems are alike, a batch of them has no variety.

    `num_problems` are in the train files.
    """
    num = min(num_problems, math.ceil(config.oversample * batch_size))
    is_choosing = config.is_forecast and config.forecast.floor < 1 and num > batch_size
    if is_choosing and 2 * num > num_problems:
        most = max(1.0, math.floor(50 * num_problems / batch_size) / 100)
        logger.warning(
            "gradalign.oversample=%g: a shortlist of %d is most of the %d problems of data.train_files, so every batch "
            "would be of the same few. Set gradalign.oversample=%g or less",
            config.oversample,
            num,
            num_problems,
            most,
        )


def check_num_trusted(config: GradAlignConfig, num_trusted: int, batch_size: int) -> None:
    """Raise ValueError if the trusted problems that are trained on leave no room in a batch for others."""
    direction, interval = config.direction, config.direction.refresh_interval or 1
    if not direction.train_on_trusted:
        return
    num = math.ceil(num_trusted * (1 - direction.audit) / interval)
    least = math.floor(num_trusted * (1 - direction.audit) / max(1, batch_size - 1)) + 1
    rule = f"of {num_trusted} trusted problems {num} are trained on in a step, and the batch is of {batch_size}"
    require(
        num < batch_size, "direction.refresh_interval", interval, rule, f"set it to {least} or more, or fewer problems"
    )
