# SPDX-License-Identifier: Apache-2.0
"""Whether the estimator can score the model: built without memory, from its config alone. Nothing is downloaded but
that, and no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.cost import ModelShape
from verl_gradalign.findings import Findings
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout

__all__ = ["ExaminedModel", "examine_model"]

AREA = "model"
DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExaminedModel:
    """What is known of the model."""

    num_parameters: int
    num_trainable: int
    shape: ModelShape | None
    """None: its cost is not known."""

    @property
    def has_adapters(self) -> bool:
        return self.num_trainable < self.num_parameters


def examine_model(config: GradAlignConfig, verl_config: DictConfig, scores: bool, findings: Findings) -> Any:
    """Add findings on the model; return an `ExaminedModel`, or None if it cannot be built.

    `scores`: whether the score needs gradients, so that the estimator must know every layer.
    """
    model = verl_config.actor_rollout_ref.model
    try:
        hf_config = _hf_config(model)
        module = _without_memory(hf_config, verl_config)
    except Exception as error:
        findings.refusal(
            AREA,
            ValueError(f"actor_rollout_ref.model.path={model.path}: cannot be built ({type(error).__name__}: {error})"),
            "give the folder of a causal language model, or a hub id that can be reached or is cached",
        )
        return None
    if scores:
        with findings.refusals(AREA):
            require_no_dropout(module)
        with findings.refusals(AREA, "set gradalign.estimator=backward"):
            ESTIMATORS[config.estimator](config.probe).check(module)
            findings.add(AREA, "ok", f"{type(module).__name__} can be scored with estimator {config.estimator}")
    examined = ExaminedModel(
        num_parameters=sum(p.numel() for p in module.parameters()),
        num_trainable=sum(p.numel() for p in module.parameters() if p.requires_grad),
        shape=None,
    )
    shape = _shape(hf_config, examined, findings)
    trained = f", {examined.num_trainable / 1e6:.3g} M of them trained" if examined.has_adapters else ""
    findings.add(AREA, "note", f"{model.path}: {examined.num_parameters / 1e9:.3g} B parameters{trained}")
    return ExaminedModel(examined.num_parameters, examined.num_trainable, shape)


def _hf_config(model: DictConfig) -> Any:
    """Return the model's config with verl's overrides of it."""
    config = AutoConfig.from_pretrained(
        str(model.get("hf_config_path") or model.path), trust_remote_code=model.trust_remote_code
    )
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


def _shape(hf_config: Any, examined: ExaminedModel, findings: Findings) -> ModelShape | None:
    text: Any = hf_config.get_text_config()
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    values = text.to_dict() | {key: getattr(text, key, None) for key in keys}
    try:
        shape = ModelShape.from_hf_config(values)
    except ValueError as error:
        findings.add(AREA, "note", f"the cost of a step is not estimated: {error}")
        return None
    return ModelShape(**{**vars(shape), "exact_parameters": examined.num_parameters})
