# SPDX-License-Identifier: Apache-2.0
"""What is read from finished rollouts, with TransferQueue replaced by one table."""

import math
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, compute_policy_loss_vanilla
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.workers.config import FSDPActorConfig

from tests.unit.shelf import BATCH, KEYS, PROBLEMS, nested, shelved, verl_config
from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration import advantages, coefficients
from verl_gradalign.integration import reading as groups
from verl_gradalign.integration.coefficients import cancels
from verl_gradalign.integration.engine import of_tokens
from verl_gradalign.integration.reading import read_groups
from verl_gradalign.integration.rollouts import needs_completion, stored_rows
from verl_gradalign.selection.groups import halved, keys_by_uid, session_of


@pytest.fixture
def stored(monkeypatch):
    return shelved(monkeypatch)


OF_TOKENS = "reinforce_plus_plus"
"""An estimator by which tokens of a response may have different advantages."""


def test_live_groups_get_coefficients_and_dead_ones_zeros(stored):
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("grpo"))
    assert a.is_live and not b.is_live
    assert a.rewards == (1.0, 0.0) and b.rewards == (1.0, 1.0)
    assert (a.num_tokens, a.success_rate(0.0), b.success_rate(0.0)) == (10, 0.5, 1.0)
    assert a.coefficients[0] < 0 < a.coefficients[1] and b.coefficients == (0.0, 0.0)
    assert a.advantages[0] > 0 > a.advantages[1] and b.advantages == (0.0, 0.0)
    assert not stored.stored  # they travel with the request for a score


def test_coefficients_are_stored_for_passes_of_ours_alone(stored):
    """An update that measures takes its own loss apart; the direction is made of the trusted groups before it."""
    config = GradAlignConfig.from_mapping(
        {"validation": {"files": ["trusted"]}, "schedule": "forecast", "measure": "update", "score": "dot"}
    )
    a, _ = read_groups(PROBLEMS, BATCH, set(), config, verl_config(OF_TOKENS))
    assert a.is_live and a.coefficients and not stored.stored
    trusted = [replace(problem, trusted_set="default") for problem in PROBLEMS]
    read_groups(trusted, BATCH, set(), config, verl_config(OF_TOKENS))
    assert len(stored.stored) == 1


def test_halves_depend_on_what_was_answered_and_not_on_which_session_answered():
    """Requests reach the rollout in any order; outputs of a session stay together, and halves differ by one at most."""
    answers = [b"one", b"two", b"two", b"three", b"four", b"five", b"six"]
    found = []
    for seed in range(4):
        sessions = random.Random(seed).sample(range(len(answers)), len(answers))
        content = {
            f"a_{s}_{o}": (answer, bytes([o])) for s, answer in zip(sessions, answers, strict=True) for o in (0, 1)
        }
        split = halved(keys_by_uid(content)["a"], content)
        assert [half for half, _ in split] == [0] * 8 + [1] * 6
        assert [key.endswith("_0") for _, key in split] == [True, False] * 7
        assert len({session_of(key) for half, key in split if half == 0}) == 4
        found.append([(half, content[key]) for half, key in split])
    assert all(each == found[0] for each in found)


def test_a_row_whose_tokens_differ_has_no_advantage_of_its_own(stored, monkeypatch):
    """A critic's advantages differ from token to token."""
    values = torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.0, 0.0], [0.3, 0.3, 0.0]])
    monkeypatch.setattr(coefficients, "compute_advantages", lambda *_: values)
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("reinforce_plus_plus"))
    assert math.isnan(a.advantages[0]) and a.advantages[1] == 1.0
    assert math.isnan(a.coefficients[0]) and a.coefficients[1] == pytest.approx(-0.2)
    assert sorted(b.advantages) == pytest.approx([0.3, 0.5])


def test_a_failed_group_is_neither_live_nor_read(stored):
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    table = BATCH.select_keys(KEYS)
    a, b = read_groups([*PROBLEMS], table, {"a", "b"}, config, verl_config("grpo"))
    assert a.is_failed and b.is_failed and not a.rewards and not stored.stored
    assert a.keys == ("a_0_0", "a_1_0")


SCORES = {
    "measured": {"validation": {"files": ["trusted"]}},
    "rewards alone": {"score": "accuracy_band"},
    "random": {"score": "random"},
}
SCORED_BY = pytest.mark.parametrize("values", SCORES.values(), ids=SCORES)


def with_rewards(stored, **rewards):
    """Give the rows other rewards; None: none at all."""
    for key, reward in rewards.items():
        if reward is None:
            del stored.columns["rm_scores"][key]
        else:
            stored.columns["rm_scores"][key][-1] = reward


@SCORED_BY
@pytest.mark.parametrize("estimator", ["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo"])
@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf, None])
def test_a_group_without_a_number_for_a_reward_fails_and_leaves_the_others_untouched(stored, values, estimator, reward):
    """Also under REINFORCE++, which normalises over the batch."""
    config = GradAlignConfig.from_mapping(values)
    (alone,) = read_groups(PROBLEMS[:1], BATCH, set(), config, verl_config(estimator))
    with_rewards(stored, b_1_0=reward)
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config(estimator))
    assert (b.is_failed, b.failure, b.is_live, b.rewards) == (True, "reward_not_finite", False, ())
    assert math.isnan(b.success_rate(0.0)) and b.num_response_tokens == 4  # they were generated, and are billed
    assert a == alone and a.is_live and a.rewards == (1.0, 0.0)


@SCORED_BY
def test_where_no_group_has_a_number_for_a_reward_nothing_is_computed(stored, values):
    with_rewards(stored, a_0_0=None, b_0_0=math.nan)
    a, b = read_groups(PROBLEMS, BATCH, set(), GradAlignConfig.from_mapping(values), verl_config("grpo"))
    assert a.failure == b.failure == "reward_not_finite" and a.is_failed and b.is_failed and not stored.stored


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | st.floats(width=32), min_size=4, max_size=4))
def test_whatever_the_rewards_what_is_stored_is_finite_and_only_groups_of_numbers_do_not_fail(rewards):
    with pytest.MonkeyPatch.context() as patch:
        shelf = shelved(patch)
        with_rewards(shelf, **dict(zip(KEYS, rewards, strict=True)))
        found = read_groups(
            PROBLEMS, BATCH, set(), GradAlignConfig.from_mapping(SCORES["measured"]), verl_config("reinforce_plus_plus")
        )
    for group, mine in zip(found, (rewards[:2], rewards[2:]), strict=True):
        is_number = all(reward is not None and math.isfinite(reward) for reward in mine)
        assert group.is_failed or is_number
        assert not (group.is_failed and group.is_live)
    for call in shelf.stored:
        assert all(row.isfinite().all() for row in call["fields"][groups.COEFFICIENTS].unbind())


NUMBERS = st.floats() | st.integers() | st.booleans() | st.floats(width=32).map(np.float32)
REWARDS = st.recursive(
    st.none() | NUMBERS | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=2) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=2),
)


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")), deadline=None)
@given(st.lists(REWARDS, min_size=4, max_size=4))
def test_whatever_a_reward_function_returns_no_group_is_kept_without_finite_numbers(rewards):
    """As verl stores it, or fails to: a response whose reward cannot be stored fails its group."""
    with pytest.MonkeyPatch.context() as patch:
        shelf, failed = shelved(patch), set()
        for key, reward in zip(KEYS, rewards, strict=True):
            output = AgentLoopOutput(
                prompt_ids=[1], response_ids=[2, 3], response_mask=[1, 1], metrics=AgentLoopMetrics()
            )
            output.reward_score = reward
            try:
                stored = output.as_dict().get("rm_scores")
            except Exception:
                failed.add(key[0])
                continue
            with_rewards(shelf, **{key: None if stored is None else stored[-1]})
        config = GradAlignConfig.from_mapping(SCORES["measured"])
        found = read_groups(PROBLEMS, BATCH, failed, config, verl_config("grpo"))
    for group in found:
        mine = (
            [float(r) for r, key in zip(rewards, KEYS, strict=True) if key[0] == group.problem.uid]
            if (not group.is_failed)
            else []
        )
        assert all(math.isfinite(reward) for reward in (*mine, *group.rewards))
        assert not (group.is_failed and (group.is_live or group.rewards))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_critics_value_that_is_not_finite_fails_its_group_alone(stored, bad):
    config = GradAlignConfig.from_mapping(SCORES["measured"])
    rows = stored.columns["response_mask"].items()
    stored.columns["values"] = {key: torch.full_like(mask, 0.25, dtype=torch.float32) for key, mask in rows}
    (alone,) = read_groups(PROBLEMS[:1], BATCH, set(), config, verl_config("gae"))
    stored.columns["values"]["b_0_0"][0] = bad
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("gae"))
    assert b.is_failed and b.failure == "non_finite" and not b.is_live
    assert not a.is_failed and a.is_live and not alone.is_failed  # GAE whitens over the rows that are left
    assert a.coefficients == pytest.approx(alone.coefficients, nan_ok=True)


def test_an_advantage_that_is_not_finite_fails_its_group(stored, monkeypatch):
    values = torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, -1.0], [math.nan, 0.0, 0.0], [0.3, 0.3, 0.0]])
    monkeypatch.setattr(coefficients, "compute_advantages", lambda *_: values)
    config = GradAlignConfig.from_mapping(SCORES["measured"])
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("reinforce_plus_plus"))
    assert b.is_failed and b.failure == "non_finite" and not b.is_live and a.is_live
    rows = list(stored.stored[0]["fields"][groups.COEFFICIENTS].unbind())
    assert not rows[2].any() and not rows[3].any() and rows[0].any()


def test_log_probs_of_the_rollout_fail_a_group_where_the_loss_reads_them(stored):
    config = GradAlignConfig.from_mapping({"score": "random"})
    rows = stored.columns["response_mask"].items()
    stored.columns["rollout_log_probs"] = {key: torch.full_like(mask, -0.5, dtype=torch.float32) for key, mask in rows}
    stored.columns["rollout_log_probs"]["b_0_0"][0] = -math.inf
    verl = verl_config("grpo")
    assert [g.is_failed for g in read_groups(PROBLEMS, BATCH, set(), config, verl)] == [False, False]
    verl.algorithm.rollout_correction = {"rollout_is": "token"}
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl)
    assert not a.is_failed and b.is_failed and b.failure == "non_finite"


def test_random_stores_nothing_and_needs_no_advantages(stored, monkeypatch):
    """GAE needs a critic's values, which do not exist yet when groups are selected. No estimator is asked either."""
    monkeypatch.setattr(groups, "asked", lambda *_: pytest.fail("an estimator was asked"))
    config = GradAlignConfig.from_mapping({"score": "random"})
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("gae"))
    assert (a.is_live, b.is_live) == (True, False)
    assert a.rewards == (1.0, 0.0) and not stored.stored


def test_a_step_that_scores_nothing_stores_nothing(stored):
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("gae"), is_scored=False)
    assert (a.is_live, b.is_live, a.advantages) == (True, False, ()) and not stored.stored


def test_equal_responses_with_unequal_rewards_have_no_gradient():
    coefficients = torch.tensor([[0.5], [0.5], [-0.75], [-0.25]])
    assert cancels(["one", "one", "one", "one"], coefficients)
    assert not cancels(["one", "one", "one", "two"], coefficients)
    assert cancels(["one", "two", "one", "two"], torch.tensor([[0.5], [0.5], [-0.5], [-0.5]]))


@pytest.mark.parametrize("estimator", ["grpo", "rloo", "grpo_passk"])
def test_one_token_stands_for_all_where_advantages_are_of_rewards_alone(stored, monkeypatch, estimator):
    """To the bit: also where the loss masks tokens, or all of them."""
    stored.columns["response_mask"] |= {"a_1_0": torch.tensor([0, 1, 0]), "b_0_0": torch.tensor([0])}
    stored.columns["rm_scores"]["b_0_0"] = torch.tensor([0.5])
    config, verl = GradAlignConfig.from_mapping(SCORES["measured"]), verl_config(estimator)
    assert advantages.asked(config, verl).is_of_sums
    short = read_groups(PROBLEMS, BATCH, set(), config, verl)
    monkeypatch.setattr(coefficients, "asked", lambda *_: replace(advantages.asked(config, verl), is_of_sums=False))
    assert read_groups(PROBLEMS, BATCH, set(), config, verl) == short and short[0].is_live
    (call,) = stored.stored
    coefficient_of = {key: c for group in short for key, c in zip(group.keys, group.coefficients, strict=True)}
    masks = [stored.columns["response_mask"][key] for key in KEYS]
    expanded = of_tokens([coefficient_of[key] for key in KEYS], masks)
    for row, whole in zip(expanded, call["fields"][groups.COEFFICIENTS].unbind(), strict=True):
        assert torch.equal(row, whole) and row.dtype == whole.dtype


def test_rows_without_a_coefficient_for_all_tokens_need_a_column_of_them():
    with pytest.raises(RuntimeError, match="without the column gradalign_coefficients"):
        of_tokens([1.0, math.nan], [torch.ones(2), torch.ones(3)])


def test_rows_are_read_in_parts_where_advantages_are_of_each_group_alone(stored, monkeypatch):
    """One group more than a part holds is a part of its own; what normalises over all rows gets all of them."""
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    for estimator, num_parts in (("grpo", 2), ("reinforce_plus_plus", 1)):
        monkeypatch.setattr(groups, "ROWS_AT_ONCE", 4096)
        whole = read_groups(PROBLEMS, BATCH, set(), config, verl_config(estimator))
        monkeypatch.setattr(groups, "ROWS_AT_ONCE", 1)
        stored.num_read = 0
        assert read_groups(PROBLEMS, BATCH, set(), config, verl_config(estimator)) == whole
        assert stored.num_read == num_parts


CORRECTIONS = {
    "token": {"rollout_is": "token", "rollout_is_threshold": 1.5},
    "sequence": {"rollout_is": "sequence", "rollout_is_threshold": 2.0},
    "both bounds": {"rollout_is": "token", "rollout_is_threshold": "0.8_1.25"},
    "over all rows": {"rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True},
    "masked tokens": {"rollout_rs": "token_k1", "rollout_rs_threshold": "0.7_1.4"},
    "masked rows": {"rollout_rs": "seq_sum_k1", "rollout_rs_threshold": "0.6_1.6"},
    "masked and weighted": {"rollout_is": "token", "rollout_rs": "seq_max_k2", "rollout_rs_threshold": 0.1},
}


def losses_derivative(columns, correction, loss_agg_mode, config):
    """Return verl's own derivative of its loss by each token's log-prob, after its own correction and advantages."""
    names = ("old_log_probs", "rollout_log_probs", "response_mask", "rm_scores")
    rows = {name: torch.nested.to_padded_tensor(nested(list(columns[name].values())), 0) for name in names}
    data = DataProto(batch=TensorDict(rows, batch_size=4))
    data, _ = compute_rollout_correction_and_add_to_batch(data, OmegaConf.create(correction))
    mask_RT, old_RT = data.batch["response_mask"], data.batch["old_log_probs"]
    advantage_RT, _ = compute_grpo_outcome_advantage(data.batch["rm_scores"], mask_RT, np.array(["a", "a", "b", "b"]))
    leaf_RT = old_RT.clone().requires_grad_()
    weight_RT = data.batch.get("rollout_is_weights")
    loss, _ = compute_policy_loss_vanilla(
        old_RT, leaf_RT, advantage_RT, mask_RT, loss_agg_mode, config, rollout_is_weights=weight_RT
    )
    return torch.autograd.grad(loss, leaf_RT)[0]


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_coefficients_are_corrected_as_verls_loss_is(stored, name, loss_agg_mode):
    """Up to a factor that all rows of a group share."""
    torch.manual_seed(3)
    stored.columns["rm_scores"]["b_1_0"] = torch.tensor([0.0, 0.25])
    for column, spread in (("old_log_probs", 0.0), ("rollout_log_probs", 0.5)):
        lengths = {key: len(mask) for key, mask in stored.columns["response_mask"].items()}
        stored.columns[column] = {key: -1.0 + spread * torch.randn(n) for key, n in lengths.items()}
    verl = verl_config("grpo")
    verl.algorithm.rollout_correction = CORRECTIONS[name]
    verl.actor_rollout_ref.actor.loss_agg_mode = loss_agg_mode
    config = GradAlignConfig.from_mapping(SCORES["measured"])
    found = read_groups(PROBLEMS, BATCH, set(), config, verl)
    rows = dict(zip(KEYS, stored.stored[0]["fields"][groups.COEFFICIENTS].unbind(), strict=True))
    actor = FSDPActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=True)
    expected_RT = losses_derivative(stored.columns, CORRECTIONS[name], loss_agg_mode, actor)
    for place, group in enumerate(found):
        mine = torch.cat([rows[key] for key in KEYS[2 * place : 2 * place + 2]])
        wanted = torch.cat([expected_RT[row][: len(rows[KEYS[row]])] for row in (2 * place, 2 * place + 1)])
        assert group.is_live == bool(wanted.any()) == bool(mine.any())
        torch.testing.assert_close(mine / mine.norm().clamp(min=1e-9), wanted / wanted.norm().clamp(min=1e-9))
        # One coefficient of a response is known as such, so that its derivative is known by it.
        for key, coefficient in zip(group.keys, group.coefficients, strict=True):
            of_row = rows[key]
            assert math.isnan(coefficient) or bool((of_row == coefficient).all())


def test_weights_over_all_rows_are_computed_of_all_rows(stored, monkeypatch):
    monkeypatch.setattr(groups, "ROWS_AT_ONCE", 1)
    for column in ("old_log_probs", "rollout_log_probs"):
        masks = stored.columns["response_mask"].items()
        stored.columns[column] = {key: -mask.float() for key, mask in masks}
    config, verl = GradAlignConfig.from_mapping(SCORES["measured"]), verl_config("grpo")
    for name, num_parts in (("token", 2), ("over all rows", 1)):
        verl.algorithm.rollout_correction = CORRECTIONS[name]
        stored.num_read = 0
        read_groups(PROBLEMS, BATCH, set(), config, verl)
        assert stored.num_read == len(stored.stored) == num_parts
        stored.stored.clear()


def test_the_actors_log_probs_are_asked_for_where_a_pass_of_ours_needs_them(stored):
    """An update that measures its rows corrects them itself: the direction's are needed alone."""
    config, verl = GradAlignConfig.from_mapping(SCORES["measured"]), verl_config("grpo")
    verl.reward = {"reward_model": {"enable": False}}
    assert not needs_completion(config, verl, is_scored=True)
    verl.algorithm.rollout_correction = CORRECTIONS["token"]
    assert needs_completion(config, verl, is_scored=True) and not needs_completion(config, verl, is_scored=False)
    assert not needs_completion(GradAlignConfig.from_mapping({"score": "random"}), verl, is_scored=True)
    taken = [PROBLEMS[0], replace(PROBLEMS[1], trusted_set="default")]
    assert stored_rows(BATCH, taken, config).keys == KEYS
    in_update = {"schedule": "forecast", "measure": "update", "score": "dot"}
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}, **in_update})
    assert stored_rows(BATCH, taken, config).keys == KEYS[2:]
    # So candidates are read without them.
    stored.columns["rollout_log_probs"] = {key: -mask.float() for key, mask in stored.columns["response_mask"].items()}
    (group,) = read_groups(PROBLEMS[:1], BATCH, set(), config, verl)
    assert group.is_live and not stored.stored
    for key, value in (("bypass_mode", True), ("rollout_is", None)):
        verl.algorithm.rollout_correction = {**CORRECTIONS["token"], key: value}
        assert not needs_completion(config, verl, is_scored=True)
    verl.algorithm.rollout_correction = CORRECTIONS["token"]
    verl.actor_rollout_ref.rollout.calculate_log_probs = False
    assert not needs_completion(config, verl, is_scored=True)
