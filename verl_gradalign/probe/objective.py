# SPDX-License-Identifier: Apache-2.0
"""The policy objective of one problem, as a coefficient for each response token.

At scoring time the responses come from the current policy, so the ratio is 1 and clipping is inactive, and the
gradient of a problem is sum_t c_t grad log pi(y_t). This module computes the c_t; it knows nothing of models, of KL
terms or of entropy bonuses.

    coefficient_RT = token_coefficients(advantage_RT, response_mask_RT, "token-mean")

Shape legend: R responses of the problem, T response tokens (padded).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
"""verl's values of `actor.loss_agg_mode`."""


def token_coefficients(
    advantage_RT: Tensor,
    response_mask_RT: Tensor,
    loss_agg_mode: str,
    loss_scale_factor: float | None = None,
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
    if loss_agg_mode not in LOSS_AGG_MODES:
        raise ValueError(f"loss_agg_mode is {loss_agg_mode!r}; it must be one of {', '.join(LOSS_AGG_MODES)}")
    if advantage_RT.shape != response_mask_RT.shape:
        raise ValueError(
            f"advantages have shape {tuple(advantage_RT.shape)} but the response mask has "
            f"{tuple(response_mask_RT.shape)}; both must be (responses, tokens)"
        )
    mask_RT = response_mask_RT.to(advantage_RT.dtype)
    num_tokens_R = mask_RT.sum(dim=-1, keepdim=True)
    # Clamped so that a problem without any response token gets zeros, not 0/0.
    num_responses = (num_tokens_R > 0).sum().clamp(min=1).to(advantage_RT.dtype)
    if loss_agg_mode == "token-mean":
        weight = 1.0 / num_tokens_R.sum().clamp(min=1)
    elif loss_agg_mode == "token-sum":
        weight = torch.ones_like(num_responses)
    elif loss_agg_mode == "seq-mean-token-sum":
        weight = 1.0 / num_responses
    elif loss_agg_mode == "seq-mean-token-mean":
        weight = 1.0 / (num_responses * num_tokens_R.clamp(min=1))
    else:
        weight = 1.0 / (num_responses * _positive_scale(loss_scale_factor))
    # Masked by selection, not by multiplication: what lies under the padding may be nan.
    return torch.where(response_mask_RT.bool(), -advantage_RT * weight * mask_RT, torch.zeros_like(advantage_RT))


def _positive_scale(loss_scale_factor: float | None) -> float:
    if loss_scale_factor is None or not loss_scale_factor > 0:
        raise ValueError(
            f"loss_agg_mode 'seq-mean-token-sum-norm' has loss_scale_factor={loss_scale_factor}; set "
            "actor.loss_scale_factor to a positive constant, e.g. the maximum response length"
        )
    return loss_scale_factor
