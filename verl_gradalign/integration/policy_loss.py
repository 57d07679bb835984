# SPDX-License-Identifier: Apache-2.0
"""How verl's policy loss weighs tokens where the policy is the one that sampled, measured on the loss itself.

Scores are of the gradient sum_t c_t grad log pi(y_t) with the c_t of `actor.loss_agg_mode`. Of verl's losses most have
these coefficients at ratio 1, some have those of another mode whatever is configured, and one may be a user's own.

Shape legend: R responses, T response tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.rollout_correction import correction_of
from verl_gradalign.probe.objective import LOSS_AGG_MODES, token_coefficients

PLAIN = "vanilla"
LENGTHS = (2, 9, 4, 7, 3, 5)
"""Of made-up responses: modes differ where lengths do."""
TOLERANCE = 1e-6


def loss_mode_of(actor: DictConfig) -> str:
    """Return the name of the actor's policy loss."""
    return str((actor.get("policy_loss") or {}).get("loss_mode") or PLAIN)


def loss_weights(config: GradAlignConfig, verl_config: DictConfig) -> str:
    """Return the loss_agg_mode by which scores weigh tokens: the configured one, else the policy loss's own."""
    if config.loss_agg_mode is not None:
        return config.loss_agg_mode
    modes, named = matching_modes(verl_config), str(verl_config.actor_rollout_ref.actor.loss_agg_mode)
    return named if named in modes or not modes else modes[0]


def matching_modes(verl_config: DictConfig) -> list[str]:
    """Return the values of loss_agg_mode whose token coefficients the policy loss has, up to a constant factor.

    Where a rollout correction weighs tokens, each coefficient is multiplied by its token's weight, or there is none.
    None for a loss that draws at random, or that asks for more than verl's vanilla loss is given.
    Source: the losses of verl.trainer.ppo.core_algos, called as verl.workers.utils.losses.ppo_loss does.
    """
    actor = verl_config.actor_rollout_ref.actor
    if loss_mode_of(actor) == PLAIN:
        return [str(actor.loss_agg_mode)]
    generator = torch.Generator().manual_seed(0)
    mask_RT = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).double()
    # Large, so that a loss which treats outliers apart meets some.
    advantage_RT = 3 * torch.randn(len(LENGTHS), 1, generator=generator, dtype=torch.float64) * mask_RT
    log_prob_RT = -6 * torch.rand(mask_RT.shape, generator=generator, dtype=torch.float64) * mask_RT
    correction = correction_of(verl_config)
    is_weighted = correction is not None and bool(correction.get("rollout_is"))
    weight_RT = 0.5 + torch.rand(mask_RT.shape, generator=generator, dtype=torch.float64) if is_weighted else None
    config: Any = omega_conf_to_dataclass(actor)
    config.global_batch_info.update(loss_scale_factor=config.loss_scale_factor)
    loss_fn = get_policy_loss_fn(loss_mode_of(actor))
    try:
        # A loss that draws at random must not draw from what the run draws from.
        with torch.random.fork_rng(devices=[]):
            first_RT, second_RT = (
                _derivative(loss_fn, config, log_prob_RT, advantage_RT, mask_RT, weight_RT) for _ in range(2)
            )
    except Exception:  # a loss of a user's own may want anything
        return []
    if not torch.equal(first_RT, second_RT):
        return []
    scale = float(max(LENGTHS))
    weighted_RT = advantage_RT if weight_RT is None else advantage_RT * weight_RT
    wanted = {mode: token_coefficients(weighted_RT, mask_RT, mode, scale) for mode in LOSS_AGG_MODES}
    return [mode for mode, coefficient_RT in wanted.items() if _are_parallel(first_RT, coefficient_RT)]


def _derivative(
    loss_fn: Callable[..., tuple[Tensor, Any]],
    config: Any,
    log_prob_RT: Tensor,
    advantage_RT: Tensor,
    mask_RT: Tensor,
    weight_RT: Tensor | None,
) -> Tensor:
    """Return the policy loss's derivative by each token's log-probability, at the policy that sampled."""
    leaf_RT = log_prob_RT.clone().requires_grad_()
    loss, _ = loss_fn(
        old_log_prob=log_prob_RT,
        log_prob=leaf_RT,
        advantages=advantage_RT,
        response_mask=mask_RT.bool(),
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=weight_RT,
    )
    return torch.autograd.grad(loss, leaf_RT)[0]


def _are_parallel(first_RT: Tensor, second_RT: Tensor) -> bool:
    cosine = torch.nn.functional.cosine_similarity(first_RT.flatten(), second_RT.flatten(), dim=0)
    return bool(cosine > 1 - TOLERANCE)
