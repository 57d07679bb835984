# SPDX-License-Identifier: Apache-2.0
"""Token coefficients of finished rows: advantages as training computes them, times the loss's weights.

    table = weighed(data, reward_R, keys, correction, config, verl_config)
    coefficient_RT, live, odd = coefficients(table, usable, content, config, verl_config)

Shape legend: R rows, T response tokens, or 1 where one token stands for all of a row, N tokens of all rows.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.advantages import asked, compute_advantages
from verl_gradalign.integration.policy_loss import loss_weights
from verl_gradalign.integration.rollout_correction import correct
from verl_gradalign.integration.row_content import RowContent
from verl_gradalign.probe.objective import response_weights

# Advantages of a group whose rewards are all equal differ from 0 by the rounding of its mean only.
ZERO_ADVANTAGE = 1e-6


@dataclass(frozen=True)
class Weighed:
    """Rows with their advantages. One token stands for all of a row where they have one: (rows, 1)."""

    advantage_RT: torch.Tensor
    """As the loss multiplies log-probs by them: zero where training masks a token."""
    mask_RT: torch.Tensor
    """Tokens of the response."""
    num_tokens_R: torch.Tensor
    """That training takes."""


def weighed(
    data: TensorDict,
    reward_R: torch.Tensor,
    keys: Sequence[str],
    correction: DictConfig | None,
    config: GradAlignConfig,
    verl_config: DictConfig,
) -> Weighed:
    """Return the rows' advantages, corrected as training corrects them."""
    if correction is None and asked(config, verl_config).is_of_sums:
        # Tables of all tokens take most of the time that there is to take.
        num_tokens_R = row_sums(data["response_mask"])
        mask_R1 = num_tokens_R.unsqueeze(1) > 0
        columns = {"rm_scores": reward_R.unsqueeze(1), "response_mask": mask_R1.long()}
        advantage_R1 = compute_advantages(columns, keys, config, verl_config)
        return Weighed(advantage_R1.masked_fill(~mask_R1, 0.0), mask_R1, num_tokens_R)
    padded = data.exclude("input_ids").to_padded_tensor()
    mask_RT, weight_RT = padded["response_mask"].bool(), None
    if correction is not None:
        padded["response_mask"], weight_RT = correct(padded, correction)
    kept_RT = padded["response_mask"].bool()
    advantage_RT = compute_advantages(padded, keys, config, verl_config).masked_fill(~kept_RT, 0.0)
    advantage_RT = advantage_RT if weight_RT is None else advantage_RT * weight_RT
    return Weighed(advantage_RT, mask_RT, kept_RT.sum(dim=1).float())


def row_sums(column: Any) -> torch.Tensor:
    """Return the sum of each row of a column, nested or not, (rows,)."""
    if not column.is_nested:
        return column.float().sum(dim=1)
    return torch.segment_reduce(column.values().float(), "sum", offsets=column.offsets())


def uniform(
    advantage_RT: torch.Tensor, coefficient_RT: torch.Tensor, mask_RT: torch.Tensor
) -> list[tuple[float, float]]:
    """Return each row's advantage and coefficient, nan where its masked tokens have different ones.

    Tokens of one advantage have one coefficient: a loss weighs all tokens of a response alike.
    """
    first_R1 = mask_RT.byte().argmax(dim=1, keepdim=True)
    is_same_R = ((advantage_RT == advantage_RT.gather(1, first_R1)) | ~mask_RT).all(dim=1)
    firsts = (values_RT.gather(1, first_R1).squeeze(1) for values_RT in (advantage_RT, coefficient_RT))
    return list(zip(*(torch.where(is_same_R, first_R, torch.nan).tolist() for first_R in firsts), strict=True))


def coefficients(
    table: Weighed,
    usable: dict[str, list[str]],
    content: RowContent,
    config: GradAlignConfig,
    verl_config: DictConfig,
) -> tuple[torch.Tensor, set[str], set[str]]:
    """Return the coefficients of all rows (rows, tokens or 1), the uids of the live groups, and those of failed ones.

    `usable` gives each group's keys; rows stand in that order, in `content` too. Rows of dead groups have coefficients
    of zero, and so have those of groups that fail because an advantage is not finite.
    """
    actor = verl_config.actor_rollout_ref.actor
    mode = loss_weights(config, verl_config)
    scale = actor.get("loss_scale_factor") or verl_config.data.max_response_length
    gain_RT, num_tokens_R = -table.advantage_RT, table.num_tokens_R
    # Of all rows at once: thousands of groups have each a table of thousands of tokens.
    starts = list(accumulate(map(len, usable.values()), initial=0))
    largest_G = np.maximum.reduceat(gain_RT.abs().amax(dim=1).numpy(), starts[:-1]).tolist()
    weight_R, live, odd = torch.zeros_like(num_tokens_R), set[str](), set[str]()
    for uid, (start, end), largest in zip(usable, pairwise(starts), largest_G, strict=True):
        if not math.isfinite(largest):
            odd.add(uid)
        elif largest > ZERO_ADVANTAGE:
            rows, places = slice(start, end), content.places(start, end)
            of_group_R = response_weights(num_tokens_R[rows], mode, scale)
            are_distinct = len(set(places)) == len(places)
            if are_distinct or not cancels(places, gain_RT[rows] * of_group_R.unsqueeze(1)):
                live.add(uid)
                weight_R[rows] = of_group_R
    is_live_R1 = weight_R.unsqueeze(1) > 0
    return torch.where(is_live_R1, gain_RT * weight_R.unsqueeze(1), torch.zeros_like(gain_RT)), live, odd


def cancels(ids: Sequence[Hashable], coefficient_RT: torch.Tensor) -> bool:
    """Return whether the coefficients of equal rows add up to zero, so that the group's gradient is zero.

    It is when all responses are the same while their rewards differ: noise in the reward under a confident policy.
    Computed, such a gradient is rounding error, whose cosine means nothing.
    """
    place_of: dict[Hashable, int] = {}
    place_R = torch.tensor([place_of.setdefault(row, len(place_of)) for row in ids])
    if len(place_of) == len(ids):
        return False
    total_RT = torch.zeros_like(coefficient_RT).index_add_(0, place_R, coefficient_RT)
    return bool(total_RT.abs().max() <= ZERO_ADVANTAGE * coefficient_RT.abs().sum(dim=0).max())
