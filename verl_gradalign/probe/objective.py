# SPDX-License-Identifier: Apache-2.0
"""The policy objective of a problem, sum_t c_t log pi(y_t): a coefficient for each response token, and its log-prob.

At scoring time the responses come from the current policy, so the ratio is 1 and clipping is inactive, and the
gradient of a problem is sum_t c_t grad log pi(y_t). It knows nothing of models, of KL terms or of entropy bonuses.

    coefficient_RT = token_coefficients(advantage_RT, response_mask_RT, "token-mean")
    log_prob_M = token_log_probs(logits_NV, position_M, token_M, temperature=1.0)

Shape legend: R responses, T response tokens (padded), N positions, V vocabulary, M chosen positions, C a chunk of them.
"""

from typing import Any

import torch
from torch import Tensor

from verl_gradalign.probe.sizes import CHUNK_ELEMENTS

LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
"""verl's values of `actor.loss_agg_mode`."""


def token_coefficients(
    advantage_RT: Tensor, response_mask_RT: Tensor, loss_agg_mode: str, loss_scale_factor: float | None = None
) -> Tensor:
    """Return c_t = -A_t * w_t * mask_t, the derivative of the problem's loss by each token's log-probability.

    The weight w_t is verl's, taken *within the problem*: means run over this problem's tokens or non-empty responses,
    never over a batch, so the scores do not depend on what else is in the batch or on the number of ranks.

    Shapes: advantage_RT and response_mask_RT (responses, tokens); the result has their shape and the advantages' dtype.
        Responses without a masked token get zeros and do not count as responses.
    Units: gradient of the problem's loss, to be *descended*; not divided by the data-parallel size.
    Raises: ValueError if the mode is unknown, if the shapes differ, or if `seq-mean-token-sum-norm` comes without a
        positive `loss_scale_factor` (verl then divides by the padded width, which depends on the batch).
    Source: `agg_loss` and `compute_policy_loss_vanilla` of verl 0.9.1 at ratio 1 (tests/numerics/test_objective.py).
    """
    shape, mask_shape = tuple(advantage_RT.shape), tuple(response_mask_RT.shape)
    if shape != mask_shape:
        both = f"advantages have shape {shape} but the response mask has {mask_shape}"
        raise ValueError(f"{both}; both must be (responses, tokens)")
    num_tokens_R = response_mask_RT.sum(dim=-1).to(advantage_RT.dtype)
    weight_R1 = response_weights(num_tokens_R, loss_agg_mode, loss_scale_factor).unsqueeze(-1)
    # Masked by selection, not by multiplication: what lies under the padding may be nan.
    return torch.where(response_mask_RT.bool(), -advantage_RT * weight_R1, torch.zeros_like(advantage_RT))


def response_weights(num_tokens_R: Tensor, loss_agg_mode: str, loss_scale_factor: float | None = None) -> Tensor:
    """Return w of each response's tokens in the loss of their problem, (responses,).

    `num_tokens_R`: masked tokens of each of one problem's responses, a floating tensor. Raises and source as for
    `token_coefficients`.
    """
    if loss_agg_mode not in LOSS_AGG_MODES:
        raise ValueError(f"loss_agg_mode is {loss_agg_mode!r}; it must be one of {', '.join(LOSS_AGG_MODES)}")
    # Clamped so that a problem without any response token gets zeros, not 0/0.
    num_responses = (num_tokens_R > 0).sum().clamp(min=1)
    if loss_agg_mode == "token-mean":
        divisor_R = num_tokens_R.sum().clamp(min=1).expand_as(num_tokens_R)
    elif loss_agg_mode == "token-sum":
        divisor_R = torch.ones_like(num_tokens_R)
    elif loss_agg_mode == "seq-mean-token-sum":
        divisor_R = num_responses.to(num_tokens_R.dtype).expand_as(num_tokens_R)
    elif loss_agg_mode == "seq-mean-token-mean":
        divisor_R = num_responses * num_tokens_R.clamp(min=1)
    elif loss_scale_factor is not None and loss_scale_factor > 0:
        divisor_R = torch.full_like(num_tokens_R, loss_scale_factor) * num_responses
    else:
        trouble = f"loss_agg_mode 'seq-mean-token-sum-norm' has loss_scale_factor={loss_scale_factor}"
        remedy = "set actor.loss_scale_factor to a positive constant, e.g. the maximum response length"
        raise ValueError(f"{trouble}; {remedy}")
    return 1.0 / divisor_R


def token_log_probs(logits_NV: Tensor, position_M: Tensor, token_M: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature)[position, token], differentiable by the logits.

    Only the chosen positions are touched, a chunk at a time: no copy of the logits is made, no log-softmax is kept.

    Shapes: logits_NV (positions, vocabulary); position_M and token_M (chosen,) int64, each position at most once.
    Units: natural logarithm; float32, or float64 if the logits are.
    """
    result: Tensor = _TokenLogProbs.apply(logits_NV, position_M, token_M, temperature)  # type: ignore[no-untyped-call]
    return result


def _chunk_size(logits_NV: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits_NV.shape[1])


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, position_M: Tensor, token_M: Tensor, temperature: float) -> Tensor:
        # Float32 or better: half precision would round the log-probs whose differences estimators take.
        dtype, size = torch.promote_types(logits_NV.dtype, torch.float32), _chunk_size(logits_NV)
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
            # (one-hot - softmax) * grad / temperature, in place: a chunk is the largest tensor beside the logits.
            scaled_CV = logits_NV[position_C].to(dtype).div_(ctx.temperature)
            minus_prob_CV = scaled_CV.sub_(log_total_C.unsqueeze(-1)).exp_().neg_()
            minus_prob_CV.scatter_add_(-1, token_C.unsqueeze(-1), torch.ones_like(minus_prob_CV[:, :1]))
            minus_prob_CV.mul_((grad_C / ctx.temperature).unsqueeze(-1))
            delta_NV[position_C] = minus_prob_CV.to(delta_NV.dtype)
        return delta_NV, None, None, None
