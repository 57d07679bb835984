# SPDX-License-Identifier: Apache-2.0
"""Tiny float64 models, and the problems that the exactness tests are run on.

    model = load_float64(folder)
    rows, shares = tabulate(problems)
    engine = PlainEngine(model, rows, TEMPERATURE)

Shape legend: R responses, T response tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.numerics.oracle import problem_gradients_float64
from verl_gradalign.probe.objective import token_coefficients
from verl_gradalign.toy.model import build_tiny_model
from verl_gradalign.types import ProblemRows, TokenRow

TEMPERATURE = 0.75  # not 1, and exact in float32, to which verl rounds temperatures
VOCABULARY = 261
Problem = list[TokenRow]


def build_model(folder: Path, architecture: str, tie_word_embeddings: bool, hidden_size: int = 32) -> Path:
    """Write a tiny model all of whose weights are random, norms and biases too, and return its folder."""
    build_tiny_model(
        folder,
        architecture,
        hidden_size=hidden_size,
        num_layers=2,
        intermediate_size=48,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def load_float64(folder: Path, has_checkpointing: bool = False) -> nn.Module:
    """Return the model in `folder`, float64 throughout, in train mode."""
    model = make_float64(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"))
    if has_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def make_float64(model: nn.Module) -> nn.Module:
    """Convert `model` in place.

    transformers' RMSNorm computes in float32 whatever the dtype of its input, which would hide everything below 1e-7;
    torch's, with the same weight, takes its place.
    """
    model.double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.numel(), eps=child.variance_epsilon, device="meta")
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def draw_problem(
    response_lengths: Sequence[int], seed: int, loss_agg_mode: str = "token-mean", advantage_scale: float = 1.0
) -> Problem:
    """Return a problem with random tokens and one random advantage per response; lengths may be 0."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(VOCABULARY, (1 + seed % 4,), generator=generator)
    responses = [torch.randint(VOCABULARY, (length,), generator=generator) for length in response_lengths]
    advantage_R = torch.randn(len(responses), generator=generator, dtype=torch.float64) * advantage_scale
    return with_coefficients(prompt, responses, advantage_R.tolist(), loss_agg_mode)


def with_coefficients(
    prompt: Tensor, responses: Sequence[Tensor], advantages: Sequence[float], loss_agg_mode: str
) -> Problem:
    """Return the problem of these responses, with the coefficients that the package gives them."""
    width = max((response.numel() for response in responses), default=0)
    length_R1 = torch.tensor([response.numel() for response in responses], dtype=torch.int64).unsqueeze(-1)
    mask_RT = (torch.arange(width) < length_R1).double()
    advantage_RT = torch.tensor(advantages, dtype=torch.float64).unsqueeze(-1) * mask_RT
    coefficient_RT = token_coefficients(advantage_RT, mask_RT, loss_agg_mode)
    return [TokenRow(prompt, response, coefficient_RT[r, : response.numel()]) for r, response in enumerate(responses)]


def tabulate(problems: Sequence[Problem]) -> tuple[list[TokenRow], list[ProblemRows]]:
    """Return the rows of all problems, and each problem's share of them on the only rank."""
    rows: list[TokenRow] = []
    shares = []
    for index, problem in enumerate(problems):
        numbers = tuple(range(len(rows), len(rows) + len(problem)))
        rows += problem
        lengths = [row.num_tokens for row in problem]
        shares.append(ProblemRows(f"p{index}", numbers, len(problem), sum(lengths), max(lengths, default=0)))
    return rows, shares


def expected_scores(
    model: nn.Module, trusted: Sequence[Problem], candidates: Sequence[Problem]
) -> tuple[Tensor, Tensor, float]:
    """Return the oracle's (dot_P, norm_P, |v|)."""
    grads = problem_gradients_float64(model, [*trusted, *candidates], TEMPERATURE)
    direction_G = torch.stack(grads[: len(trusted)]).sum(0)
    direction_norm = math.sqrt(direction_G.dot(direction_G).item())
    gradient_PG = torch.stack(grads[len(trusted) :])
    return gradient_PG @ direction_G / direction_norm, gradient_PG.norm(dim=1), direction_norm
