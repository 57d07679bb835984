# SPDX-License-Identifier: Apache-2.0
"""Responses of an earlier policy, read at the present one: how much each token counts, and which are too old to count.

A kept response's gradient sum_t c_t grad log pi(y_t) stands for the present policy's with each token weighted by the
ratio of its probability now to that at the time, truncated. It runs no pass: the ratios come with the log-probs of the
pass that makes the gradient.

    tally = ReplayTally()
    weight_RT = tally.weigh(log_prob_RT, stored_RT, mask_RT)
    tally.shares(engine.data_group)

Shape legend: R responses, T response tokens.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from verl_gradalign.probe.ranks import summed

MAX_RATIO = 2.0
MIN_EFFECTIVE = 0.5
"""Least effective sample of a response, as a share of its tokens."""
MAX_LOG_RATIO = 20.0
"""verl's bound for the same difference: its exponential does not overflow, nor does the sum of squares."""


def importance_ratios(log_prob_RT: Tensor, stored_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """Return pi_now / pi_then of each token, not truncated, 0 where the mask is.

    Shapes: all (responses, tokens).
    """
    ratio_RT = (log_prob_RT - stored_RT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    # Selected, not multiplied: what lies under the padding may be nan.
    return torch.where(mask_RT.bool(), ratio_RT, torch.zeros_like(ratio_RT))


def effective_shares(ratio_RT: Tensor, mask_RT: Tensor) -> Tensor:
    """Return (sum w)^2 / (T sum w^2) of each response, from 1 / T to 1; 1 for one without tokens.

    Source: Kish's effective sample size, over the tokens of one response.
    """
    squares_R = mask_RT.bool().sum(dim=1) * ratio_RT.square().sum(dim=1)
    return torch.where(squares_R > 0, ratio_RT.sum(dim=1).square() / squares_R, torch.ones_like(squares_R))


class ReplayTally:
    """Weighs the tokens of a rank's passes, and counts what it found."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def weigh(self, log_prob_RT: Tensor, stored_RT: Tensor, mask_RT: Tensor) -> Tensor:
        """Return min(ratio, 2) of each token, without gradient; 0 for all of a response whose effective share is low.

        Shapes: all (responses, tokens). A response without masked tokens is not counted.
        """
        with torch.no_grad():
            ratio_RT = importance_ratios(log_prob_RT, stored_RT.to(log_prob_RT), mask_RT)
            weight_RT, effective_R = ratio_RT.clamp(max=MAX_RATIO), effective_shares(ratio_RT, mask_RT)
            # A share that is nan keeps its response: v is then nan, and refused as a whole.
            is_dropped_R = effective_R < MIN_EFFECTIVE
            num_tokens_R = mask_RT.bool().sum(dim=1)
            is_counted_R = num_tokens_R > 0
            sums = (is_counted_R, is_dropped_R, effective_R * is_counted_R, weight_RT, num_tokens_R)
            total = torch.stack([each.sum(dtype=torch.float64) for each in sums])
            self._total = total if self._total is None else self._total + total
            return weight_RT.masked_fill(is_dropped_R.unsqueeze(1), 0.0)

    def shares(self, group: ProcessGroup | None, device: torch.device) -> dict[str, float]:
        """Return, by metric name, what was found on all ranks; nothing where no response was weighed. Collective."""
        total = torch.zeros(5, dtype=torch.float64, device=device) if self._total is None else self._total.to(device)
        num_responses, num_dropped, effective, weight, num_tokens = summed(total, group).tolist()
        if not num_responses:
            return {}
        return {
            "direction/dropped": num_dropped / num_responses,
            "direction/effective_sample": effective / num_responses,
            "direction/ratio": weight / num_tokens,
        }
