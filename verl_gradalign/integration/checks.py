# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a composed configuration and its data, found before any worker starts.

Every message names the key, its value and the remedy.
"""

import logging
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse, require
from verl_gradalign.integration.prompts import read_identities
from verl_gradalign.integration.requests import token_budget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.selection.curriculum import check_schedule
from verl_gradalign.selection.scores import score_of

logger = logging.getLogger(__name__)

# Estimators of verl whose advantages follow from rewards and groups alone, which is all there is at selection.
REWARD_ONLY_ADVANTAGES = (
    "grpo",
    "grpo_vectorized",
    "rloo",
    "rloo_vectorized",
    "opo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
)
ENGINES = ("fsdp", "fsdp2")


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
    """Refuse a score that the other keys do not allow to be measured."""
    score, estimator = score_of(config.score), ESTIMATORS[config.estimator]
    require(
        not score.needs_direction or bool(config.validation.trusted_sets()),
        "validation.files",
        list(config.validation.files),
        f"score {config.score} needs a trusted set",
        "set gradalign.validation.files=<trusted.parquet>, or gradalign.score=random to train without one",
    )
    rule = f"score {config.score} needs gradient norms, which it does not give"
    remedy = "set gradalign.estimator=ghost or gradalign.score=dot"
    require(not score.needs_norm or estimator.gives_norm, "estimator", config.estimator, rule, remedy)
    require(
        not score.needs_response_derivatives
        or (estimator.gives_response_derivative and config.probe.response_derivatives),
        "estimator",
        config.estimator,
        f"score {config.score} needs each response's derivative, which is not given by it, or switched off",
        "set gradalign.estimator=ghost and gradalign.probe.response_derivatives=true, or gradalign.score=cosine",
    )
    is_of_pool = score.direction in ("pool", "learnability")
    require(
        not is_of_pool or config.probe.pool_dots == "exact" or config.estimator == "ghost",
        "probe.pool_dots",
        config.probe.pool_dots,
        f"a sketch is taken by ghost's taps, not by {config.estimator}",
        "set gradalign.estimator=ghost, or gradalign.probe.pool_dots=exact",
    )
    least = config.reliability.min_reliability
    is_measured = score.is_split and score.rank is not None
    is_measured = is_measured if config.reliability.of == "scores" else score.needs_direction
    rule = f"the reliability of {config.reliability.of} is not known for score {config.score}"
    remedy = "set it to null, or use a score along a trusted direction"
    require(least is None or is_measured, "reliability.min_reliability", least, rule, remedy)


def check_verl_config(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Raise ValueError if selection cannot work, or cannot be exact, under this verl configuration."""
    for check in verl_checks(config):
        check(config, verl_config)


def verl_checks(config: GradAlignConfig) -> tuple[Callable[[GradAlignConfig, DictConfig], None], ...]:
    """Return the checks of a verl configuration, each of which raises ValueError, in their order."""
    if score_of(config.score).needs_gradients:
        return _check_batch, _check_mode, _check_algorithm, _check_actor, _check_estimator
    return _check_batch, _check_mode


def _check_batch(config: GradAlignConfig, verl_config: DictConfig) -> None:
    rollout_n = verl_config.actor_rollout_ref.rollout.n
    if (config.curriculum.n or rollout_n) < rollout_n:
        why = f"is less than the {rollout_n} responses that training takes (actor_rollout_ref.rollout.n)"
        refuse("gradalign.curriculum.n", config.curriculum.n, why, "leave it out, or set it to that or more")
    if verl_config.trainer.v1.sampler.get("sync_refill_failed_groups"):
        why = "belongs to verl's own sampler; with this one failed groups are left out and counted"
        refuse("trainer.v1.sampler.sync_refill_failed_groups", True, why, "set it to False")
    if OmegaConf.select(verl_config, "skip.rollout_tq.enable"):
        refuse("skip.rollout_tq.enable", True, "cached rollouts have no trusted groups", "set it to False")
    filters = (verl_config.algorithm.get("filter_groups") or {}).get("enable")
    if filters and config.schedule not in ("step", "round"):
        why = f"gradalign.schedule={config.schedule} scores all problems it may; none is left to replace a filtered one"
        remedy = "set it to False; gradalign.dead_groups=drop leaves groups without advantage out"
        refuse("algorithm.filter_groups.enable", True, why, remedy)


def _check_mode(config: GradAlignConfig, verl_config: DictConfig) -> None:
    mode = verl_config.trainer.v1.trainer_mode
    if mode != "gradalign" and config.schedule != "step":
        why = "prompts are in flight before a selection is made, so kept problems could not be the next ones trained on"
        remedy = "set it to step, or train synchronously with trainer.v1.trainer_mode=gradalign"
        refuse("gradalign.schedule", config.schedule, f"under trainer.v1.trainer_mode={mode} {why}", remedy)
    reward_model = verl_config.reward.reward_model
    if mode != "gradalign" and reward_model.enable and not reward_model.enable_resource_pool:
        why = f"has not been shown to work with trainer.v1.trainer_mode={mode}"
        remedy = "set it to True, or trainer.v1.trainer_mode=gradalign"
        refuse("reward.reward_model.enable_resource_pool", False, why, remedy)


def _check_algorithm(config: GradAlignConfig, verl_config: DictConfig) -> None:
    algorithm, rollout = verl_config.algorithm, verl_config.actor_rollout_ref.rollout
    centred = "set gradalign.advantage=centred to score with reward minus group mean"
    if config.advantage == "trainer":
        is_gae = algorithm.adv_estimator == "gae"
        if not is_gae and algorithm.adv_estimator not in REWARD_ONLY_ADVANTAGES:
            why = "its advantages are not known when groups are selected"
            refuse("algorithm.adv_estimator", algorithm.adv_estimator, why, centred)
        if is_gae and score_of(config.score).needs_response_derivatives:
            why = f"tokens of one response have different advantages, and score {config.score} needs one for each"
            refuse("algorithm.adv_estimator", "gae", why, centred)
        if algorithm.use_kl_in_reward:
            why = "advantages with the KL penalty are not known when groups are selected"
            refuse("algorithm.use_kl_in_reward", True, why, centred)
    groupwise = config.advantage == "centred" or algorithm.adv_estimator not in ("gae", "reinforce_plus_plus")
    n_trusted = min((s.n or rollout.n for s in config.validation.trusted_sets()), default=rollout.n)
    for key, n in (("actor_rollout_ref.rollout.n", rollout.n), ("gradalign.validation.n", n_trusted)):
        if groupwise and n < 2:
            refuse(key, n, "a group of one has no group-relative advantage", f"set {key}=8 or more")
    loss_mode = OmegaConf.select(verl_config, "actor_rollout_ref.actor.policy_loss.loss_mode", default="vanilla")
    if loss_mode != "vanilla" and config.loss_agg_mode is None:
        why = "its token weights are not those of loss_agg_mode"
        remedy = "name the weights to score with in gradalign.loss_agg_mode"
        refuse("actor_rollout_ref.actor.policy_loss.loss_mode", loss_mode, why, remedy)


def _check_actor(_: GradAlignConfig, verl_config: DictConfig) -> None:
    actor, model = verl_config.actor_rollout_ref.actor, verl_config.actor_rollout_ref.model
    if actor.strategy not in ENGINES:
        why = f"the estimators read gradients of {' and '.join(ENGINES)} only"
        refuse("actor_rollout_ref.actor.strategy", actor.strategy, why, "set it to fsdp2")
    num_ranks = verl_config.trainer.n_gpus_per_node * verl_config.trainer.nnodes
    if actor.strategy == "fsdp" and actor.fsdp_config.get("fsdp_size", -1) == 1 and num_ranks > 1:
        why = f"torch's FSDP1 never reduces gradients over the {num_ranks} replicas then, so ranks train apart"
        remedy = "set actor_rollout_ref.actor.strategy=fsdp2, or fsdp_size=-1"
        refuse("actor_rollout_ref.actor.fsdp_config.fsdp_size", 1, why, remedy)
    if model.get("use_fused_kernels"):
        why = "the estimators have not been shown to be exact with fused kernels"
        refuse("actor_rollout_ref.model.use_fused_kernels", True, why, "set it to False")
    for key in ("ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size"):
        ranks_per_sequence = OmegaConf.select(actor, key) or 1
        if ranks_per_sequence > 1:
            why = "the estimators have not been shown to be exact with sequence parallelism"
            refuse(f"actor_rollout_ref.actor.{key}", ranks_per_sequence, why, "set it to 1")


def _check_estimator(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """What the model itself allows is checked by the worker (`gradalign_check`), once it is built."""
    actor = verl_config.actor_rollout_ref.actor
    optimizer = str(actor.optim.get("optimizer", "AdamW"))
    if config.direction.metric == "adam" and "adam" not in optimizer.lower():
        why = f"actor.optim.optimizer={optimizer} keeps no second moments"
        refuse("gradalign.direction.metric", "adam", why, "set it to none, or train with AdamW")
    model_dtype = actor.fsdp_config.get("model_dtype", "fp32")
    if config.estimator == "finite_difference" and model_dtype not in ("fp32", "float32"):
        why = "a small step is lost to rounding in parameters stored in half precision"
        remedy = "set it to fp32, or set gradalign.estimator=ghost"
        refuse("actor_rollout_ref.actor.fsdp_config.model_dtype", model_dtype, why, remedy)
    budget = token_budget(config.probe, verl_config)
    data, num_rows = verl_config.data, config.curriculum.n or verl_config.actor_rollout_ref.rollout.n
    longest = num_rows * (data.max_prompt_length + data.max_response_length)
    if ESTIMATORS[config.estimator].needs_whole_problems and longest > budget.max_tokens:
        logger.warning(
            "a problem may take %d positions, more than the %d of a micro-batch; such problems %s. Raise "
            "gradalign.probe.max_tokens_per_rank if memory allows",
            longest,
            budget.max_tokens,
            "are scored one at a time" if config.probe.oversized == "backward" else "will stop the run",
        )


def check_data(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Raise ValueError if the data cannot be read, are too few for the schedule, or trusted problems are trained on."""
    score, data = score_of(config.score), verl_config.data
    if score.rank is None and config.schedule == "step":
        return
    trusted_sets = config.validation.trusted_sets() if score.needs_direction else ()
    trusted = {}
    for trusted_set in trusted_sets:
        name = "files" if config.validation.files else f"sets[{trusted_set.name}].files"
        key = f"gradalign.validation.{name}"
        trusted[key] = (trusted_set.files, read_identities(key, trusted_set.files, data))
    files = data.train_files
    train = read_identities("data.train_files", [files] if isinstance(files, str) else files, data)
    if train is None:
        return
    limit = data.get("train_max_samples", -1)
    num_problems = len(train) if limit is None or limit < 0 else min(len(train), limit)
    check_schedule(config, num_problems, data.train_batch_size, chooses=score.rank is not None)
    for key, (names, prompts) in trusted.items():
        shared = set(prompts or ()) & set(train)
        if prompts and shared:
            why = (
                f"{len(shared)} of its {len(prompts)} problems also stand in data.train_files, for instance "
                f"{min(shared).splitlines()[0][:80]!r}; the direction would be measured on problems that are trained on"
            )
            refuse(key, list(names), why, "remove them from one of the two")
