# SPDX-License-Identifier: Apache-2.0
"""Tiny Hugging Face models that really compute in float64, and random problems for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from verl_gradalign.probe.objective import token_coefficients
from verl_gradalign.probe.oracle import OracleResponse

VOCABULARY = 61
ARCHITECTURES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def build_float64_model(architecture: str, tie_word_embeddings: bool, seed: int = 0) -> PreTrainedModel:
    """Return a two-block model in float64, in eval mode, with sdpa attention."""
    config_class, model_class = ARCHITECTURES[architecture]
    extra = {"head_dim": 8} if architecture == "qwen3" else {}
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie_word_embeddings,
        attn_implementation="sdpa",
        # Larger than the default 0.02, so that attention and softmax are far from uniform.
        initializer_range=0.3,
        **extra,
    )
    torch.manual_seed(seed)
    return compute_in_float64(model_class(config)).eval()


def compute_in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Convert the model to float64, its normalisation layers included, which transformers computes in float32."""
    model.double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                # Not all ones: a norm weight that could be dropped unnoticed would hide its gradient.
                norm.weight.data = child.weight.data + 0.2 * torch.randn_like(child.weight.data)
                setattr(parent, name, norm)
    return model


def random_problem(
    generator: torch.Generator,
    response_lengths: Sequence[int],
    loss_agg_mode: str = "token-mean",
    prompt_length: int = 4,
    masked: Sequence[int] = (),
) -> list[OracleResponse]:
    """Return one problem with normal advantages. Responses in `masked` have tokens, but none that counts."""
    num_responses, width = len(response_lengths), max([*response_lengths, 1])
    prompt = torch.randint(VOCABULARY, (prompt_length,), generator=generator)
    mask_RT = torch.arange(width).unsqueeze(0) < torch.tensor(response_lengths).unsqueeze(1)
    mask_RT[list(masked)] = False
    advantage_R = torch.randn(num_responses, generator=generator, dtype=torch.float64)
    coefficient_RT = token_coefficients(
        advantage_R.unsqueeze(1).expand(-1, width).contiguous(), mask_RT, loss_agg_mode, loss_scale_factor=32.0
    )
    return [
        OracleResponse(
            prompt=prompt,
            response=torch.randint(VOCABULARY, (length,), generator=generator),
            coefficient=coefficient_RT[row, :length],
        )
        for row, length in enumerate(response_lengths)
    ]
