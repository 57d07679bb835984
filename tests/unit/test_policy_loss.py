# SPDX-License-Identifier: Apache-2.0
"""Every policy loss that verl has registered is known by the gradient that it takes."""

import copy

import pytest
import torch
import verl  # noqa: F401  (loads the plugin)
from hydra import compose, initialize_config_module
from omegaconf import open_dict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, agg_loss, register_policy_loss

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.policy_loss import loss_weights, matching_modes
from verl_gradalign.probe.objective import LOSS_AGG_MODES

# At the policy that sampled; what verl 0.9.1 says of each in its code.
AS_CONFIGURED = ("vanilla", "gspo", "cispo", "gpg", "dppo_tv", "dppo_kl", "dro", "kl_cov", "bypass_mode")
MEANS_OF_MEANS = ("sapo", "geo_mean")
# It leaves tokens out at random.
UNKNOWN = ("clip_cov",)
# Within a problem these differ by a factor only, which no score of it sees.
BY_RESPONSE = {"token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-mean"}


@pytest.fixture(scope="module")
def composed():
    with initialize_config_module("verl.trainer.config", version_base=None):
        overrides = ["actor_rollout_ref.rollout.n=8", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]
        return compose("ppo_trainer", overrides=overrides)


def with_loss(composed, loss_mode, loss_agg_mode, **correction):
    verl_config = copy.deepcopy(composed)
    actor = verl_config.actor_rollout_ref.actor
    with open_dict(verl_config):
        actor.loss_agg_mode, actor.policy_loss.loss_mode = loss_agg_mode, loss_mode
        actor.policy_loss.dro_beta = 0.5
        verl_config.actor_rollout_ref.rollout.calculate_log_probs = True
        verl_config.algorithm.rollout_correction.update(correction)
    return verl_config


def test_every_registered_loss_is_sorted_here():
    assert set(POLICY_LOSS_REGISTRY) == {*AS_CONFIGURED, *MEANS_OF_MEANS, *UNKNOWN}


@pytest.mark.parametrize("loss_agg_mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("loss_mode", [*AS_CONFIGURED, *MEANS_OF_MEANS, *UNKNOWN])
def test_a_loss_has_the_token_weights_that_are_measured_of_it(composed, loss_mode, loss_agg_mode):
    found = matching_modes(with_loss(composed, loss_mode, loss_agg_mode))
    if loss_mode in UNKNOWN:
        assert found == []
    elif loss_mode in MEANS_OF_MEANS:
        assert found == ["seq-mean-token-mean"]
    else:
        assert loss_agg_mode in found
        assert set(found) <= (BY_RESPONSE if loss_agg_mode in BY_RESPONSE else {loss_agg_mode})


@pytest.mark.parametrize("loss_mode", [*AS_CONFIGURED, *MEANS_OF_MEANS, *UNKNOWN])
def test_a_losss_weights_are_multiplied_by_those_of_a_rollout_correction_or_it_is_unknown(composed, loss_mode):
    """`geo_mean` takes the geometric mean of a response's, `bypass_mode` computes its own."""
    plain = matching_modes(with_loss(composed, loss_mode, "seq-mean-token-mean"))
    found = matching_modes(with_loss(composed, loss_mode, "seq-mean-token-mean", rollout_is="token"))
    assert found == ([] if loss_mode in ("geo_mean", "bypass_mode") else plain)


def test_measuring_a_loss_that_draws_at_random_leaves_the_runs_own_draws_alone(composed):
    state = torch.get_rng_state()
    matching_modes(with_loss(composed, "clip_cov", "token-mean"))
    assert torch.equal(torch.get_rng_state(), state)


def test_scores_weigh_tokens_as_the_loss_does_unless_told_otherwise(composed):
    plain, named = GradAlignConfig(), GradAlignConfig(loss_agg_mode="token-sum")
    assert loss_weights(plain, with_loss(composed, "gspo", "token-mean")) == "token-mean"
    assert loss_weights(plain, with_loss(composed, "sapo", "token-mean")) == "seq-mean-token-mean"
    assert loss_weights(named, with_loss(composed, "sapo", "token-mean")) == "token-sum"


def test_a_loss_of_a_users_own_is_measured_too(composed):
    @register_policy_loss("first_token")
    def first_token(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="", config=None, **_):
        return -(advantages * (log_prob - old_log_prob).exp())[:, 0].mean(), {}

    @register_policy_loss("plain_sum")
    def plain_sum(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode="", config=None, **_):
        ratio = torch.exp(log_prob - old_log_prob)
        return agg_loss(-advantages * ratio, response_mask, "seq-mean-token-mean"), {}

    try:
        assert matching_modes(with_loss(composed, "first_token", "token-mean")) == []
        assert matching_modes(with_loss(composed, "plain_sum", "token-mean")) == ["seq-mean-token-mean"]
    finally:
        del POLICY_LOSS_REGISTRY["first_token"], POLICY_LOSS_REGISTRY["plain_sum"]
