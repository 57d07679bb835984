# SPDX-License-Identifier: Apache-2.0
"""Advantages that groups are scored with before a selection: verl's own, wherever rewards and groups suffice for them.

Whether they do is found by asking: verl's function of the estimator, a user's own too, is called with made-up rewards.
What asks for more than that (a baseline of another rollout, statistics of the actor's pass) is scored with rewards less
the group's mean, and that is said. A KL penalty in the reward is of log-probs that are not there yet; it is left out,
as one in the loss is.

Shape legend: R rows, T response tokens.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse
from verl_gradalign.selection.scores import score_of

logger = logging.getLogger(__name__)

GAE = "gae"
"""Needs a critic's values, which are asked for before the selection."""


@dataclass(frozen=True)
class Asked:
    """What verl's function of an estimator says to made-up rewards."""

    lacks: str | None = None
    """Why it gives no advantages of rewards and groups alone; None if it does."""
    is_of_each_group: bool = True
    """Whether a group's advantages are the same whatever other groups they are computed with; some normalise over all
    rows."""
    is_of_each_response: bool = True
    """Whether all tokens of a response have the same."""
    is_of_sums: bool = False
    """Whether it sees the sum of a response's rewards alone, so that one token may stand for all. Of verl's own only:
    another may look at lengths in a way that the made-up ones do not show."""
    is_of_one: bool = False
    """Whether a response that is alone in its group has an advantage too: in most functions its reward itself."""


OF_CRITIC = Asked(is_of_each_group=False, is_of_each_response=False, is_of_one=True)
CENTRED = Asked(is_of_sums=True)


def asked(config: GradAlignConfig, verl_config: DictConfig) -> Asked:
    """Return what is known of the advantages that groups are scored with."""
    if uses_critic(config, verl_config):
        return OF_CRITIC
    if config.advantage == "centred":
        return CENTRED
    algorithm = verl_config.algorithm
    function = ADV_ESTIMATOR_REGISTRY.get(algorithm.adv_estimator)
    rollout_n = verl_config.actor_rollout_ref.rollout.n
    # Once in a run: a function of a user's own might keep a baseline of what it is given.
    question = function, repr(algorithm), rollout_n
    if question not in _ANSWERS:
        _ANSWERS[question] = _ask(function, algorithm, rollout_n)
    return _ANSWERS[question]


_ANSWERS: dict[tuple[Any, str, int], Asked] = {}


def _ask(function: Callable[..., Any] | None, algorithm: DictConfig, rollout_n: int) -> Asked:
    if function is None:
        return Asked(lacks="verl knows no such estimator")
    parts = {
        "algorithm": OmegaConf.create(OmegaConf.to_yaml(algorithm)),
        "actor_rollout_ref": {"rollout": {"n": rollout_n}},
    }
    verl_config = OmegaConf.create(parts)
    # Two groups of three, whose rewards have other means and spreads, and whose responses have other lengths.
    mask_RT = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1], [1, 0]])
    reward_RT = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 3.0], [0.0, 1.0], [0.0, 0.0]])
    # The same, not all at a response's end.
    spread_RT = torch.tensor([[0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [2.0, 1.0], [0.25, 0.75], [0.0, 0.0]])
    keys = [f"{uid}_{k}_0" for uid in "ab" for k in range(3)]
    alone = [f"{uid}_0_0" for uid in "abcdef"]

    def of_rows(mask_RT: Tensor, reward_RT: Tensor, keys: Sequence[str]) -> Tensor:
        columns = {"response_mask": mask_RT, "rm_scores": reward_RT}
        return verl_advantages(columns, keys, verl_config) * mask_RT

    try:
        advantage_RT = of_rows(mask_RT, reward_RT, keys)
        apart_RT = torch.cat([of_rows(mask_RT[rows], reward_RT[rows], keys[rows]) for rows in (slice(3), slice(3, 6))])
        sum_RT = of_rows(mask_RT[:, :1], reward_RT.sum(dim=1, keepdim=True), keys) * mask_RT
        is_of_sums = torch.equal(sum_RT, advantage_RT) and torch.equal(sum_RT, of_rows(mask_RT, spread_RT, keys))
    except Exception as error:  # an estimator of a user's own may want anything
        return Asked(lacks=f"verl's function says {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if not advantage_RT.isfinite().all():
        return Asked(lacks="verl's function gives numbers that are not finite")
    try:
        lone_RT = of_rows(mask_RT, reward_RT, alone)
        is_of_one = bool(lone_RT.isfinite().all() and lone_RT.any())
    except Exception:  # verl's pass@k wants two of a group, and says so
        is_of_one = False
    return Asked(
        is_of_each_group=torch.allclose(apart_RT, advantage_RT),
        is_of_each_response=torch.equal(advantage_RT[:, :1] * mask_RT, advantage_RT),
        is_of_sums=is_of_sums and function.__module__.startswith("verl."),
        is_of_one=is_of_one,
    )


def uses_critic(config: GradAlignConfig, verl_config: DictConfig) -> bool:
    """Return whether groups are scored with the advantages of a critic's values, which are asked for before."""
    return bool(verl_config.algorithm.adv_estimator == GAE and config.advantage == "trainer")


def scored_advantage(config: GradAlignConfig, verl_config: DictConfig) -> str:
    """Return which advantages groups are scored with: `trainer`, or `centred` if asked for or if there is no other."""
    return config.advantage if asked(config, verl_config).lacks is None else "centred"


def needs_values(config: GradAlignConfig, verl_config: DictConfig) -> bool:
    """Return whether the advantages that candidates are scored with need a critic's values."""
    return uses_critic(config, verl_config) and score_of(config.score).needs_gradients


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
    sum_G = reward_R.new_zeros(len(place_of)).index_add_(0, group_R, reward_R)
    centred_R = reward_R - (sum_G / group_R.bincount())[group_R]
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


def check_advantages(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Say by how much the scored advantages differ from those of training, if they do.

    Raises: ValueError if verl knows no such estimator.
    """
    algorithm = verl_config.algorithm
    lacks = asked(config, verl_config).lacks
    if lacks is not None and algorithm.adv_estimator not in ADV_ESTIMATOR_REGISTRY:
        remedy = "correct it, or name the module that registers it in VERL_USE_EXTERNAL_MODULES"
        refuse("algorithm.adv_estimator", algorithm.adv_estimator, lacks, remedy)
    if lacks is not None:
        logger.warning(
            "algorithm.adv_estimator=%s: its advantages are not known when groups are scored, which are scored with "
            "rewards less the group's mean (gradalign.advantage=centred); %s",
            algorithm.adv_estimator,
            lacks,
        )
    if algorithm.use_kl_in_reward:
        logger.warning(
            "algorithm.use_kl_in_reward=True: scores leave the KL penalty out, as they do one in the loss: its "
            "log-probs are not there when groups are scored. Groups whose rewards are equal count as dead"
        )


def _uid(key: str) -> str:
    return key.split("_", 1)[0]
