# SPDX-License-Identifier: Apache-2.0
"""The objective of one problem, as one coefficient per response token.

At scoring time the rollouts come from the current policy, so the ratio is 1, clipping is inactive, and the policy
loss's gradient is sum_t c_t grad log pi(y_t) with c_t = -A_t w_t (methods of GradAlign, arXiv 2602.21492).

Shape legend: R responses of one problem, T response tokens (padded on the right).
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


def token_coefficients(
    advantage_RT: Tensor, response_mask_RT: Tensor, loss_agg_mode: str, loss_scale_factor: float | None = None
) -> Tensor:
    """Return c_t = dL / d log pi(y_t) for every response token of one problem.

    The weights are verl's loss aggregation, taken within the problem, so they do not depend on how problems are put
    into batches or dealt to ranks.

    Shapes: all (R, T); the mask is 1 on tokens that are trained on.
    Raises: ValueError for an unknown mode, and for `seq-mean-token-sum-norm` without its factor.
    """
    mask_RT = response_mask_RT.to(advantage_RT.dtype)
    num_tokens_R = mask_RT.sum(dim=1, keepdim=True)
    num_sequences = (num_tokens_R > 0).sum().clamp(min=1)
    if loss_agg_mode == "token-mean":
        weight = 1 / mask_RT.sum().clamp(min=1)
    elif loss_agg_mode == "token-sum":
        weight = torch.ones_like(num_tokens_R)
    elif loss_agg_mode == "seq-mean-token-sum":
        weight = 1 / num_sequences
    elif loss_agg_mode == "seq-mean-token-sum-norm":
        if not loss_scale_factor:
            raise ValueError(f"loss_agg_mode={loss_agg_mode} needs a loss_scale_factor above 0")
        weight = 1 / (num_sequences * loss_scale_factor)
    elif loss_agg_mode == "seq-mean-token-mean":
        weight = 1 / (num_sequences * num_tokens_R.clamp(min=1))
    else:
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} is unknown; known are {', '.join(LOSS_AGG_MODES)}")
    return -advantage_RT * weight * mask_RT
