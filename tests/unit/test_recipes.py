# SPDX-License-Identifier: Apache-2.0
"""The GPU launch scripts: what they ask of verl composes, is valid to verl and to the plugin, and is as published.

The scripts run under bash as they are, with a stand-in for Python that writes its arguments down. Nothing is trained.
"""

import copy
import json
import os
import stat
import subprocess
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verl  # noqa: F401  (loads the plugin, which makes +gradalign and +regime known)
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from verl_gradalign.integration.checks import check_data, check_verl_config, read_config

ROOT = Path(__file__).parents[2]
REGIMES = ("unreliable", "imbalance", "low_utility", "learnalign_gsm8k")
BIG = ("unreliable", "low_utility")
RANKING = {regime: "cosine" for regime in REGIMES} | {"learnalign_gsm8k": "learnalign"}
NUM_GPUS = (1, 2, 4, 8)
METHODS = ("ranking", "random", "filter_groups")
# As many problems as the smallest pool has: GSM8K's, less the trusted ones.
NUM_PROBLEMS = 7409

STAND_IN = f"""#!{sys.executable} -SE
import json, os, sys
with open(os.environ["ARGUMENTS"], "w") as file:
    json.dump(sys.argv[1:], file)
"""


def problems(path, name, num):
    pq.write_table(pa.table({"prompt": [[{"role": "user", "content": f"{name} {i}"}] for i in range(num)]}), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds data files of the pool's size, and the stand-in."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, num in (("train", NUM_PROBLEMS), ("trusted", 8), ("test", 8)):
        problems(folder / f"{name}.parquet", name, num)
    python = folder / "python"
    python.write_text(STAND_IN, encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return folder


@lru_cache
def run_script(folder, regime, *overrides, **variables):
    """Run the script; return its arguments to Python, and what it wrote to stderr."""
    names = ("METHOD", "SEED", "NUM_GPUS", "DATA_DIR", "MODEL", "LORA_RANK", "PYTHON")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    own = {"PYTHON": str(folder / "python"), "ARGUMENTS": str(folder / "arguments"), "DATA_DIR": str(folder)}
    process = subprocess.run(
        ["bash", str(ROOT / "recipes" / regime / "run.sh"), *overrides],
        env=clean | own | {key: str(value) for key, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "arguments").read_text(encoding="utf-8")), process.stderr


@lru_cache
def composed(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def arguments_of(folder, regime, method, num_gpus=8):
    named = RANKING[regime] if method == "ranking" else method
    return run_script(folder, regime, METHOD=named, NUM_GPUS=num_gpus)[0]


def config_of(folder, regime, method, num_gpus=8):
    """Return what verl's entry point would be given.

    Hydra takes half a second for it, so what differs from one GPU by their number alone shares what it makes of that.
    """
    arguments, on_one = arguments_of(folder, regime, method, num_gpus), arguments_of(folder, regime, method, 1)
    assert arguments[:2] == ["-m", "verl.trainer.main_ppo"]
    number = "trainer.n_gpus_per_node={}"
    if arguments != [number.format(num_gpus) if a == number.format(1) else a for a in on_one]:
        return composed(*arguments[2:])
    config = copy.deepcopy(composed(*on_one[2:]))
    config.trainer.n_gpus_per_node = num_gpus
    return config


def validate(config):
    """Check the configuration as verl's entry point does before it starts Ray."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # there is no critic
        validate_config(config, need_reference_policy(config), need_critic(config))
    assert omega_conf_to_dataclass(config.actor_rollout_ref.rollout).name == "vllm"
    assert not OmegaConf.missing_keys(config.actor_rollout_ref)
    OmegaConf.to_container(config.actor_rollout_ref, resolve=True)


@pytest.mark.parametrize("num_gpus", NUM_GPUS)
@pytest.mark.parametrize("regime", REGIMES)
def test_verl_and_the_plugin_accept_a_ranking_on_every_number_of_gpus(folder, regime, num_gpus):
    config = config_of(folder, regime, "ranking", num_gpus)
    validate(config)
    own = read_config(config)
    check_verl_config(own, config)
    assert config.trainer.v1.trainer_mode == "gradalign" and own.score == RANKING[regime]
    assert config.trainer.n_gpus_per_node == num_gpus


@pytest.mark.parametrize("regime", REGIMES)
def test_the_data_last_for_the_schedule(folder, regime):
    for method in ("ranking", "random"):
        config = config_of(folder, regime, method)
        check_data(read_config(config), config)


@pytest.mark.parametrize("regime", REGIMES)
def test_random_passes_the_same_checks_and_rolls_out_no_more_than_it_keeps(folder, regime):
    config = config_of(folder, regime, "random")
    validate(config)
    own = read_config(config)
    check_verl_config(own, config)
    assert own.score == "random"
    plan, ranking = own.curriculum, read_config(config_of(folder, regime, "ranking")).curriculum
    if own.schedule == "round":
        assert plan.num_candidates == ranking.keep * ranking.num_candidates and plan.keep == 1.0
    else:
        assert own.schedule == "step" and config.data.train_max_samples == ranking.keep


@pytest.mark.parametrize("regime", REGIMES)
def test_filter_groups_is_verls_own_trainer(folder, regime):
    config = config_of(folder, regime, "filter_groups")
    validate(config)
    assert config.trainer.v1.trainer_mode == "sync" and config.trainer.v1.sampler.custom_sampler.name is None
    assert config.algorithm.filter_groups.enable


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("regime", REGIMES)
def test_the_number_of_gpus_and_the_method_change_different_overrides(folder, regime, method):
    """So what is valid for each method on eight GPUs, and on every number of GPUs for a ranking, is valid together."""

    def overrides(method, num_gpus):
        return arguments_of(folder, regime, method, num_gpus)

    def changed(before, after):
        return set(before) - set(after), set(after) - set(before)

    on_eight = overrides(method, 8)
    for num_gpus in NUM_GPUS[:-1]:
        of_gpus = changed(overrides("ranking", 8), overrides("ranking", num_gpus))
        assert changed(on_eight, overrides(method, num_gpus)) == of_gpus
        hardware = ("trainer.n_gpus_per_node=", "actor_rollout_ref.actor.fsdp_config.")
        assert all(override.startswith(hardware) for side in of_gpus for override in side)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_work_divides_among_the_gpus(folder, regime):
    config = config_of(folder, regime, "ranking")
    ranks, rows = config.trainer.n_gpus_per_node, config.actor_rollout_ref.rollout.n
    assert ranks % config.actor_rollout_ref.rollout.tensor_model_parallel_size == 0
    assert config.actor_rollout_ref.actor.ppo_mini_batch_size * rows % ranks == 0
    assert config.data.train_batch_size % config.actor_rollout_ref.actor.ppo_mini_batch_size == 0


@pytest.mark.parametrize("regime", REGIMES)
def test_runs_are_told_apart_by_method_and_seed_and_the_last_word_is_the_users(folder, regime):
    arguments, _ = run_script(folder, regime, "trainer.test_freq=7", METHOD="dot", SEED=3)
    assert arguments[-1] == "trainer.test_freq=7"
    assert {
        'trainer.logger=["console","wandb"]',
        f"trainer.experiment_name={regime}-dot-seed3",
        f"trainer.default_local_dir=outputs/{regime}/dot-seed3",
        "data.seed=3",
        "actor_rollout_ref.rollout.seed=3",
        "gradalign.seed=3",
    } <= set(arguments)


@pytest.mark.parametrize("regime", REGIMES)
def test_the_defaults_are_the_published_method(folder, regime):
    arguments, _ = run_script(folder, regime)
    assert arguments[2] == f"+gradalign={RANKING[regime]}"
    assert f"trainer.n_gpus_per_node={8 if regime in BIG else 1}" in arguments


ROUND_SETTINGS = {
    "data.train_batch_size": 128,
    "data.max_response_length": 3072,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 32,
    "actor_rollout_ref.actor.clip_ratio_low": 0.2,
    "actor_rollout_ref.actor.clip_ratio_high": 0.3,
    "actor_rollout_ref.actor.optim.lr": 1e-6,
    "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
    "actor_rollout_ref.actor.use_kl_loss": False,
    "actor_rollout_ref.rollout.temperature": 1.0,
    "gradalign.schedule": "round",
    "gradalign.curriculum.num_candidates": 5120,
    "gradalign.curriculum.steps_per_round": 10,
    "reward.custom_reward_function.path": "pkg://verl_gradalign.data.rewards",
    "reward.custom_reward_function.name": "compute_score",
}
PUBLISHED = {
    "unreliable": ROUND_SETTINGS
    | {"actor_rollout_ref.model.path": "Qwen/Qwen3-8B-Base", "gradalign.curriculum.keep": 0.25},
    "imbalance": ROUND_SETTINGS
    | {"actor_rollout_ref.model.path": "Qwen/Qwen2.5-Math-1.5B-Instruct", "gradalign.curriculum.keep": 0.05},
    "low_utility": ROUND_SETTINGS
    | {"actor_rollout_ref.model.path": "Qwen/Qwen3-8B-Base", "gradalign.curriculum.keep": 0.05},
    "learnalign_gsm8k": {
        "actor_rollout_ref.model.path": "Qwen/Qwen2.5-1.5B-Instruct",
        "data.train_batch_size": 48,
        "actor_rollout_ref.rollout.n": 8,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.actor.kl_loss_coef": 0.04,
        "gradalign.schedule": "once",
        "gradalign.curriculum.warmup_problems": 300,
        "gradalign.curriculum.keep": 1000,
    },
}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_settings_are_the_published_ones(folder, regime):
    config = config_of(folder, regime, "ranking")
    assert {key: OmegaConf.select(config, key) for key in PUBLISHED[regime]} == PUBLISHED[regime]
    if regime != "learnalign_gsm8k":
        for n in (config.actor_rollout_ref.rollout.n, config.gradalign.validation.n):
            assert 16 <= n <= 128
    warmup = read_config(config).curriculum
    assert warmup.warmup_steps * config.data.train_batch_size >= (warmup.warmup_problems or 0)


@pytest.mark.parametrize("regime", ["unreliable", "learnalign_gsm8k"])
def test_a_regime_is_enough_on_verls_own_command_line_and_stands_behind_the_score(folder, regime):
    score = f"+gradalign={RANKING[regime]}"
    files = [f"data.train_files={folder}/train.parquet", f"gradalign.validation.files={folder}/trusted.parquet"]
    config = composed(score, f"+regime={regime}", *files)
    validate(config)
    check_verl_config(read_config(config), config)
    assert config.gradalign.schedule == PUBLISHED[regime]["gradalign.schedule"]


@pytest.mark.parametrize("regime", [*REGIMES, "imbalance_mini"])
def test_a_regime_before_the_score_is_refused_as_its_schedule_would_be_lost(regime):
    """Of two groups that set a key the later one wins."""
    config = composed(f"+regime={regime}", "+gradalign=cosine")
    assert config.gradalign.schedule == "step" and config.gradalign.curriculum.num_candidates is None
    with pytest.raises(ValueError, match=f"regime={regime}.*write .regime last"):
        read_config(config)


def test_learnalign_can_be_staged_by_one_word(folder):
    overrides = run_script(folder, "learnalign_gsm8k", "gradalign.schedule=staged")[0][2:]
    config = composed(*overrides)
    validate(config)
    own = read_config(config)
    check_verl_config(own, config)
    check_data(own, config)
    assert own.schedule == "staged"
    assert own.curriculum.stages[0] == own.curriculum.warmup_steps + 1
    assert own.curriculum.stages[-1] < config.trainer.total_training_steps


def test_adapters_are_switched_on_by_their_rank(folder):
    """verl's validate_config asks vLLM about the rank, so only the plugin's checks run here."""
    arguments, trace = run_script(folder, "unreliable", LORA_RANK=64, NUM_GPUS=1)
    assert "Full training of 8B" not in trace
    config = composed(*arguments[2:])
    check_verl_config(read_config(config), config)
    assert config.actor_rollout_ref.model.lora_rank == 64
    assert config.actor_rollout_ref.rollout.load_format == "safetensors"


@pytest.mark.parametrize("regime", BIG)
def test_too_few_gpus_for_all_parameters_are_announced(folder, regime):
    hint = "Full training of 8B parameters needs four 80 GB GPUs. Set LORA_RANK=64"
    told = {num: run_script(folder, regime, NUM_GPUS=num)[1].count(f"\n{hint}") for num in NUM_GPUS}
    assert told == {1: 1, 2: 1, 4: 0, 8: 0}
    assert f"\n{hint}" not in run_script(folder, regime, NUM_GPUS=1, MODEL="Qwen/Qwen3-1.7B-Base")[1]


@pytest.mark.parametrize("regime", REGIMES)
def test_every_experiment_says_how_it_is_run_and_that_it_was_not(regime):
    readme = (ROOT / "recipes" / regime / "README.md").read_text(encoding="utf-8")
    for part in (f"verl-gradalign prepare --regime {regime}", "METHOD=", "gradalign/", "not been run", "estimate"):
        assert part in readme, part
