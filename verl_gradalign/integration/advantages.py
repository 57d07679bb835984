# SPDX-License-Identifier: Apache-2.0
"""Advantages that groups are scored with before a selection: verl's own, wherever rewards and groups suffice for them.

Whether they do is found by asking: verl's function of the estimator, a user's own too, is called with made-up rewards.
What asks for more than that (a baseline of another rollout, statistics of the actor's pass) is scored with rewards less
the group's mean, and that is said. A KL penalty in the reward is of log-probs that are not there yet; it is left out,
as one in the loss is.

Shape legend: R rows, T response tokens.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl.protocol import DataProto
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.selection.scores import score_of

logger = logging.getLogger(__name__)

GAE = "gae"
"""Needs a critic's values, which are asked for before the selection."""


def scored_advantage(config: GradAlignConfig, verl_config: DictConfig) -> str:
    """Return which advantages groups are scored with: `trainer`, or `centred` if asked for or if there is no other."""
    if config.advantage == "centred" or verl_config.algorithm.adv_estimator == GAE:
        return config.advantage
    return "trainer" if follows_from_rewards(verl_config) else "centred"


def needs_values(config: GradAlignConfig, verl_config: DictConfig) -> bool:
    """Return whether the advantages that candidates are scored with need a critic's values."""
    is_gae = verl_config.algorithm.adv_estimator == GAE and config.advantage == "trainer"
    return is_gae and score_of(config.score).needs_gradients


def follows_from_rewards(verl_config: DictConfig) -> bool:
    """Return whether verl's advantages can be computed of rewards and groups alone."""
    columns, keys = _made_up()
    try:
        advantage_RT = verl_advantages(columns, keys, verl_config)
    except Exception:  # an estimator of a user's own may want anything
        return False
    return bool(advantage_RT.isfinite().all())


def are_of_each_group(config: GradAlignConfig, verl_config: DictConfig) -> bool:
    """Return whether a group's advantages are the same whatever other groups they are computed with.

    Some of verl's functions normalise over all rows; a critic's do.
    """
    if verl_config.algorithm.adv_estimator == GAE and config.advantage == "trainer":
        return False
    columns, keys = _made_up()
    together_RT = compute_advantages(columns, keys, config, verl_config)
    halves = [slice(0, 3), slice(3, None)]
    apart = [
        compute_advantages({name: column[rows] for name, column in columns.items()}, keys[rows], config, verl_config)
        for rows in halves
    ]
    return torch.allclose(torch.cat(apart), together_RT)


def _made_up() -> tuple[dict[str, Tensor], list[str]]:
    """Return the rows of two groups, by column, and their keys. Rewards of the two have other means and spreads."""
    mask_RT = torch.ones(6, 2)
    reward_RT = mask_RT * torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.0, 1.0], [0.0, 0.0]])
    return {"response_mask": mask_RT, "rm_scores": reward_RT}, [f"{uid}_{k}_0" for uid in "ab" for k in range(3)]


def compute_advantages(
    columns: Mapping[str, Tensor] | TensorDict, keys: Sequence[str], config: GradAlignConfig, verl_config: DictConfig
) -> Tensor:
    """Return the advantages that rows are scored with, (rows, tokens).

    `columns` are padded: response_mask, rm_scores, and a critic's values where these are needed (`needs_values`).
    """
    if scored_advantage(config, verl_config) == "trainer":
        return verl_advantages(columns, keys, verl_config)
    reward_R = columns["rm_scores"].sum(dim=1)
    place_of: dict[str, int] = {}
    group_R = torch.tensor([place_of.setdefault(_uid(key), len(place_of)) for key in keys])
    sums_2G = reward_R.new_zeros(2, len(place_of)).index_add_(1, group_R, torch.stack([reward_R, reward_R**0]))
    centred_R = reward_R - (sums_2G[0] / sums_2G[1])[group_R]
    return centred_R.unsqueeze(1) * columns["response_mask"].float()


def verl_advantages(columns: Mapping[str, Tensor] | TensorDict, keys: Sequence[str], verl_config: DictConfig) -> Tensor:
    """Return what verl's trainer computes of rewards without a KL penalty, (rows, tokens)."""
    algorithm = verl_config.algorithm
    given = {"response_mask": columns["response_mask"], "token_level_rewards": columns["rm_scores"]}
    if algorithm.adv_estimator == GAE:
        given["values"] = columns["values"]
    uids = np.array([_uid(key) for key in keys], dtype=object)
    data = compute_advantage_for_multi_trajectories(
        DataProto(batch=TensorDict(given, batch_size=len(keys)), non_tensor_batch={"uid": uids}),
        batch_keys=list(keys),
        adv_estimator=algorithm.adv_estimator,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        num_repeat=verl_config.actor_rollout_ref.rollout.n,
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
        config=algorithm,
    )
    advantage_RT: Tensor = data.batch["advantages"]
    return advantage_RT.float()


def note_advantages(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Say by how much the scored advantages differ from those of training, if they do."""
    algorithm = verl_config.algorithm
    if scored_advantage(config, verl_config) != config.advantage:
        logger.warning(
            "algorithm.adv_estimator=%s: its advantages are not known when groups are scored, which are scored with "
            "rewards less the group's mean (gradalign.advantage=centred)",
            algorithm.adv_estimator,
        )
    if algorithm.use_kl_in_reward:
        logger.warning(
            "algorithm.use_kl_in_reward=True: scores leave the KL penalty out, as they do one in the loss: its "
            "log-probs are not there when groups are scored"
        )


def _uid(key: str) -> str:
    return key.split("_", 1)[0]
