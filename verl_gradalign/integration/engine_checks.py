# SPDX-License-Identifier: Apache-2.0
"""Which engine trains the actor, and whether gradients can be read from it as it is configured.

verl's FSDP engine gives all that estimators ask for. Others that keep their parameters as FSDP2 does give gradients and
log-probs of rows (`VerlEngine.backward`, `row_sums`), which `backward`, `finite_difference` and directions are made of.
"""

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse

ACTOR = "actor_rollout_ref.actor"
FSDP = ("fsdp", "fsdp2")
BLOCKS = {
    **dict.fromkeys((*FSDP, "fsdp_turbo"), "fsdp_config"),
    **{name: name for name in ("veomni", "torchtitan", "automodel")},
}
"""Strategy -> the block of the actor that its engine is configured by."""
OF_PASSES_ALONE = ("backward", "finite_difference")
"""Estimators that ask an engine for no more than its passes."""
GRADIENT_FREE = ("accuracy_greedy", "accuracy_band", "random")
"""Scores that ask nothing of the actor."""
IS_PARALLEL = re.compile(
    r"(^|_)(tensor|pipeline|context|expert|expert_tensor|ulysses|sequence|ulysses_sequence|tp|pp|cp|ep|sp)(_parallel)?_size$"
)
"""Keys by which engines cut rows, layers or experts otherwise than over data-parallel ranks."""


def _check_engine(config: GradAlignConfig, verl_config: DictConfig) -> None:
    actor = verl_config.actor_rollout_ref.actor
    strategy = actor.strategy
    if BLOCKS.get(strategy, "") in actor:
        if strategy not in FSDP:
            _check_passes_alone(config, strategy)
        return
    # Each engine has an actor block of its own; the strategy alone does not make another's of it.
    why = f"gradients are read from {', '.join(BLOCKS)} only"
    engine = strategy
    if strategy in BLOCKS:
        engine = verl_config.model_engine
        why = f"is that of another engine than the actor block's ({engine}), and {why}"
    remedy = (
        f"use a score that works on every engine (gradalign.score={' or '.join(GRADIENT_FREE)}), or train on FSDP: "
        f"model_engine=dp with actor_rollout_ref.actor.strategy=fsdp2, without the overrides of {engine}'s own keys"
    )
    refuse(f"{ACTOR}.strategy", strategy, why, remedy)


def _check_passes_alone(config: GradAlignConfig, strategy: str) -> None:
    backward = "set gradalign.estimator=backward, or train on FSDP (model_engine=dp)"
    if config.measures_in_update:
        why = f"layers are read while the update runs, which is shown right on FSDP only, not on {strategy}"
        refuse("gradalign.measure", config.measure, why, f"set gradalign.measure=before; {backward}")
    if config.estimator not in OF_PASSES_ALONE:
        why = f"it reads single layers of the model, which is shown right on FSDP only, not on {strategy}"
        refuse("gradalign.estimator", config.estimator, why, backward)
    if config.direction.metric == "adam":
        why = f"second moments are read from FSDP's optimizer only, not from {strategy}'s"
        refuse("gradalign.direction.metric", "adam", why, "set it to none or candidates")


def _check_other_engine(_: GradAlignConfig, verl_config: DictConfig) -> None:
    """What those engines have beside data parallelism has not been shown to give the gradient that is trained on."""
    actor_rollout = verl_config.actor_rollout_ref
    strategy = actor_rollout.actor.strategy
    if strategy in FSDP or BLOCKS.get(strategy, "") not in actor_rollout.actor:
        return
    block = BLOCKS[strategy]
    for key, size in _parallel_sizes(actor_rollout.actor):
        why = f"on {strategy} it has not been shown that scores are of the gradient that is trained on"
        refuse(f"{ACTOR}.{key}", size, why, "set it to 1")
    if (actor_rollout.model.get("lora_rank") or 0) > 0:
        why = f"gradients of adapters are read from FSDP only, not from {strategy}"
        refuse("actor_rollout_ref.model.lora_rank", actor_rollout.model.lora_rank, why, "set it to 0")
    values: dict[str, tuple[Any, tuple[Any, ...], str, str]] = {
        # torchtitan adds gradients up over replicas where nothing is sharded, and verl corrects that for shards only.
        "torchtitan.data_parallel_replicate_size": (1, (1,), "scales gradients otherwise", "set it to 1"),
        "automodel.distributed_strategy": ("fsdp2", ("fsdp2",), "keeps gradients elsewhere", "set it to fsdp2"),
        "automodel.enable_fp8": (False, (False,), "rounds gradients to 8 bits", "set it to False"),
        "veomni.router_replay.mode": ("disabled", ("disabled",), "has the update replay routes", "set it to disabled"),
    }
    for key, (default, allowed, why, remedy) in values.items():
        value = OmegaConf.select(actor_rollout.actor, key)
        if key.startswith(f"{block}.") and (default if value is None else value) not in allowed:
            refuse(f"{ACTOR}.{key}", value, f"it {why}, which scores would not follow", remedy)


def _parallel_sizes(actor: DictConfig) -> Iterator[tuple[str, int]]:
    """Yield the sizes above 1 of what cuts rows, layers or experts, by their keys below the actor."""
    block = BLOCKS[actor.strategy]
    settings: Any = OmegaConf.to_container(OmegaConf.create({block: actor[block]}), resolve=False)
    for key in ("ulysses_sequence_parallel_size", *_leaves(settings)):
        size = OmegaConf.select(actor, key)
        if IS_PARALLEL.search(key.rpartition(".")[2]) and isinstance(size, int) and size > 1:
            yield key, size


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _check_replicas(_: GradAlignConfig, verl_config: DictConfig) -> None:
    actor = verl_config.actor_rollout_ref.actor
    num_ranks = verl_config.trainer.n_gpus_per_node * verl_config.trainer.nnodes
    if actor.strategy == "fsdp" and OmegaConf.select(actor, "fsdp_config.fsdp_size") == 1 and num_ranks > 1:
        why = f"torch's FSDP1 never reduces gradients over the {num_ranks} replicas then, so ranks train apart"
        remedy = "set actor_rollout_ref.actor.strategy=fsdp2, or fsdp_size=-1"
        refuse(f"{ACTOR}.fsdp_config.fsdp_size", 1, why, remedy)


def _check_model_dtype(config: GradAlignConfig, verl_config: DictConfig) -> None:
    if config.estimator != "finite_difference":
        return
    actor = verl_config.actor_rollout_ref.actor
    why = "a small step is lost to rounding in parameters stored in half precision"
    for key in ("fsdp_config.model_dtype", "automodel.model_dtype"):
        model_dtype = OmegaConf.select(actor, key) or "fp32"
        if model_dtype not in ("fp32", "float32"):
            remedy = f"set it to fp32, or set gradalign.estimator={'ghost' if actor.strategy in FSDP else 'backward'}"
            refuse(f"{ACTOR}.{key}", model_dtype, why, remedy)
    if OmegaConf.select(actor, "veomni.mixed_precision") is False:  # verl then loads the model in bf16
        refuse(f"{ACTOR}.veomni.mixed_precision", False, why, "set it to True, or gradalign.estimator=backward")


ENGINE_CHECKS = (_check_engine, _check_other_engine, _check_replicas, _check_model_dtype)
