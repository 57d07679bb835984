# SPDX-License-Identifier: Apache-2.0
"""The sweeps that are measured; the sizes themselves, models and problems are `verl_gradalign.bench.cases`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_gradalign.bench.cases import LONG, NUM_TRUSTED, QWEN_05B, QWEN_15B, Case, build_model, draw_problems

__all__ = ["BASE", "NUM_TRUSTED", "QWEN_05B", "SWEEPS", "X_AXES", "Case", "build_model", "draw_problems", "save_model"]

BASE = Case("base")  # one million parameters
SHORT: dict[str, Any] = {"num_problems": 4, "tokens_per_row": 128, "max_tokens": BASE.max_tokens, "dtype": BASE.dtype}
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
        replace(QWEN_05B, sweep="half-billion", num_layers=2, vocabulary=32_768, has_checkpointing=False, **SHORT)
    ],
    "gpu": [replace(case, sweep="gpu", **more) for case in (QWEN_05B, QWEN_15B) for more in ({}, LONG)],
}


X_AXES = {
    "width": ("hidden_size", "hidden size"),
    "tokens": ("tokens_per_row", "tokens per row"),
    "problems": ("num_problems", "problems"),
    "split": ("tokens_per_row", "tokens per row, the same tokens in all"),
}
"""What each plotted sweep varies: the field of `Case`, and its label."""


def save_model(case: Case, folder: Path) -> Path:
    """Write the case's model where verl can load it."""
    build_model(case).save_pretrained(folder)
    return folder
