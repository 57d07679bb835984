# SPDX-License-Identifier: Apache-2.0
"""Whether the estimator can score the model: built on the meta device from its config alone, without any weight."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.cost.setting import HF_KEYS, ModelShape
from verl_gradalign.findings import Findings
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout
from verl_gradalign.selection.scores import score_of

AREA = "model"
DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


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
