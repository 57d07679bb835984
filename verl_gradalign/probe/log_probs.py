# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of chosen tokens, straight from the logits, in float32 or better and in little memory.

Only the positions that predict a response token are touched, a chunk of them at a time: no copy of the logits is made
and no log-softmax is kept.

    log_prob_M = token_log_probs(logits_NV, position_M, token_M, temperature=1.0)

Shape legend: N positions, V vocabulary, M chosen positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**26
"""Logits converted to float32 at a time: 256 MiB."""


def token_log_probs(logits_NV: Tensor, position_M: Tensor, token_M: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature)[position, token], differentiable by the logits.

    Shapes: logits_NV (positions, vocabulary); position_M and token_M (chosen,) int64, each position at most once.
    Units: natural logarithm; float32, or float64 if the logits are.
    """
    result: Tensor = _TokenLogProbs.apply(logits_NV, position_M, token_M, temperature)  # type: ignore[no-untyped-call]
    return result


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunk_size(logits_NV: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits_NV.shape[1])


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, position_M: Tensor, token_M: Tensor, temperature: float) -> Tensor:
        dtype, size = _compute_dtype(logits_NV), _chunk_size(logits_NV)
        log_probs, log_totals = [logits_NV.new_zeros(0, dtype=dtype)], [logits_NV.new_zeros(0, dtype=dtype)]
        for position_C, token_C in zip(torch.split(position_M, size), torch.split(token_M, size), strict=True):
            scaled_CV = logits_NV[position_C].to(dtype).div_(temperature)
            log_total_C = scaled_CV.logsumexp(dim=-1)
            log_probs.append(scaled_CV.gather(-1, token_C.unsqueeze(-1)).squeeze(-1) - log_total_C)
            log_totals.append(log_total_C)
        ctx.save_for_backward(logits_NV, position_M, token_M, torch.cat(log_totals))
        ctx.temperature = temperature
        return torch.cat(log_probs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, position_M, token_M, log_total_M = ctx.saved_tensors
        dtype, size = log_total_M.dtype, _chunk_size(logits_NV)
        delta_NV = torch.zeros_like(logits_NV)
        chunks = zip(*(torch.split(t, size) for t in (position_M, token_M, log_total_M, grads[0])), strict=True)
        for position_C, token_C, log_total_C, grad_C in chunks:
            scaled_CV = logits_NV[position_C].to(dtype).div_(ctx.temperature)
            minus_prob_CV = scaled_CV.sub_(log_total_C.unsqueeze(-1)).exp_().neg_()
            minus_prob_CV.scatter_add_(-1, token_C.unsqueeze(-1), torch.ones_like(minus_prob_CV[:, :1]))
            minus_prob_CV.mul_((grad_C / ctx.temperature).unsqueeze(-1))
            delta_NV[position_C] = minus_prob_CV.to(delta_NV.dtype)
        return delta_NV, None, None, None
