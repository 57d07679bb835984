# SPDX-License-Identifier: Apache-2.0
"""What is read from finished rollouts, with TransferQueue replaced by one table."""

import math
import random

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration import rollouts as groups
from verl_gradalign.integration.rollouts import cancels, read_groups
from verl_gradalign.selection.groups import Problem, halved, keys_by_uid, session_of

PROBLEMS = [Problem("a", 0, "tasks"), Problem("b", 1, "tasks")]
KEYS = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
BATCH = KVBatchMeta(keys=KEYS, tags=[{"seq_len": 5, "response_len": 2}] * 4, partition_id="train")


def nested(rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


@pytest.fixture
def stored(monkeypatch):
    """Group a has rewards 1 and 0, group b 1 and 1; returns what is put back."""
    table = {
        "rm_scores": nested([[0.0, 1.0], [0.0, 0.0, 0.0], [1.0], [0.0, 1.0]]),
        "response_mask": nested([[1, 1], [1, 1, 1], [1], [1, 1]]),
        "input_ids": nested([[5, 6, 7], [5, 6, 7, 8], [5, 6], [5, 6, 7]]),
    }
    put = []
    monkeypatch.setattr(groups.tq, "kv_batch_get", lambda **_: TensorDict(table, batch_size=4))
    monkeypatch.setattr(groups.tq, "kv_batch_put", lambda **call: put.append(call))
    return put


def verl_config(adv_estimator):
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": adv_estimator, "gamma": 1.0, "lam": 1.0},
            "actor_rollout_ref": {"rollout": {"n": 2}, "actor": {"loss_agg_mode": "token-mean"}},
            "data": {"max_response_length": 8},
        }
    )


def test_live_groups_get_coefficients_and_dead_ones_zeros(stored):
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("grpo"))
    assert a.is_live and not b.is_live
    assert a.rewards == (1.0, 0.0) and b.rewards == (1.0, 1.0)
    assert (a.num_tokens, a.success_rate(0.0), b.success_rate(0.0)) == (10, 0.5, 1.0)
    rows = list(stored[0]["fields"][groups.COEFFICIENTS].unbind())
    assert [len(row) for row in rows] == [2, 3, 1, 2]
    assert (rows[0] < 0).all() and (rows[1] > 0).all()
    assert not rows[2].any() and not rows[3].any()
    assert a.coefficients == pytest.approx((rows[0][0].item(), rows[1][0].item()))
    assert a.advantages[0] > 0 > a.advantages[1] and b.advantages == (0.0, 0.0)


def test_halves_depend_on_what_was_answered_and_not_on_which_session_answered():
    """Requests reach the rollout in any order; outputs of a session stay together, and halves differ by one at most."""
    answers = [b"one", b"two", b"two", b"three", b"four", b"five", b"six"]
    found = []
    for seed in range(4):
        sessions = random.Random(seed).sample(range(len(answers)), len(answers))
        content = {
            f"a_{s}_{o}": answer + bytes([o]) for s, answer in zip(sessions, answers, strict=True) for o in (0, 1)
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
    monkeypatch.setattr(groups, "_advantages", lambda *_: values)
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("grpo"))
    assert math.isnan(a.advantages[0]) and a.advantages[1] == 1.0
    assert math.isnan(a.coefficients[0]) and a.coefficients[1] == pytest.approx(-0.2)
    assert sorted(b.advantages) == pytest.approx([0.3, 0.5])


def test_a_failed_group_is_neither_live_nor_read(stored):
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    table = BATCH.select_keys(KEYS)
    a, b = read_groups([*PROBLEMS], table, {"a", "b"}, config, verl_config("grpo"))
    assert a.is_failed and b.is_failed and not a.rewards and not stored
    assert a.keys == ("a_0_0", "a_1_0")


def test_random_stores_nothing_and_needs_no_advantages(stored):
    """GAE needs a critic's values, which do not exist yet when groups are selected."""
    config = GradAlignConfig.from_mapping({"score": "random"})
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("gae"))
    assert (a.is_live, b.is_live) == (True, False)
    assert a.rewards == (1.0, 0.0) and not stored


def test_a_step_that_scores_nothing_stores_nothing(stored):
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    a, b = read_groups(PROBLEMS, BATCH, set(), config, verl_config("gae"), is_scored=False)
    assert (a.is_live, b.is_live, a.advantages) == (True, False, ()) and not stored


def test_equal_responses_with_unequal_rewards_have_no_gradient():
    ids = torch.tensor([[5, 6], [5, 6], [5, 6], [5, 6]])
    coefficients = torch.tensor([[0.5], [0.5], [-0.75], [-0.25]])
    assert cancels(ids, coefficients)
    ids[3, 1] = 7
    assert not cancels(ids, coefficients)
