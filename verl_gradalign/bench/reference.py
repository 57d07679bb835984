# SPDX-License-Identifier: Apache-2.0
"""What scores must agree with: each problem's gradient by plain autograd, in the model's own precision.

One response at a time, unpadded, unpacked, unsharded, with the log-softmax written out: slow, and with nothing in
common with the code it checks but the model. It must import nothing of `verl_gradalign.probe`.

    direction = unit(problem_gradient(model, trusted, 1.0))
    gradient = problem_gradient(model, [response], temperature=1.0)

Shape legend: P problems, R responses, S tokens of prompt and response, T response tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from verl_gradalign.types import TokenRow


def log_probs(model: nn.Module, response: TokenRow, temperature: float) -> Tensor:
    """Return log pi(y_t) of a response's tokens, differentiable."""
    ids_S = torch.cat([response.prompt, response.response]).to(next(model.parameters()).device)
    logits_SV = model(input_ids=ids_S.unsqueeze(0), use_cache=False).logits[0] / temperature
    # The logits at position s predict the token at s + 1.
    first = response.prompt.numel() - 1
    logits_TV = logits_SV[first : first + response.response.numel()]
    peak_T1 = logits_TV.max(dim=-1, keepdim=True).values.detach()
    log_total_T = (logits_TV - peak_T1).exp().sum(dim=-1).log() + peak_T1.squeeze(-1)
    chosen_T = logits_TV.gather(-1, ids_S[response.prompt.numel() :].unsqueeze(-1)).squeeze(-1)
    return chosen_T - log_total_T


def response_gradient(model: nn.Module, response: TokenRow, temperature: float) -> list[Tensor]:
    """Return the gradient of sum_t c_t log pi(y_t) by each trainable parameter, tied ones once; `.grad` is left."""
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    log_prob_T = log_probs(model, response, temperature)
    loss = (response.coefficient.to(log_prob_T) * log_prob_T).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves, strict=True)]


def add(total: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    """Return the sum, in the tensors of `total`."""
    return more if total is None else [first.add_(second) for first, second in zip(total, more, strict=True)]


def inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the inner product, summed in float64."""
    return math.fsum(
        # Some at a time: float64 copies of an embedding of 150,000 tokens take gigabytes.
        float((a.double() * b.double()).sum())
        for x, y in zip(first, second, strict=True)
        for a, b in zip(torch.split(x.flatten(), CHUNK), torch.split(y.flatten(), CHUNK), strict=True)
    )


CHUNK = 2**26


@dataclass(frozen=True)
class Reference:
    """What plain autograd says of candidates along the direction of trusted problems."""

    dot_P: Tensor
    norm_P: Tensor
    derivative_PR: Tensor
    """v / |v| . grad log pi(y), where all tokens of the response have one coefficient."""
    direction_norm: float


def reference_scores(
    model: nn.Module, trusted: Sequence[Sequence[TokenRow]], candidates: Sequence[Sequence[TokenRow]]
) -> Reference:
    """Return dot products and norms of the candidates, at temperature 1. Holds three tensors of the model's size."""
    direction: list[Tensor] | None = None
    for response in (response for problem in trusted for response in problem):
        direction = add(direction, response_gradient(model, response, 1.0))
    assert direction is not None
    norm = math.sqrt(inner(direction, direction))
    dots, norms, derivatives = [], [], []
    for problem in candidates:
        total: list[Tensor] | None = None
        row = []
        for response in problem:
            gradient = response_gradient(model, response, 1.0)
            row.append(inner(gradient, direction) / norm / float(response.coefficient[0]))
            total = add(total, gradient)
        assert total is not None
        dots.append(inner(total, direction) / norm)
        norms.append(math.sqrt(inner(total, total)))
        derivatives.append(row)
    dot_P, norm_P, derivative_PR = (torch.tensor(each, dtype=torch.float64) for each in (dots, norms, derivatives))
    return Reference(dot_P, norm_P, derivative_PR, norm)
