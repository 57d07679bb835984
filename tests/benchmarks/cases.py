# SPDX-License-Identifier: Apache-2.0
"""The sizes that are measured, and random problems of these sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from verl_gradalign.probe.objective import token_coefficients
from verl_gradalign.types import TokenRow


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


BASE = Case("base")  # one million parameters
QWEN_05B = Case(
    "gpu",
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
QWEN_15B = replace(QWEN_05B, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12)
LONG = {"rows_per_problem": 16, "tokens_per_row": 2048, "max_tokens": 32768, "num_problems": 4}

SMALL = Case("smoke", num_layers=2, num_problems=4)

SWEEPS: dict[str, list[Case]] = {
    # Not measured, only run: tests/distributed/test_benchmarks.py.
    "smoke": [SMALL, replace(SMALL, num_ranks=2)],
    "base": [BASE, replace(BASE, num_ranks=2), replace(BASE, has_checkpointing=True)],
    "width": [replace(BASE, sweep="width", hidden_size=width, intermediate_size=4 * width) for width in (64, 128, 256)],
    "tokens": [replace(BASE, sweep="tokens", tokens_per_row=length) for length in (13, 32, 64, 128)],
    "problems": [replace(BASE, sweep="problems", num_problems=count) for count in (8, 32, 64)],
    # The same tokens in ever more and shorter problems: what a problem costs besides its tokens.
    "split": [
        replace(BASE, sweep="split", num_problems=8192 // (8 * length), tokens_per_row=length)
        for length in (128, 64, 32, 16)
    ],
    # Layers of a model of 0.5 billion parameters, two of them, beside a vocabulary that a CPU can bear.
    "half-billion": [
        replace(
            BASE,
            sweep="half-billion",
            hidden_size=896,
            intermediate_size=4864,
            num_layers=2,
            num_heads=14,
            vocabulary=32_768,
            num_problems=4,
            tokens_per_row=128,
        )  # fmt: skip
    ],
    "gpu": [QWEN_05B, replace(QWEN_05B, **LONG), QWEN_15B, replace(QWEN_15B, **LONG)],
}


X_AXES = {
    "width": ("hidden_size", "hidden size"),
    "tokens": ("tokens_per_row", "tokens per row"),
    "problems": ("num_problems", "problems"),
    "split": ("tokens_per_row", "tokens per row, the same tokens in all"),
}
"""What each plotted sweep varies: the field of `Case`, and its label."""


def draw_problems(case: Case) -> list[list[TokenRow]]:
    """Return the case's candidates, and four trusted problems before them; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    prompt_length = case.tokens_per_row // 4
    problems = []
    for _ in range(4 + case.num_problems):
        prompt = torch.randint(case.vocabulary, (prompt_length,), generator=generator)
        length = case.tokens_per_row - prompt_length
        mask_RT = torch.ones(case.rows_per_problem, length)
        advantage_RT = torch.randn(case.rows_per_problem, 1, generator=generator) * mask_RT
        coefficient_RT = token_coefficients(advantage_RT, mask_RT, "token-mean")
        problems.append(
            [
                TokenRow(prompt, torch.randint(case.vocabulary, (length,), generator=generator), coefficient_T)
                for coefficient_T in coefficient_RT
            ]
        )
    return problems


def build_model(case: Case) -> nn.Module:
    """Return a Qwen2 with random float32 weights and tied embeddings."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def save_model(case: Case, folder: Path) -> Path:
    """Write the case's model where verl can load it."""
    build_model(case).save_pretrained(folder)
    return folder
