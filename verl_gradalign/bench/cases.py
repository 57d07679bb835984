# SPDX-License-Identifier: Apache-2.0
"""The sizes that are measured, and random models and problems of these sizes.

Weights and tokens are random: exactness, time and memory do not ask what a model has learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from verl_gradalign.probe.objective import token_coefficients
from verl_gradalign.types import TokenRow

NUM_TRUSTED = 4


@dataclass(frozen=True)
class Case:
    """A model, a pool of candidates and a number of ranks."""

    sweep: str
    hidden_size: int = 128
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    vocabulary: int = 259
    num_problems: int = 32
    rows_per_problem: int = 8
    tokens_per_row: int = 32
    """A quarter of them prompt."""
    max_tokens: int = 4096
    """Of a micro-batch."""
    num_ranks: int = 1
    has_checkpointing: bool = False
    dtype: str = "float32"
    """What is computed in; parameters are float32."""
    is_uneven: bool = False
    """Whether responses have different lengths, of which `tokens_per_row` allows the longest."""

    @property
    def shape(self) -> str:
        """Return responses and tokens of a problem, as pages name them."""
        return f"{self.rows_per_problem} x {self.tokens_per_row:,}"


QWEN_05B = Case(
    "0.5b",
    hidden_size=896,
    intermediate_size=4864,
    num_layers=24,
    num_heads=14,
    vocabulary=151936,
    num_problems=8,
    tokens_per_row=1024,
    max_tokens=16384,
    has_checkpointing=True,
    dtype="bfloat16",
)
QWEN_15B = replace(QWEN_05B, sweep="1.5b", hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12)
LONG: dict[str, Any] = {"rows_per_problem": 16, "tokens_per_row": 2048, "max_tokens": 32768, "num_problems": 4}
LONGEST: dict[str, Any] = {**LONG, "tokens_per_row": 4096}
"""A problem of it takes two micro-batches."""
TINY: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "vocabulary": 259},
    **{"num_problems": 4, "rows_per_problem": 4, "max_tokens": 256},
}


def tiny(case: Case) -> Case:
    """Return the case that stands for one in a dry run: the larger model is deeper, longer problems are longer."""
    layers, tokens = 2 if case.num_layers <= QWEN_05B.num_layers else 3, 32 * (case.tokens_per_row // 1024)
    named = f"{case.sweep}, tiny"
    return replace(case, sweep=named, num_layers=layers, tokens_per_row=tokens, **TINY)


def draw_problems(case: Case) -> list[list[TokenRow]]:
    """Return the case's candidates, and the trusted problems before them; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    prompt_length = case.tokens_per_row // 4
    problems = []
    for _ in range(NUM_TRUSTED + case.num_problems):
        prompt = torch.randint(case.vocabulary, (prompt_length,), generator=generator)
        longest = case.tokens_per_row - prompt_length
        lengths = _lengths(case, longest, generator)
        mask_RT = (torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)).float()
        advantage_RT = torch.randn(case.rows_per_problem, 1, generator=generator) * mask_RT
        coefficient_RT = token_coefficients(advantage_RT, mask_RT, "token-mean")
        problems.append(
            [
                TokenRow(prompt, torch.randint(case.vocabulary, (length,), generator=generator), coefficient_T[:length])
                for length, coefficient_T in zip(lengths, coefficient_RT, strict=True)
            ]
        )
    return problems


def _lengths(case: Case, longest: int, generator: torch.Generator) -> Sequence[int]:
    if not case.is_uneven:
        return [longest] * case.rows_per_problem
    drawn: list[int] = torch.randint(longest // 8, longest + 1, (case.rows_per_problem,), generator=generator).tolist()
    return drawn


def config_of(case: Case) -> Qwen2Config:
    """Return the configuration of a Qwen2 with tied embeddings."""
    return Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def build_model(case: Case, attention: str = "sdpa") -> nn.Module:
    """Return a Qwen2 with random float32 weights, on the CPU."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(
        config_of(case), attn_implementation=attention, dtype=torch.float32
    )
    return model
