# SPDX-License-Identifier: Apache-2.0
"""Tiny float64 models of every kind that the exactness tests cover, by name, made in memory.

model = make_model("qwen2-tied")
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.numerics.problems import VOCABULARY, make_float64

PADDING_TOKEN = 7
"""padding_idx of the models that have one; `cases.CANDIDATES` contain it."""
WIDTHS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}


def qwen2(**options: object) -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**{**WIDTHS, **GROUPED, **options}))


def qwen3(**options: object) -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**WIDTHS, **GROUPED, **options))


def llama(**options: object) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, **GROUPED, **options))


def mixture_of_experts(has_checkpointing: bool = False, implementation: str = "eager") -> nn.Module:
    """Return a model of experts, which transformers keeps in bare parameters, finished as by `make_model`."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
    # The grouped product of the default has no float64.
    experts["experts_implementation"] = implementation
    return finished(Qwen3MoeForCausalLM(Qwen3MoeConfig(**WIDTHS, **GROUPED, **experts)), has_checkpointing)


def neox() -> nn.Module:
    """LayerNorm with bias, and a bias in every linear layer."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**WIDTHS, hidden_dropout=0.0, attention_dropout=0.0))


def gpt2() -> nn.Module:
    """Layers of transformers' own (Conv1D), which no built-in rule covers; its position embedding is frozen."""
    names = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**names, **dropout, bos_token_id=None, eos_token_id=None))
    model.transformer.wpe.weight.requires_grad_(False)
    return model


def lora(**options: object) -> nn.Module:
    """Adapters of rank 3 on some layers, everything else frozen."""
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(qwen2(**options), LoraConfig(r=3, lora_alpha=5, target_modules=targets, lora_dropout=0.0))


def train_only(model: nn.Module, is_trained: Callable[[str], bool]) -> nn.Module:
    """Freeze the parameters of `model` whose names `is_trained` refuses, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen2-tied": lambda: qwen2(tie_word_embeddings=True),
    "qwen2-untied": lambda: qwen2(tie_word_embeddings=False),
    "qwen3-tied": lambda: qwen3(tie_word_embeddings=True),
    "qwen3-untied": lambda: qwen3(tie_word_embeddings=False),
    "llama": lambda: llama(tie_word_embeddings=False),
    "neox": neox,
    "lora": lambda: lora(tie_word_embeddings=True),
    "padding-untied": lambda: llama(tie_word_embeddings=False, pad_token_id=PADDING_TOKEN),
    "padding-tied": lambda: llama(tie_word_embeddings=True, pad_token_id=PADDING_TOKEN),
    "first-layer-frozen": lambda: train_only(qwen2(tie_word_embeddings=False), lambda name: "layers.0" not in name),
    "last-layer-only": lambda: train_only(qwen3(tie_word_embeddings=False), lambda name: "layers.1" in name),
    "head-only": lambda: train_only(qwen2(tie_word_embeddings=False), lambda name: "lm_head" in name),
    "norms-frozen": lambda: train_only(qwen3(tie_word_embeddings=True), lambda name: "norm" not in name),
    "biases-only": lambda: train_only(neox(), lambda name: name.endswith("bias")),
}
WITHOUT_TRAINED_HEAD = ("lora", "last-layer-only", "biases-only")


def make_model(name: str, has_checkpointing: bool = False) -> nn.Module:
    """Return a model of `MODELS`, float64 and in train mode, all of its weights random, norms and biases too."""
    torch.manual_seed(0)
    return finished(MODELS[name](), has_checkpointing)


def finished(model: nn.Module, has_checkpointing: bool = False) -> nn.Module:
    """Make `model` float64, its weights random, and switch it to train mode, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    make_float64(model)
    if has_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()
