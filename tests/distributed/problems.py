# SPDX-License-Identifier: Apache-2.0
"""The problems and models that every distributed case scores, and what the oracle says of them. Imports no verl."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.numerics.float64_model import build_float64_model, random_problem
from verl_gradalign.probe.oracle import OracleResponse, problem_gradients_float64

# Exact in float32, through which verl passes it.
TEMPERATURE = 0.75
LOSS_AGG_MODE = "seq-mean-token-sum"
NUM_TRUSTED = 2
MODELS = (("qwen2", True), ("qwen3", False))


def build_problems() -> list[list[OracleResponse]]:
    """Return trusted problems first. One has a single response, one more rows than the others, one a masked row."""
    generator = torch.Generator().manual_seed(11)
    lengths = [(3, 5, 2, 4), (4, 1, 6), (6, 2, 2, 3, 5), (5,), (2, 7), (1, 1, 8, 3)]
    return [
        random_problem(generator, group, LOSS_AGG_MODE, prompt_length=2 + index, masked=(1,) if index == 4 else ())
        for index, group in enumerate(lengths)
    ]


def oracle_scores(architecture: str, tied: bool) -> dict[str, Tensor]:
    """Return dot products, norms and cosines of all problems along the trusted ones, and |v|."""
    model = build_float64_model(architecture, tied)
    grads = torch.stack(problem_gradients_float64(model, build_problems(), TEMPERATURE))
    v = grads[:NUM_TRUSTED].sum(dim=0)
    dot_P, norm_P = grads @ v / v.norm(), grads.norm(dim=1)
    return {"dot": dot_P, "norm": norm_P, "cosine": dot_P / norm_P, "direction_norm": v.norm()}
