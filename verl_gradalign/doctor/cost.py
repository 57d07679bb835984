# SPDX-License-Identifier: Apache-2.0
"""What a step of a composed configuration costs, against what the machine has."""

from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_gradalign.config import GradAlignConfig, ProbeConfig
from verl_gradalign.cost import Cost, ModelShape, Setting, estimate
from verl_gradalign.cost.passes import memory_of
from verl_gradalign.cost.tables import GPU_SHARE
from verl_gradalign.doctor.data import ExaminedData
from verl_gradalign.doctor.machine import Machine
from verl_gradalign.doctor.model import ExaminedModel
from verl_gradalign.findings import Findings
from verl_gradalign.integration.requests import token_budget
from verl_gradalign.selection.scores import score_of

AREA = "cost"
RESPONSE_SHARE = 0.5
"""Assumed mean length of a response, of data.max_response_length, where none is given."""


def examine_cost(
    config: GradAlignConfig,
    verl_config: DictConfig,
    model: ExaminedModel,
    data: ExaminedData,
    machine: Machine,
    findings: Findings,
    response_tokens: float | None = None,
) -> Cost | None:
    """Add findings on the cost of a step; return the cost, or None for adapters and unknown shapes."""
    if model.shape is None or model.has_adapters:
        if model.has_adapters:
            findings.add(AREA, "note", "the cost of training adapters is not estimated; see recipes/how_to/cost.md")
        return None
    setting = setting_of(config, verl_config, model.shape, data)
    assumed = f" (assumed: {setting.response_tokens:.0f} tokens a response; --response-tokens)"
    if response_tokens:
        setting, assumed = replace(setting, response_tokens=response_tokens), ""
    cost = estimate(setting)
    # Parameters may be sharded over fewer GPUs than there are.
    shards = int(OmegaConf.select(verl_config, "actor_rollout_ref.actor.fsdp_config.fsdp_size") or -1)
    if 0 < shards < setting.num_gpus:
        cost = replace(cost, memory=memory_of(replace(setting, num_gpus=shards)))
    text = (
        f"a mean step generates {cost.generated:,.0f} responses, {cost.ratios['rollout']:.2f} times those trained on, "
        f"and takes {cost.ratios['flops']:.2f} times the operations of a step without selection{assumed}"
    )
    findings.add(AREA, "note", text)
    for note in cost.notes:
        findings.add(AREA, "note", note)
    if score_of(config.score).direction in ("pool", "learnability") and config.probe.pool_dots == "exact":
        text = f"score {config.score} reads the candidates twice; the operations count them once"
        findings.add(AREA, "note", text, "gradalign.probe.pool_dots=sketch takes one pass")
    _memory(cost, verl_config, machine, findings)
    return cost


def setting_of(config: GradAlignConfig, verl_config: DictConfig, shape: ModelShape, data: ExaminedData) -> Setting:
    """Return the calculator's setting of a configuration. `once` and `staged` count as rounds of the whole run."""
    actor_rollout, data_config, trainer = verl_config.actor_rollout_ref, verl_config.data, verl_config.trainer
    actor, score, direction = actor_rollout.actor, score_of(config.score), config.direction
    curriculum, num_problems = config.curriculum, data.num_problems
    schedule: dict[str, Any] = {"schedule": "round", "oversample": config.oversample, "candidate_n": curriculum.n}
    if config.schedule == "step":
        schedule = {"oversample": 1.0 if score.rank is None else config.oversample}
    elif config.schedule == "round":
        schedule |= {"steps_per_round": curriculum.steps_per_round, "num_candidates": curriculum.num_candidates}
    else:
        num_selections = max(1, len(curriculum.stages)) if config.schedule == "staged" else 1
        steps = max(1, total_steps(verl_config, num_problems) // num_selections)
        schedule |= {"steps_per_round": steps, "num_candidates": num_problems}
    param_dtype = OmegaConf.select(actor, "fsdp_config.mixed_precision.param_dtype") or actor.fsdp_config.get("dtype")
    return Setting(
        shape=shape,
        num_gpus=trainer.n_gpus_per_node * trainer.nnodes,
        train_batch_size=data_config.train_batch_size,
        rollout_n=actor_rollout.rollout.n,
        prompt_tokens=data.mean_prompt_tokens or data_config.max_prompt_length / 2,
        response_tokens=RESPONSE_SHARE * data_config.max_response_length,
        max_prompt_tokens=data_config.max_prompt_length,
        max_response_tokens=data_config.max_response_length,
        trusted_problems=data.num_trusted,
        validation_n=max(1, round(data.trusted_responses / data.num_trusted)) if data.num_trusted else None,
        refresh_interval=direction.refresh_interval,
        estimator=config.estimator if score.needs_gradients else None,
        has_response_derivatives=score.needs_response_derivatives,
        low_rank=config.probe.rank,
        has_checkpointing=actor_rollout.model.enable_gradient_checkpointing,
        has_reference=bool(actor.use_kl_loss or verl_config.algorithm.use_kl_in_reward),
        ppo_epochs=actor.ppo_epochs,
        micro_batch_tokens=token_budget(ProbeConfig(), verl_config).max_tokens,
        max_tokens_per_rank=config.probe.max_tokens_per_rank,
        compute_bytes=4 if str(param_dtype) in ("fp32", "float32") else 2,
        is_direction_offloaded=direction.offload,
        is_direction_kept=direction.refresh_interval > 1 or direction.ema > 0 or direction.on_degenerate == "previous",
        **schedule,
    )


def total_steps(verl_config: DictConfig, num_problems: int) -> int:
    """Return the steps that verl trains: as asked, else the epochs' batches."""
    trainer, batch = verl_config.trainer, verl_config.data.train_batch_size
    return int(trainer.total_training_steps or trainer.total_epochs * (num_problems // batch))


def _memory(cost: Cost, verl_config: DictConfig, machine: Machine, findings: Findings) -> None:
    """Compare the highest point with a GPU, or all ranks' with the host's memory on a CPU."""
    memory, is_cpu = cost.memory, verl_config.trainer.device == "cpu"
    gb, plain_gb, host_gb = memory["peak"] / 1e9, memory["plain"] / 1e9, cost.host_bytes / 1e9
    has_gb = machine.gpu_gb if not is_cpu else machine.host_gb / verl_config.trainer.n_gpus_per_node
    of_what = "of this machine's free memory for each rank" if is_cpu else "of each GPU here"
    phases = {"the update": "update", "making the direction": "make_direction", "scoring": "score"}
    highest = max(phases, key=lambda phase: memory[phases[phase]])
    text = f"a rank needs about {gb:.3g} GB at its highest ({highest}), {plain_gb:.3g} GB without selection"
    if host_gb > GPU_SHARE * machine.host_gb > 0:
        remedy = "lower gradalign.oversample or gradalign.curriculum.num_candidates"
        findings.add(AREA, "warning", f"rollouts take about {host_gb:.3g} GB of the host's memory", remedy)
    if has_gb <= 0:
        findings.add(AREA, "note", f"{text}; no GPU is seen here to compare it with")
    elif gb <= GPU_SHARE * has_gb:
        findings.add(AREA, "ok", f"{text}, {of_what} {has_gb:.3g} GB")
    else:
        remedy = "more GPUs, smaller micro-batches (gradalign.probe.max_tokens_per_rank, ppo_max_token_len_per_gpu)"
        if plain_gb <= GPU_SHARE * has_gb:
            remedy += ", gradalign.direction.offload=true"
        findings.add(AREA, "warning", f"{text}, {of_what} {has_gb:.3g} GB", remedy)
