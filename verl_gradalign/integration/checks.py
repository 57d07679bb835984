# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a composed configuration and its data, found before any worker starts.

Every message names the key, its value and the remedy.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_gradalign.config import GradAlignConfig, TrustedSetConfig
from verl_gradalign.errors import refuse, require, require_all
from verl_gradalign.integration.advantages import asked, check_advantages, uses_critic
from verl_gradalign.integration.engine_checks import ENGINE_CHECKS
from verl_gradalign.integration.forecast_checks import CONFIG_CHECKS, VERL_CHECKS, check_num_trusted, check_pool
from verl_gradalign.integration.policy_loss import loss_mode_of, matching_modes
from verl_gradalign.integration.prompt_states import check_prompt_states
from verl_gradalign.integration.prompts import read_identities
from verl_gradalign.integration.requests import (
    IN_SEVERAL,
    OVERSIZED,
    fate_of_oversized,
    longest_problem,
    sequence_parallel,
    takes_sketch,
    token_budget,
)
from verl_gradalign.integration.rollout_correction import correction_of, differs_in_response
from verl_gradalign.integration.storage import check_storage
from verl_gradalign.integration.trainer_modes import OLD_TRAINER, OWN_MODES, SEPARATE, foreign_mode
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.selection.curriculum import check_schedule
from verl_gradalign.selection.scores import score_of

logger = logging.getLogger(__name__)

OF_LEARNABILITY = ("learnalign", "cosine_learnability")


def read_config(verl_config: DictConfig) -> GradAlignConfig:
    """Return the `gradalign` block, defaults filled in.

    Raises: ValueError for anything wrong with it, also if a regime stands before +gradalign=... on the command line: of
        two groups that set a key the later one wins, so the regime's schedule would be lost without a word.
    """
    block: Any = OmegaConf.select(verl_config, "gradalign")
    values: Any = {} if block is None else OmegaConf.to_container(block, resolve=True)
    regime = OmegaConf.select(verl_config, "regime")
    if regime is not None and values.get("regime") != regime:
        why = "its gradalign keys were overwritten by those of +gradalign=..."
        refuse("+regime", regime, why, "write +regime last")
    config = GradAlignConfig.from_mapping(values)
    check_score(config)
    return config


def check_score(config: GradAlignConfig) -> None:
    """Raise ValueError with all that keeps the score from being measured under the other keys."""
    require_all(partial(check, config) for check in SCORE_CHECKS)


def _check_trusted_set(config: GradAlignConfig) -> None:
    require(
        not score_of(config.score).needs_direction or bool(config.validation.trusted_sets()),
        "validation.files",
        list(config.validation.files),
        f"score {config.score} needs a trusted set",
        "set gradalign.validation.files=<trusted.parquet>, or gradalign.score=random to train without one",
    )


def _check_norms(config: GradAlignConfig) -> None:
    gives_norm = config.measures_in_update or ESTIMATORS[config.estimator].gives_norm  # else forecast_checks says it
    rule = f"score {config.score} needs gradient norms, which it does not give"
    remedy = "set gradalign.estimator=ghost or gradalign.score=dot"
    require(not score_of(config.score).needs_norm or gives_norm, "estimator", config.estimator, rule, remedy)


def _check_response_derivatives(config: GradAlignConfig) -> None:
    gives_them = ESTIMATORS[config.estimator].gives_response_derivative and config.probe.response_derivatives
    require(
        not score_of(config.score).needs_response_derivatives or gives_them,
        "estimator",
        config.estimator,
        f"score {config.score} needs each response's derivative, which is not given by it, or switched off",
        "set gradalign.estimator=ghost and gradalign.probe.response_derivatives=true, or gradalign.score=cosine",
    )


def _check_pool_dots(config: GradAlignConfig) -> None:
    require(
        not takes_sketch(config) or config.estimator == "ghost",
        "probe.pool_dots",
        config.probe.pool_dots,
        f"a sketch is taken by ghost's taps, not by {config.estimator}",
        "set gradalign.estimator=ghost, or gradalign.probe.pool_dots=exact",
    )


def _check_reliability(config: GradAlignConfig) -> None:
    score, least = score_of(config.score), config.reliability.min_reliability
    is_measured = score.is_split and score.rank is not None
    is_measured = is_measured if config.reliability.of == "scores" else score.needs_direction
    rule = f"the reliability of {config.reliability.of} is not known for score {config.score}"
    remedy = "set it to null, or use a score along a trusted direction"
    require(least is None or is_measured, "reliability.min_reliability", least, rule, remedy)


SCORE_CHECKS = (
    _check_trusted_set,
    _check_norms,
    _check_response_derivatives,
    _check_pool_dots,
    _check_reliability,
    *CONFIG_CHECKS,
)


def check_verl_config(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Raise ValueError with all that keeps selection from working, or from being exact, under this configuration."""
    require_all(partial(check, config, verl_config) for check in verl_checks(config))


def verl_checks(config: GradAlignConfig) -> tuple[Callable[[GradAlignConfig, DictConfig], None], ...]:
    """Return the checks of a verl configuration, in their order. Each raises ValueError for one thing, or warns."""
    checks = (
        _check_version,
        _check_num_responses,
        _check_failed_groups,
        _check_cached_rollouts,
        _check_filter,
        _check_mode,
        _check_reward_model,
        check_prompt_states,
        *VERL_CHECKS,
    )
    if not score_of(config.score).needs_gradients:
        return checks
    return (
        *checks,
        check_advantages,
        _check_advantages_of_tokens,
        _check_resampling,
        _check_group_size,
        _check_loss,
        _check_rollout_correction,
        _check_distillation,
        *ENGINE_CHECKS,
        _check_fused_kernels,
        _check_sequence_parallel,
        _check_optimizer,
        _check_budget,
    )


def _check_version(_: GradAlignConfig, verl_config: DictConfig) -> None:
    if not verl_config.trainer.get("use_v1", True):
        refuse("trainer.use_v1", False, OLD_TRAINER, "set trainer.use_v1=True")


def _check_num_responses(config: GradAlignConfig, verl_config: DictConfig) -> None:
    rollout_n = verl_config.actor_rollout_ref.rollout.n
    if (config.curriculum.n or rollout_n) < rollout_n:
        why = f"is less than the {rollout_n} responses that training takes (actor_rollout_ref.rollout.n)"
        refuse("gradalign.curriculum.n", config.curriculum.n, why, "leave it out, or set it to that or more")


def _check_failed_groups(_: GradAlignConfig, verl_config: DictConfig) -> None:
    if verl_config.trainer.v1.sampler.get("sync_refill_failed_groups"):
        why = "belongs to verl's own sampler; with this one failed groups are left out and counted"
        refuse("trainer.v1.sampler.sync_refill_failed_groups", True, why, "set it to False")


def _check_cached_rollouts(_: GradAlignConfig, verl_config: DictConfig) -> None:
    if OmegaConf.select(verl_config, "skip.rollout_tq.enable"):
        refuse("skip.rollout_tq.enable", True, "cached rollouts have no trusted groups", "set it to False")


def _check_filter(config: GradAlignConfig, verl_config: DictConfig) -> None:
    filters = (verl_config.algorithm.get("filter_groups") or {}).get("enable")
    if filters and config.schedule in ("once", "staged"):
        why = f"gradalign.schedule={config.schedule} scores all problems it may; none is left to replace a filtered one"
        remedy = "set it to False; gradalign.dead_groups=drop leaves groups without advantage out"
        refuse("algorithm.filter_groups.enable", True, why, remedy)


def _check_mode(config: GradAlignConfig, verl_config: DictConfig) -> None:
    mode = verl_config.trainer.v1.trainer_mode
    if mode not in OWN_MODES:
        refuse("trainer.v1.trainer_mode", mode, *foreign_mode(mode))
    if mode == "gradalign_colocate_async" and config.schedule not in ("step", "forecast"):
        why = "prompts are in flight before a selection is made, so kept problems could not be the next ones trained on"
        remedy = "set it to step, or train synchronously with trainer.v1.trainer_mode=gradalign"
        refuse("gradalign.schedule", config.schedule, f"under trainer.v1.trainer_mode={mode} {why}", remedy)


def _check_reward_model(_: GradAlignConfig, verl_config: DictConfig) -> None:
    mode, reward_model = verl_config.trainer.v1.trainer_mode, verl_config.reward.reward_model
    if mode in ("gradalign_colocate_async", SEPARATE) and reward_model.enable and not reward_model.enable_resource_pool:
        why = f"has not been shown to work with trainer.v1.trainer_mode={mode}"
        remedy = "set it to True, or trainer.v1.trainer_mode=gradalign"
        refuse("reward.reward_model.enable_resource_pool", False, why, remedy)


def _check_advantages_of_tokens(config: GradAlignConfig, verl_config: DictConfig) -> None:
    is_of_tokens = not asked(config, verl_config).is_of_each_response
    if is_of_tokens and score_of(config.score).needs_response_derivatives:
        why = f"tokens of one response have different advantages, and score {config.score} needs one for each"
        remedy = "set gradalign.advantage=centred to score with reward minus group mean"
        refuse("algorithm.adv_estimator", verl_config.algorithm.adv_estimator, why, remedy)
    if differs_in_response(verl_config) and score_of(config.score).needs_response_derivatives:
        correction = verl_config.algorithm.rollout_correction
        name = "rollout_is" if correction.get("rollout_is") == "token" else "rollout_rs"
        why = f"tokens of one response have different weights, and score {config.score} needs one for each"
        remedy = "correct by sequence, as rollout_is=sequence does, or use gradalign.score=cosine or dot"
        refuse(f"algorithm.rollout_correction.{name}", correction[name], why, remedy)


def _check_resampling(config: GradAlignConfig, verl_config: DictConfig) -> None:
    if verl_config.algorithm.get("use_pf_ppo") and uses_critic(config, verl_config):
        why = "training draws its rows anew, at random, when it computes advantages, so that scores would be of others"
        refuse("algorithm.use_pf_ppo", True, why, "set it to False, or gradalign.advantage=centred")


def _check_group_size(config: GradAlignConfig, verl_config: DictConfig) -> None:
    rollout_n = verl_config.actor_rollout_ref.rollout.n
    n_trusted = min((s.n or rollout_n for s in config.validation.trusted_sets()), default=rollout_n)
    why = None
    if config.score in OF_LEARNABILITY:
        why = f"score {config.score} multiplies by p(1-p), which is 0 of a single response"
    elif not asked(config, verl_config).is_of_one:
        why = "a group of one has no group-relative advantage"
    for key, n in (("actor_rollout_ref.rollout.n", rollout_n), ("gradalign.validation.n", n_trusted)):
        if n < 2 and why is not None:
            refuse(key, n, why, f"set {key}=8 or more")


def _check_loss(config: GradAlignConfig, verl_config: DictConfig) -> None:
    actor = verl_config.actor_rollout_ref.actor
    mode, modes, wanted = loss_mode_of(actor), matching_modes(verl_config), config.loss_agg_mode
    if wanted in modes or (wanted is None and modes):  # unnamed, scores take the loss's own (`loss_weights`)
        return
    key = "actor_rollout_ref.actor.policy_loss.loss_mode"
    if modes:
        why = f"weighs tokens as loss_agg_mode={modes[0]} does, and scores would weigh them as {wanted}"
        refuse(key, mode, why, f"set gradalign.loss_agg_mode={modes[0]}")
    if wanted is None:
        why = "its token weights are those of no loss_agg_mode (measured at the sampling policy)"
        refuse(key, mode, why, "name the weights to score with in gradalign.loss_agg_mode")
    logger.warning("%s=%s: scores weigh tokens by gradalign.loss_agg_mode=%s, training does not", key, mode, wanted)


def _check_rollout_correction(_: GradAlignConfig, verl_config: DictConfig) -> None:
    """In `bypass_mode` verl takes the rollout's log-probs for the old ones, and the ratio for 1 as we do."""
    algorithms = verl_config.algorithm.get("rollout_correction") or {}
    losses = OmegaConf.select(verl_config, "actor_rollout_ref.actor.policy_loss.rollout_correction") or {}
    is_read_by_loss = loss_mode_of(verl_config.actor_rollout_ref.actor) == "bypass_mode"
    for name in ("rollout_is", "rollout_rs"):
        if is_read_by_loss and losses.get(name):
            why = "the loss itself weighs or masks tokens while the policy moves, and scores do not"
            remedy = "set it to null, or use gradalign.score=random to train without selection"
            refuse(f"actor_rollout_ref.actor.policy_loss.rollout_correction.{name}", losses[name], why, remedy)
        if algorithms.get(name) and correction_of(verl_config) is None:
            logger.warning(
                "algorithm.rollout_correction.%s=%s has no effect in verl's v1 trainer, and none on scores: it wants "
                "algorithm.rollout_correction.bypass_mode=False and actor_rollout_ref.rollout.calculate_log_probs=True",
                name,
                algorithms[name],
            )


def _check_distillation(_: GradAlignConfig, verl_config: DictConfig) -> None:
    key = "distillation.distillation_loss.use_task_rewards"
    if OmegaConf.select(verl_config, "distillation.enabled") and not OmegaConf.select(verl_config, key):
        why = "training follows a teacher and no reward, while scores are of the reward's gradient"
        refuse(key, False, why, "set it to True, or gradalign.score=random to train without selection")


def _check_fused_kernels(config: GradAlignConfig, verl_config: DictConfig) -> None:
    model = verl_config.actor_rollout_ref.model
    if config.measures_in_update and model.get("use_fused_kernels") and not model.get("lora_rank"):
        why = "has the update read the output layer's weight without calling it, so that its part cannot be measured"
        refuse("actor_rollout_ref.model.use_fused_kernels", True, why, f"set it to False{_or_before(verl_config)}")


def _check_sequence_parallel(config: GradAlignConfig, verl_config: DictConfig) -> None:
    key, num_ranks = sequence_parallel(verl_config)
    if num_ranks > 1 and config.measures_in_update:
        why = "gives ranks slices of rows, which are not put together where the update measures"
        refuse(key, num_ranks, why, f"set it to 1{_or_before(verl_config)}")
    if num_ranks > 1 and takes_sketch(config):
        why = "gives ranks slices of rows, of which no sketch is put together"
        refuse(key, num_ranks, why, "set it to 1, or gradalign.probe.pool_dots=exact")


def _or_before(verl_config: DictConfig) -> str:
    """Return the other remedy for what an update cannot measure, where there is one."""
    return "" if verl_config.trainer.v1.trainer_mode == SEPARATE else ", or gradalign.measure=before"


def _check_optimizer(config: GradAlignConfig, verl_config: DictConfig) -> None:
    optimizer = str(verl_config.actor_rollout_ref.actor.optim.get("optimizer", "AdamW"))
    if config.direction.metric == "adam" and "adam" not in optimizer.lower():
        why = f"actor.optim.optimizer={optimizer} keeps no second moments"
        refuse("gradalign.direction.metric", "adam", why, "set it to none, or train with AdamW")


def _check_budget(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Warn of problems that do not fit a micro-batch.

    Raises: ValueError if one response alone may be larger than the probe's own budget.
    """
    if config.measures_in_update or not ESTIMATORS[config.estimator].needs_whole_problems:
        return
    budget, fate = token_budget(config.probe, verl_config), fate_of_oversized(config)
    longest, row = longest_problem(config, verl_config)
    if row > budget.max_tokens and config.probe.max_tokens_per_rank is not None and fate in IN_SEVERAL:
        why = f"a response with its prompt may take {row} tokens, and a micro-batch holds {budget.max_tokens}"
        refuse("gradalign.probe.max_tokens_per_rank", config.probe.max_tokens_per_rank, why, f"set it to {row} or more")
    if longest > budget.max_tokens:
        logger.warning(
            "a problem may take %d positions, more than the %d of a micro-batch; such problems %s. Raise "
            "gradalign.probe.max_tokens_per_rank if memory allows",
            longest,
            budget.max_tokens,
            OVERSIZED[fate],
        )


def check_data(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Raise ValueError if the data cannot be read, are too few for the schedule, or trusted problems are trained on."""
    score, data = score_of(config.score), verl_config.data
    if score.rank is None and config.schedule == "step":
        return
    trusted_sets = config.validation.trusted_sets() if score.needs_direction else ()
    keys = {s.name: _files_key(s, config) for s in trusted_sets}
    trusted = {s.name: read_identities(keys[s.name], s.files, data) for s in trusted_sets}
    files = data.train_files
    train = read_identities("data.train_files", [files] if isinstance(files, str) else files, data)
    if train is None:
        return
    limit = data.get("train_max_samples", -1)
    num_problems = len(train) if limit is None or limit < 0 else min(len(train), limit)
    check_schedule(config, num_problems, data.train_batch_size, chooses=score.rank is not None)
    check_pool(config, num_problems, data.train_batch_size)
    check_num_trusted(config, sum(len(trusted[s.name] or ()) for s in trusted_sets), data.train_batch_size)
    rollout_n = verl_config.actor_rollout_ref.rollout.n
    num_trusted = sum(len(trusted[s.name] or ()) * (s.n or rollout_n) for s in trusted_sets)
    check_storage(config, verl_config, num_problems, num_trusted)
    train_set = set(train)
    for trusted_set in trusted_sets:
        problems = trusted[trusted_set.name]
        shared = set(problems or ()) & train_set
        if problems and shared:
            why = (
                f"{len(shared)} of its {len(problems)} problems also stand in data.train_files, for instance "
                f"{min(shared).splitlines()[0][:80]!r}; the direction would be measured on problems that are trained on"
            )
            refuse(keys[trusted_set.name], list(trusted_set.files), why, "remove them from one of the two")


def _files_key(trusted_set: TrustedSetConfig, config: GradAlignConfig) -> str:
    """Return the key that names the set's files."""
    return f"gradalign.validation.{'files' if config.validation.files else f'sets[{trusted_set.name}].files'}"
