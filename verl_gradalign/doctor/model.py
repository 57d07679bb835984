# SPDX-License-Identifier: Apache-2.0
"""The model, built from its config on the meta device: whether the estimator scores it, and what a step costs here."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from verl_gradalign.config import GradAlignConfig, ProbeConfig
from verl_gradalign.cost.estimate import Cost, estimate, memory_of
from verl_gradalign.cost.setting import HF_KEYS, ModelShape, Setting
from verl_gradalign.cost.tables import GPU_SHARE
from verl_gradalign.doctor.data import ExaminedData
from verl_gradalign.doctor.machine import Machine
from verl_gradalign.findings import Findings
from verl_gradalign.integration.requests import token_budget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout
from verl_gradalign.selection.scores import score_of

AREA, COST = "model", "cost"
DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}
RESPONSE_SHARE = 0.5
"""Assumed mean length of a response, of data.max_response_length, where none is given."""


class ExaminedModel(NamedTuple):
    """What the cost is computed from."""

    shape: ModelShape | None
    """None: its cost is not known."""
    has_adapters: bool


def examine_model(config: GradAlignConfig, verl_config: DictConfig, findings: Findings) -> ExaminedModel | None:
    """Add findings on the model; return what is known of it, or None if it cannot be built."""
    path = verl_config.actor_rollout_ref.model.path
    try:
        hf_config = _hf_config(verl_config.actor_rollout_ref.model)
        module = _without_memory(hf_config, verl_config)
    except Exception as error:
        text = f"actor_rollout_ref.model.path={path}: cannot be built ({type(error).__name__}: {error})"
        remedy = "give the folder of a causal language model, or a hub id that can be reached or is cached"
        findings.refusal(AREA, ValueError(text), remedy)
        return None
    if score_of(config.score).needs_gradients:  # so that the estimator must know every layer
        with findings.refusals(AREA):
            require_no_dropout(module)
        with findings.refusals(AREA, "set gradalign.estimator=backward"):
            ESTIMATORS[config.estimator](config.probe).check(module)
            findings.add(AREA, "ok", f"{type(module).__name__} can be scored with estimator {config.estimator}")
    num_parameters = sum(p.numel() for p in module.parameters())
    num_trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    shape = _shape(hf_config, num_parameters, findings)
    trained = f", {num_trained / 1e6:.3g} M of them trained" if num_trained < num_parameters else ""
    findings.add(AREA, "note", f"{path}: {num_parameters / 1e9:.3g} B parameters{trained}")
    return ExaminedModel(shape, has_adapters=num_trained < num_parameters)


def _hf_config(model: DictConfig) -> Any:
    """Return the model's config with verl's overrides of it."""
    path = str(model.get("hf_config_path") or model.path)
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    overrides: Any = OmegaConf.to_container(OmegaConf.create(model.override_config), resolve=True)
    for key, value in overrides.items():
        if key != "attn_implementation" and not isinstance(value, dict):
            setattr(config, key, value)
    return config


def _without_memory(hf_config: Any, verl_config: DictConfig) -> nn.Module:
    """Return the module as verl trains it, parameters on the meta device."""
    model = verl_config.actor_rollout_ref.model
    dtype = DTYPES[str(verl_config.actor_rollout_ref.actor.fsdp_config.get("model_dtype") or "fp32")]
    with torch.device("meta"):
        # Attention has no parameters, and the machine that asks may lack the kernels of the one that trains.
        module: nn.Module = AutoModelForCausalLM.from_config(
            hf_config, attn_implementation="eager", dtype=dtype, trust_remote_code=model.trust_remote_code
        )
        if model.lora_rank > 0:
            from peft import LoraConfig, TaskType, get_peft_model

            targets: Any = model.target_modules
            adapters = LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=model.lora_rank,
                lora_alpha=model.lora_alpha,
                target_modules=targets if isinstance(targets, str) else list(targets),
            )
            module = get_peft_model(module, adapters)
    return module


def _shape(hf_config: Any, num_parameters: int, findings: Findings) -> ModelShape | None:
    text: Any = hf_config.get_text_config()
    try:
        shape = ModelShape.from_hf_config(text.to_dict() | {key: getattr(text, key, None) for key in HF_KEYS.values()})
    except ValueError as error:
        findings.add(AREA, "note", f"the cost of a step is not estimated: {error}")
        return None
    return replace(shape, exact_parameters=num_parameters)


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
            findings.add(COST, "note", "the cost of training adapters is not estimated; see recipes/how_to/cost.md")
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
    findings.add(COST, "note", text)
    for note in cost.notes:
        findings.add(COST, "note", note)
    if score_of(config.score).direction in ("pool", "learnability") and config.probe.pool_dots == "exact":
        text = f"score {config.score} reads the candidates twice; the operations count them once"
        findings.add(COST, "note", text, "gradalign.probe.pool_dots=sketch takes one pass")
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
        findings.add(COST, "warning", f"rollouts take about {host_gb:.3g} GB of the host's memory", remedy)
    if has_gb <= 0:
        findings.add(COST, "note", f"{text}; no GPU is seen here to compare it with")
    elif gb <= GPU_SHARE * has_gb:
        findings.add(COST, "ok", f"{text}, {of_what} {has_gb:.3g} GB")
    else:
        remedy = "more GPUs, smaller micro-batches (gradalign.probe.max_tokens_per_rank, ppo_max_token_len_per_gpu)"
        if plain_gb <= GPU_SHARE * has_gb:
            remedy += ", gradalign.direction.offload=true"
        findings.add(COST, "warning", f"{text}, {of_what} {has_gb:.3g} GB", remedy)
