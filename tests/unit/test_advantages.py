# SPDX-License-Identifier: Apache-2.0
"""Advantages before the selection: verl's own where rewards suffice, others centred, and that is said."""

import logging

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, AdvantageEstimator, get_adv_estimator_fn

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.advantages import (
    asked,
    check_advantages,
    compute_advantages,
    needs_values,
    scored_advantage,
)

CONFIG = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
KEYS = ["b_0_0", "a_0_0", "a_1_0", "b_1_0", "a_2_0", "b_2_0"]
MASK_RT = (torch.arange(4) < torch.tensor([[4], [2], [3], [1], [4], [2]])).long()
REWARD_R = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 0.25])
COLUMNS = {
    "response_mask": MASK_RT,
    "rm_scores": torch.zeros(6, 4).scatter(1, MASK_RT.sum(dim=1, keepdim=True) - 1, REWARD_R[:, None]),
    "values": torch.linspace(0, 1, 24).view(6, 4),
}
BY_REWARDS = {
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "gpg",
    "opo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "rloo",
    "rloo_vectorized",
}
OVER_ALL_ROWS = {"gpg", "reinforce_plus_plus", "reinforce_plus_plus_baseline"}
BY_MORE = {"gdpo", "remax", "optimal_token_baseline", "tir_optimal_token_baseline"}


def verl_config(estimator, **algorithm):
    values = {"adv_estimator": estimator, "gamma": 1.0, "lam": 0.9, "use_kl_in_reward": False, **algorithm}
    return OmegaConf.create({"algorithm": values, "actor_rollout_ref": {"rollout": {"n": 3}}})


def test_every_estimator_of_verl_is_known_here():
    assert {str(e.value) for e in AdvantageEstimator} == BY_REWARDS | BY_MORE | {"gae"}


@pytest.mark.parametrize("estimator", sorted(BY_REWARDS))
def test_what_follows_from_rewards_is_what_verls_function_gives(estimator):
    config = verl_config(estimator)
    assert asked(CONFIG, config).lacks is None and scored_advantage(CONFIG, config) == "trainer"
    advantage_RT = compute_advantages(COLUMNS, KEYS, CONFIG, config)
    given = {
        "token_level_rewards": COLUMNS["rm_scores"].clone(),
        "response_mask": MASK_RT,
        "index": np.array([key[0] for key in KEYS], dtype=object),
        "config": config.algorithm,
    }
    expected_RT, _ = get_adv_estimator_fn(estimator)(**given)
    torch.testing.assert_close(advantage_RT * MASK_RT, (expected_RT * MASK_RT).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("estimator", sorted(BY_REWARDS | BY_MORE))
def test_what_is_of_each_group_alone_may_be_computed_apart(estimator):
    config = verl_config(estimator)
    assert asked(CONFIG, config).is_of_each_group == (estimator not in OVER_ALL_ROWS)
    given = {**COLUMNS, "rm_scores": COLUMNS["rm_scores"].clone()}
    given["rm_scores"][5] = 0.0
    together_RT = compute_advantages(given, KEYS, CONFIG, config)
    apart_RT = torch.zeros_like(together_RT)
    for rows in ([0, 3, 5], [1, 2, 4]):
        columns = {name: column[rows] for name, column in given.items()}
        apart_RT[rows] = compute_advantages(columns, [KEYS[row] for row in rows], CONFIG, config)
    assert torch.allclose(apart_RT, together_RT, atol=1e-6) == (estimator not in OVER_ALL_ROWS)


@pytest.mark.parametrize("estimator", sorted(BY_REWARDS | BY_MORE))
def test_most_give_a_response_that_is_alone_its_reward_and_the_others_are_known(estimator):
    found = asked(CONFIG, verl_config(estimator))
    assert found.is_of_one == (estimator not in BY_MORE | {"grpo_passk", "rloo_vectorized"})
    if found.is_of_one and found.is_of_each_group:
        advantage_RT = compute_advantages(COLUMNS, [f"{uid}_0_0" for uid in "abcdef"], CONFIG, verl_config(estimator))
        torch.testing.assert_close(advantage_RT, REWARD_R[:, None] * MASK_RT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", sorted(BY_REWARDS | BY_MORE))
def test_what_is_of_a_responses_reward_alone_is_known(estimator):
    """OPO weighs by lengths; others average over the tokens of all rows."""
    config = verl_config(estimator)
    is_of_sums = estimator not in {"opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"}
    assert asked(CONFIG, config).is_of_sums == (is_of_sums and estimator not in BY_MORE)
    columns = {"rm_scores": REWARD_R[:, None], "response_mask": torch.ones(6, 1, dtype=torch.int64)}
    one_R1 = compute_advantages(columns, KEYS, CONFIG, config)
    whole_RT = compute_advantages(COLUMNS, KEYS, CONFIG, config) * MASK_RT
    assert torch.equal(one_R1 * MASK_RT, whole_RT) == is_of_sums


def test_gpg_is_the_centred_reward_times_one_number():
    advantage_RT = compute_advantages(COLUMNS, KEYS, CONFIG, verl_config("gpg"))
    centred_R = REWARD_R - torch.tensor([5 / 12, 2.5 / 3, 2.5 / 3, 5 / 12, 2.5 / 3, 5 / 12])
    torch.testing.assert_close(advantage_RT, 6 / 4 * centred_R[:, None] * MASK_RT)


@pytest.mark.parametrize("estimator", sorted(BY_MORE))
def test_what_needs_more_is_centred_and_that_is_said(estimator, caplog):
    config = verl_config(estimator)
    assert scored_advantage(CONFIG, config) == "centred"
    own = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}, "advantage": "centred"})
    asked_RT = compute_advantages(COLUMNS, KEYS, own, verl_config("grpo"))
    assert torch.equal(compute_advantages(COLUMNS, KEYS, CONFIG, config), asked_RT)
    torch.testing.assert_close(asked_RT[1:3, 0], REWARD_R[1:3] - 2.5 / 3)
    with caplog.at_level(logging.WARNING):
        check_advantages(CONFIG, config)
    assert f"adv_estimator={estimator}" in caplog.text and "group's mean" in caplog.text
    assert "verl's function says" in caplog.text


def test_an_estimator_of_the_users_own_is_asked(monkeypatch, caplog):
    def by_rewards(token_level_rewards, response_mask, index, **_):
        advantage_RT = token_level_rewards.sum(dim=1, keepdim=True) * response_mask
        return advantage_RT, advantage_RT

    def by_more(token_level_rewards, response_mask, entropy, **_):
        raise AssertionError("not called without entropies")

    def by_last_token(token_level_rewards, response_mask, index, **_):
        last_R = response_mask.sum(dim=1) - 1
        reward_R = token_level_rewards[torch.arange(len(last_R)), last_R]
        advantage_RT = reward_R[:, None] * response_mask.cumsum(dim=1)
        return advantage_RT, advantage_RT

    monkeypatch.setitem(ADV_ESTIMATOR_REGISTRY, "by_last_token", by_last_token)
    found = asked(CONFIG, verl_config("by_last_token"))
    assert found.lacks is None and found.is_of_each_group and not found.is_of_each_response
    monkeypatch.setitem(ADV_ESTIMATOR_REGISTRY, "mine", by_rewards)
    monkeypatch.setitem(ADV_ESTIMATOR_REGISTRY, "theirs", by_more)
    advantage_RT = compute_advantages(COLUMNS, KEYS, CONFIG, verl_config("mine"))
    torch.testing.assert_close(advantage_RT, REWARD_R[:, None] * MASK_RT)
    assert not asked(CONFIG, verl_config("mine")).is_of_sums  # who knows what it does with a longer response
    assert scored_advantage(CONFIG, verl_config("theirs")) == "centred"
    with caplog.at_level(logging.WARNING):
        check_advantages(CONFIG, verl_config("mine"))
    assert not caplog.text


def test_an_estimator_that_verl_lacks_is_refused_unless_its_advantages_are_not_asked_for():
    with pytest.raises(ValueError, match="adv_estimator=gropo: verl knows no such.*VERL_USE_EXTERNAL_MODULES"):
        check_advantages(CONFIG, verl_config("gropo"))
    own = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}, "advantage": "centred"})
    check_advantages(own, verl_config("gropo"))


def test_discounted_returns_differ_from_token_to_token():
    assert asked(CONFIG, verl_config("reinforce_plus_plus")).is_of_each_response
    assert not asked(CONFIG, verl_config("reinforce_plus_plus", gamma=0.9)).is_of_each_response


def test_gae_takes_a_critics_values():
    config = verl_config("gae")
    assert scored_advantage(CONFIG, config) == "trainer" and needs_values(CONFIG, config)
    advantage_RT = compute_advantages(COLUMNS, KEYS, CONFIG, config)
    assert len(advantage_RT[0].unique()) == 4
    assert not asked(CONFIG, config).is_of_each_group and not asked(CONFIG, config).is_of_each_response


def test_a_kl_penalty_in_the_reward_is_left_out_and_that_is_said(caplog):
    with_kl = verl_config("grpo", use_kl_in_reward=True)
    plain_RT = compute_advantages(COLUMNS, KEYS, CONFIG, verl_config("grpo"))
    assert torch.equal(compute_advantages(COLUMNS, KEYS, CONFIG, with_kl), plain_RT)
    with caplog.at_level(logging.WARNING):
        check_advantages(CONFIG, with_kl)
    assert "use_kl_in_reward=True: scores leave the KL penalty out" in caplog.text
