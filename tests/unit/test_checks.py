# SPDX-License-Identifier: Apache-2.0
"""What cannot work is refused before any worker starts, with key, value and remedy."""

import copy
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verl  # noqa: F401  (loads the plugin, which makes +gradalign known)
from omegaconf import open_dict

from tests.unit.configurations import change, check, composed_of
from verl_gradalign.integration.checks import check_data, read_config
from verl_gradalign.integration.requests import sequence_parallel

GOOD = (
    "+gradalign=cosine",
    "gradalign.validation.files=trusted.parquet",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "data.train_batch_size=16",
    "data.train_files=pool.parquet",
)

LOSS = "actor_rollout_ref.actor.policy_loss"


@pytest.fixture(scope="module")
def composed():
    return composed_of(GOOD)


@pytest.fixture
def verl_config(composed):
    return copy.deepcopy(composed)


def assert_refused(refusal, key, value):
    message = str(refusal.value)
    assert f"{key}={value}" in message and "Remedy: " in message, message


def test_a_good_configuration_passes(verl_config):
    check(verl_config)


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("trainer.v1.sampler.sync_refill_failed_groups", True, {}),
        ("algorithm.adv_estimator", "gae", {"gradalign.score": "correlation"}),
        ("algorithm.use_pf_ppo", True, {"algorithm.adv_estimator": "gae"}),
        (
            "algorithm.adv_estimator",
            "reinforce_plus_plus",
            {"gradalign.score": "correlation", "algorithm.gamma": 0.9},
        ),
        ("algorithm.adv_estimator", "gropo", {}),
        ("gradalign.curriculum.n", 4, {}),
        ("gradalign.schedule", "round", {"trainer.v1.trainer_mode": "gradalign_colocate_async"}),
        (
            "reward.reward_model.enable_resource_pool",
            False,
            {"reward.reward_model.enable": True, "trainer.v1.trainer_mode": "gradalign_colocate_async"},
        ),
        ("actor_rollout_ref.rollout.n", 1, {"gradalign.score": "learnalign"}),
        ("actor_rollout_ref.rollout.n", 1, {"algorithm.adv_estimator": "grpo_passk", "gradalign.validation.n": 8}),
        ("actor_rollout_ref.rollout.n", 1, {"gradalign.advantage": "centred", "algorithm.adv_estimator": "gae"}),
        ("gradalign.validation.n", 1, {"gradalign.advantage": "centred"}),
        ("algorithm.filter_groups.enable", True, {"gradalign.schedule": "once", "gradalign.curriculum.keep": 0.5}),
        (
            "actor_rollout_ref.model.use_fused_kernels",
            True,
            {"gradalign.schedule": "forecast", "gradalign.measure": "update", "gradalign.score": "dot"},
        ),
        ("actor_rollout_ref.actor.strategy", "megatron", {}),
        ("actor_rollout_ref.actor.strategy", "mindspeed", {"gradalign.estimator": "backward"}),
        (
            "actor_rollout_ref.actor.ulysses_sequence_parallel_size",
            2,
            {"gradalign.schedule": "forecast", "gradalign.measure": "update", "gradalign.score": "dot"},
        ),
        (
            "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size",
            2,
            {"gradalign.score": "pool_cosine", "gradalign.probe.pool_dots": "sketch"},
        ),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "clip_cov", {}),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "sapo", {"gradalign.loss_agg_mode": "token-mean"}),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "gspo", {"gradalign.loss_agg_mode": "seq-mean-token-mean"}),
        ("algorithm.rollout_correction.rollout_is", "token", {"gradalign.score": "correlation"}),
        ("algorithm.rollout_correction.rollout_rs", "token_k1", {"gradalign.score": "correlation"}),
        (f"{LOSS}.rollout_correction.rollout_rs", "seq_max_k2", {f"{LOSS}.loss_mode": "bypass_mode"}),
        ("distillation.distillation_loss.use_task_rewards", False, {"distillation.enabled": True}),
        ("trainer.use_v1", False, {}),
        ("trainer.use_v1", False, {"gradalign.score": "random"}),
        ("trainer.v1.trainer_mode", "sync", {}),
        ("trainer.v1.trainer_mode", "colocate_async", {}),
        ("trainer.v1.trainer_mode", "separate_async", {"gradalign.score": "accuracy_band"}),
        (
            "actor_rollout_ref.actor.fsdp_config.fsdp_size",
            1,
            {"actor_rollout_ref.actor.strategy": "fsdp", "trainer.n_gpus_per_node": 2},
        ),
    ],
)
def test_what_cannot_be_exact_is_refused(verl_config, key, value, others):
    change(verl_config, {key: value} | others)
    with pytest.raises(ValueError) as refusal:
        check(verl_config)
    assert_refused(refusal, key, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"data.gen_batch_size": 24, "gradalign.oversample": 1.3},
        {"algorithm.adv_estimator": "gae"},
        {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "reward"},
        {"gradalign.curriculum.n": 16, "gradalign.schedule": "round"},
        {"trainer.v1.trainer_mode": "gradalign_colocate_async"},
        {"reward.reward_model.enable": True, "reward.reward_model.enable_resource_pool": False},
        {"algorithm.adv_estimator": "gae", "gradalign.advantage": "centred"},
        {"algorithm.use_kl_in_reward": True},
        {"algorithm.adv_estimator": "remax"},
        {"algorithm.adv_estimator": "gae", "actor_rollout_ref.rollout.n": 1},
        {"algorithm.adv_estimator": "reinforce_plus_plus", "actor_rollout_ref.rollout.n": 1},
        {"reward.reward_model.enable": True, "reward.reward_model.enable_resource_pool": True},
        {"actor_rollout_ref.actor.policy_loss.loss_mode": "gspo"},
        {"actor_rollout_ref.actor.policy_loss.loss_mode": "sapo", "gradalign.loss_agg_mode": "seq-mean-token-mean"},
        {"actor_rollout_ref.actor.policy_loss.loss_mode": "sapo"},
        {"actor_rollout_ref.actor.policy_loss.loss_mode": "clip_cov", "gradalign.loss_agg_mode": "token-mean"},
        {"algorithm.rollout_correction.rollout_is": "token", "gradalign.score": "accuracy_greedy"},
        {"algorithm.rollout_correction.rollout_is": "token", "algorithm.rollout_correction.rollout_rs": "seq_max_k2"},
        {"algorithm.rollout_correction.rollout_is": "token"},
        {
            "algorithm.rollout_correction.rollout_is": "sequence",
            "algorithm.rollout_correction.rollout_rs": "seq_max_k2",
            "gradalign.score": "correlation",
        },
        {"algorithm.adv_estimator": "rloo", "actor_rollout_ref.rollout.n": 1},
        {"actor_rollout_ref.rollout.n": 1, "gradalign.validation.n": 8},
        {"algorithm.rollout_correction.bypass_mode": True},
        {"distillation.enabled": True, "distillation.distillation_loss.use_task_rewards": True},
        {
            "distillation.enabled": True,
            "distillation.distillation_loss.use_task_rewards": False,
            "gradalign.score": "random",
        },
        {"actor_rollout_ref.actor.strategy": "fsdp2"},
        {"actor_rollout_ref.model.use_fused_kernels": True},
        {
            "actor_rollout_ref.model.use_fused_kernels": True,
            "actor_rollout_ref.model.lora_rank": 8,
            "gradalign.schedule": "forecast",
            "gradalign.measure": "update",
            "gradalign.score": "dot",
            "gradalign.estimator": "low_rank",
        },
        {"actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2},
        {"actor_rollout_ref.actor.ulysses_sequence_parallel_size": 4, "gradalign.score": "pool_cosine"},
    ],
)
def test_the_remedies_pass(verl_config, changes):
    change(verl_config, changes)
    check(verl_config)


@pytest.mark.parametrize(
    "key, value",
    [("algorithm.rollout_correction.bypass_mode", True), ("actor_rollout_ref.rollout.calculate_log_probs", False)],
)
def test_a_rollout_correction_that_training_does_not_make_is_said_to_have_no_effect(verl_config, key, value, caplog):
    change(verl_config, {"algorithm.rollout_correction.rollout_is": "token", key: value})
    with caplog.at_level(logging.WARNING):
        check(verl_config)
    assert "rollout_is=token has no effect" in caplog.text
    caplog.clear()
    change(verl_config, {key: not value})
    check(verl_config)
    assert "has no effect" not in caplog.text


def test_all_that_is_wrong_is_said_at_once_and_counted(verl_config):
    change(
        verl_config,
        {
            "trainer.v1.trainer_mode": "colocate_async",
            "distillation.enabled": True,
            "distillation.distillation_loss.use_task_rewards": False,
            f"{LOSS}.rollout_correction.rollout_is": "token",
            f"{LOSS}.loss_mode": "bypass_mode",
        },
    )
    with pytest.raises(ValueError) as refusal:
        check(verl_config)
    lines = str(refusal.value).splitlines()
    assert lines[0] == "3 things must be changed before this can run:" and len(lines) == 4
    assert all(line.strip()[:2] == f"{number}." and "Remedy: " in line for number, line in enumerate(lines[1:], 1))
    assert "trainer_mode=gradalign_colocate_async" in lines[1]


def test_random_needs_no_trusted_set_and_no_estimator(verl_config):
    change(
        verl_config,
        {
            "gradalign.score": "random",
            "gradalign.validation.files": [],
            "algorithm.adv_estimator": "gae",
            "actor_rollout_ref.actor.strategy": "megatron",
            "data.train_files": "nowhere.parquet",
        },
    )
    check(verl_config)
    check_data(read_config(verl_config), verl_config)


def test_a_configuration_without_the_block_is_read_as_defaults_and_asks_for_a_trusted_set(verl_config):
    with open_dict(verl_config):
        del verl_config["gradalign"]
    with pytest.raises(ValueError) as refusal:
        read_config(verl_config)
    assert_refused(refusal, "gradalign.validation.files", "[]")


def user(text):
    return [{"role": "user", "content": text}]


def write_parquet(path, prompts, column="prompt"):
    prompt_type = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    pq.write_table(pa.table({column: pa.array([user(p) for p in prompts], type=prompt_type)}), path)
    return path


@pytest.fixture
def data_config(verl_config, tmp_path, monkeypatch):
    """The configuration with a train file of two problems, and a trusted file of one other."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    pool = write_parquet(tmp_path / "pool.parquet", ["2 + 2 = ?", "Spell HOUSE backwards."])
    trusted = write_parquet(tmp_path / "trusted.parquet", ["3 + 4 = ?"])
    change(verl_config, {"data.train_files": str(pool), "gradalign.validation.files": [str(trusted)]})
    change(verl_config, {"data.train_batch_size": 1, "gradalign.oversample": 1.0})
    return verl_config


def refusal_of_data(verl_config):
    with pytest.raises(ValueError) as refusal:
        check_data(read_config(verl_config), verl_config)
    return refusal


def trust(verl_config, path):
    change(verl_config, {"gradalign.validation.files": [str(path)]})


def test_fewer_problems_than_candidates_are_refused(data_config):
    change(data_config, {"gradalign.oversample": 3.0})
    refusal = refusal_of_data(data_config)
    assert_refused(refusal, "gradalign.oversample", 3.0)
    assert "3 candidates" in str(refusal.value) and "2" in str(refusal.value)


def test_a_plan_that_the_data_do_not_last_for_is_refused_before_any_worker_starts(data_config):
    change(data_config, {"gradalign.schedule": "staged", "gradalign.curriculum.keep": 2})
    change(data_config, {"gradalign.curriculum.stages": [1, 2]})
    assert "gradalign.curriculum" in str(refusal_of_data(data_config).value)


def test_a_storage_too_small_for_the_pool_and_the_trusted_answers_is_refused(data_config):
    key = "transfer_queue.backend.SimpleStorage.total_storage_size"
    sizes = {"gradalign.schedule": "once", "gradalign.curriculum.keep": 2, "gradalign.validation.n": 30}
    change(data_config, {**sizes, key: 45})
    refusal = refusal_of_data(data_config)
    assert_refused(refusal, key, 45)
    assert "46 rows at once (2 candidates x 8 responses and 30 trusted ones)" in str(refusal.value)
    change(data_config, {key: 46})
    check_data(read_config(data_config), data_config)


def test_every_trusted_set_is_checked_and_named(data_config, tmp_path):
    good = data_config.gradalign.validation.files[0]
    bad = write_parquet(tmp_path / "bad.parquet", ["2 + 2 = ?"])
    sets = [{"name": "good", "files": [good]}, {"name": "bad", "files": [str(bad)]}]
    change(data_config, {"gradalign.validation.files": [], "gradalign.validation.sets": sets})
    assert "gradalign.validation.sets[bad].files" in str(refusal_of_data(data_config).value)


def test_good_data_pass(data_config):
    check_data(read_config(data_config), data_config)


def test_several_files_and_json_lines_pass(data_config, tmp_path):
    lines = tmp_path / "more.jsonl"
    lines.write_text("".join(json.dumps({"prompt": user(p)}) + "\n" for p in ("x", "y")), encoding="utf-8")
    files = [*data_config.gradalign.validation.files, str(lines)]
    change(data_config, {"gradalign.validation.files": files, "data.train_files": [data_config.data.train_files]})
    check_data(read_config(data_config), data_config)


@pytest.mark.parametrize("key", ["gradalign.validation.files", "data.train_files"])
def test_a_missing_file_is_refused(data_config, tmp_path, key):
    missing = str(tmp_path / "missing.parquet")
    change(data_config, {key: missing})
    assert_refused(refusal_of_data(data_config), key, missing)


def test_a_file_of_another_kind_is_refused(data_config, tmp_path):
    path = tmp_path / "trusted.csv"
    path.write_text("prompt\n1+1=?\n", encoding="utf-8")
    trust(data_config, path)
    assert_refused(refusal_of_data(data_config), "gradalign.validation.files", path)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_that_cannot_be_read_is_refused(data_config, tmp_path, suffix):
    path = tmp_path / f"garbage.{suffix}"
    path.write_bytes(b"\x00\x01 this is no data file \xff\xfe" * 20)
    trust(data_config, path)
    assert_refused(refusal_of_data(data_config), "gradalign.validation.files", path)


def test_a_file_without_rows_is_refused(data_config, tmp_path):
    path = write_parquet(tmp_path / "empty.parquet", [])
    trust(data_config, path)
    refusal = refusal_of_data(data_config)
    assert_refused(refusal, "gradalign.validation.files", path)
    assert "at least one row" in str(refusal.value)


def test_a_file_without_the_prompt_column_is_refused(data_config, tmp_path):
    path = write_parquet(tmp_path / "other.parquet", ["3 + 4 = ?"], column="question")
    trust(data_config, path)
    refusal = refusal_of_data(data_config)
    assert_refused(refusal, "gradalign.validation.files", path)
    assert "data.prompt_key" in str(refusal.value)


def test_the_prompt_column_follows_verls_key(data_config, tmp_path):
    trust(data_config, write_parquet(tmp_path / "t.parquet", ["3 + 4 = ?"], column="question"))
    pool = write_parquet(tmp_path / "p.parquet", ["2 + 2 = ?"], column="question")
    change(data_config, {"data.prompt_key": "question", "data.train_files": str(pool)})
    check_data(read_config(data_config), data_config)


@pytest.mark.parametrize(
    "same", ["Spell HOUSE backwards.", "  spell house\n\tBackwards. ", "\uff33pell HOUSE backwards."]
)
def test_a_trusted_problem_in_the_train_files_is_refused_however_it_is_written(data_config, tmp_path, same):
    path = write_parquet(tmp_path / "overlap.parquet", ["something else", same])
    trust(data_config, path)
    refusal = refusal_of_data(data_config)
    assert_refused(refusal, "gradalign.validation.files", [str(path)])
    assert "1 of its 2 problems" in str(refusal.value) and "spell house backwards." in str(refusal.value)


@pytest.mark.parametrize("name", ["s3://bucket/trusted.parquet", "hdfs://host/trusted.parquet"])
def test_a_remote_file_is_asked_for_by_the_name_that_was_given(data_config, monkeypatch, name):
    asked = []

    def load_dataset(kind, data_files, split):
        asked.append(data_files)
        raise OSError("no network here")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    trust(data_config, name)
    assert_refused(refusal_of_data(data_config), "gradalign.validation.files", name)
    assert asked == [name]


@pytest.mark.parametrize(
    ("key", "value", "others"),
    [
        ("gradalign.direction.metric", "adam", {"actor_rollout_ref.actor.optim.optimizer": "SGD"}),
        (
            "actor_rollout_ref.actor.fsdp_config.model_dtype",
            "bf16",
            {"gradalign.estimator": "finite_difference", "gradalign.score": "dot"},
        ),
    ],
)
def test_what_an_estimator_cannot_do_is_refused(verl_config, key, value, others):
    change(verl_config, {key: value, **others})
    with pytest.raises(ValueError) as refusal:
        check(verl_config)
    assert_refused(refusal, key, value)


@pytest.mark.parametrize(
    ("oversized", "outcome"),
    [
        ("accumulate", "run in several"),
        ("sketch", "their norms are estimated"),
        ("backward", "scored one at a time"),
        ("stop", "stop the run"),
    ],
)
def test_problems_that_may_not_fit_are_announced(verl_config, caplog, oversized, outcome):
    change(verl_config, {"gradalign.probe.max_tokens_per_rank": 1100, "gradalign.probe.oversized": oversized})
    check(verl_config)
    assert "more than the 1100 of a micro-batch" in caplog.text and outcome in caplog.text


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"gradalign.score": "pool_cosine", "gradalign.probe.pool_dots": "sketch"}, "stop the run"),
        # Without norms there is nothing that backward is needed for.
        (
            {"gradalign.score": "dot", "gradalign.estimator": "low_rank", "gradalign.probe.oversized": "backward"},
            "run in several",
        ),
        (
            {"gradalign.score": "dot", "gradalign.estimator": "low_rank", "gradalign.probe.oversized": "sketch"},
            "run in several of them. Raise",
        ),
    ],
)
def test_what_is_said_of_large_problems_is_true_of_the_estimator(verl_config, caplog, changes, outcome):
    change(verl_config, {"gradalign.probe.max_tokens_per_rank": 1100, **changes})
    check(verl_config)
    assert outcome in caplog.text


@pytest.mark.parametrize("oversized", ["accumulate", "sketch"])
def test_a_response_that_no_micro_batch_holds_is_refused(verl_config, oversized):
    change(verl_config, {"gradalign.probe.max_tokens_per_rank": 1000, "gradalign.probe.oversized": oversized})
    with pytest.raises(ValueError) as refusal:
        check(verl_config)
    assert_refused(refusal, "gradalign.probe.max_tokens_per_rank", 1000)
    assert "set it to 1024 or more" in str(refusal.value)
    change(verl_config, {"gradalign.probe.oversized": "backward"})
    check(verl_config)


def test_the_actors_key_of_sequence_parallelism_goes_before_its_engines(verl_config):
    actor = "actor_rollout_ref.actor"
    change(verl_config, {f"{actor}.fsdp_config.ulysses_sequence_parallel_size": 4})
    assert sequence_parallel(verl_config) == (f"{actor}.fsdp_config.ulysses_sequence_parallel_size", 4)
    change(verl_config, {f"{actor}.ulysses_sequence_parallel_size": 2})
    assert sequence_parallel(verl_config) == (f"{actor}.ulysses_sequence_parallel_size", 2)
