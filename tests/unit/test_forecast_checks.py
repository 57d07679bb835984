# SPDX-License-Identifier: Apache-2.0
"""What schedule forecast and measuring in the update cannot do is refused before any worker starts, with its remedy."""

import copy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verl  # noqa: F401  (loads the plugin, which makes +gradalign known)

from tests.unit.configurations import change, check, composed_of
from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration import forecast_checks
from verl_gradalign.integration.checks import check_data, check_verl_config, read_config
from verl_gradalign.integration.forecast_checks import check_num_trusted, check_pool
from verl_gradalign.selection.curriculum import check_schedule
from verl_gradalign.selection.scores import SCORES

GOOD = (
    "+gradalign=forecast",
    "gradalign.validation.files=trusted.parquet",
    "gradalign.direction.train_on_trusted=false",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.rollout.n=8",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "data.train_batch_size=16",
    "data.train_files=pool.parquet",
)
ACTOR = "actor_rollout_ref.actor"
BEFORE = {"gradalign.measure": "before", "gradalign.estimator": "ghost"}
NO_TRUSTED = {"gradalign.validation.files": []}
OWN_SCORES = """
from verl_gradalign import Score

plain = lambda m: m.dot_P
half = Score(lambda m, options: m.dot_P / 2, direction="trusted")
of_pool = Score(lambda m, options: m.dot_P, direction="pool")
"""


@pytest.fixture(scope="module")
def composed():
    return composed_of(GOOD)


@pytest.fixture
def verl_config(composed):
    return copy.deepcopy(composed)


@pytest.fixture(scope="module")
def own_scores(tmp_path_factory):
    path = tmp_path_factory.mktemp("scores") / "own.py"
    path.write_text(OWN_SCORES, encoding="utf-8")
    return path


def refused(verl_config, changes, key, value):
    """The message that refuses the changes, which names key and value once."""
    change(verl_config, changes)
    with pytest.raises(ValueError) as refusal:
        check(verl_config)
    message = str(refusal.value)
    assert f"{key}={value}: " in message.replace(f"{value!r}", str(value)), message
    assert message.count("Remedy: ") == 1, message
    return message


def test_one_word_and_a_trusted_set_are_a_good_configuration(verl_config):
    config = read_config(verl_config)
    assert config.is_forecast and config.measures_in_update and config.direction.keeps_responses
    check_verl_config(config, verl_config)


DOT = {"gradalign.score": "dot"}
STEP = {"gradalign.schedule": "step", **BEFORE}
IN_UPDATE = [
    ("gradalign.score", "cosine", {}, BEFORE),
    ("gradalign.score", "confident_cosine", {}, DOT),
    ("gradalign.score", "lower_bound", {}, BEFORE),
    ("gradalign.score", "cosine_learnability", {}, DOT),
    ("gradalign.score", "negative_cosine", {}, BEFORE),
    ("gradalign.score", "norm", NO_TRUSTED, BEFORE),
    ("gradalign.measure", "update", {"gradalign.score": "accuracy_greedy"}, {"gradalign.measure": "before"}),
    (
        "gradalign.measure",
        "update",
        {"gradalign.score": "accuracy_band", **NO_TRUSTED},
        {"gradalign.measure": "before"},
    ),
    ("gradalign.estimator", "backward", {}, {"gradalign.estimator": "low_rank"}),
    ("gradalign.estimator", "finite_difference", {}, {"gradalign.estimator": "ghost"}),
    ("gradalign.estimator", "output_layer", {}, {"gradalign.estimator": "low_rank"}),
    ("gradalign.direction.metric", "candidates", {}, {"gradalign.direction.metric": "adam"}),
]
FORECAST = [
    ("gradalign.score", "random", NO_TRUSTED, STEP),
    ("gradalign.score", "random", BEFORE | NO_TRUSTED, {"gradalign.schedule": "step"}),
    ("gradalign.score", "learnalign", NO_TRUSTED, STEP),
    ("gradalign.score", "pool_cosine", BEFORE | NO_TRUSTED, {"gradalign.schedule": "step"}),
    ("gradalign.direction.metric", "candidates", BEFORE, {"gradalign.direction.metric": "none"}),
    ("gradalign.reliability.min_reliability", 0.1, {}, {"gradalign.reliability.min_reliability": None}),
    ("gradalign.reliability.min_reliability", 0.1, {"gradalign.reliability.of": "direction"},
     {"gradalign.reliability.min_reliability": None}),
    ("gradalign.reliability.shrinkage", 0.5, BEFORE, {"gradalign.reliability.shrinkage": 0}),
]  # fmt: skip
TRAINED = {"gradalign.direction.train_on_trusted": True}
TRUSTED = [
    ("gradalign.direction.train_on_trusted", True, STEP, {"gradalign.direction.train_on_trusted": False}),
    ("gradalign.direction.train_on_trusted", True,
     {"gradalign.score": "accuracy_greedy", "gradalign.measure": "before"}, {"gradalign.score": "dot"}),
    ("gradalign.direction.train_on_trusted", True,
     {"gradalign.direction.rolling": False, "gradalign.direction.replay": 1}, {"gradalign.direction.rolling": True}),
    ("gradalign.validation.n", 4, TRAINED, {"gradalign.validation.n": None}),
    ("gradalign.validation.n", 4, TRAINED, {"gradalign.direction.train_on_trusted": False}),
    ("gradalign.direction.rolling", True, STEP | {"gradalign.schedule": "round"},
     {"gradalign.direction.rolling": None}),
    ("gradalign.direction.replay", 3, STEP | {"gradalign.schedule": "once", "gradalign.curriculum.keep": 0.5},
     {"gradalign.direction.replay": None}),
]  # fmt: skip
CORRELATION = {"gradalign.score": "correlation"}
COEFFICIENTS = [
    (f"{ACTOR}.entropy_coeff", 0.01, CORRELATION, {f"{ACTOR}.entropy_coeff": 0}),
    (f"{ACTOR}.use_kl_loss", True, CORRELATION, {f"{ACTOR}.use_kl_loss": False}),
    (f"{ACTOR}.ppo_mini_batch_size", 4, CORRELATION, {f"{ACTOR}.ppo_mini_batch_size": 16}),
    ("algorithm.rollout_correction.bypass_mode", True, CORRELATION, DOT),
]
MODE = "trainer.v1.trainer_mode"
APART, TOGETHER = {MODE: "gradalign_separate_async"}, {MODE: "gradalign_colocate_async"}
SEPARATE = [
    ("gradalign.schedule", "step", BEFORE | APART, TOGETHER),
    ("gradalign.measure", "before", APART, {"gradalign.measure": "update"}),
    ("gradalign.measure", "before", APART | {"gradalign.estimator": "backward"},
     {"gradalign.measure": "update", "gradalign.estimator": "low_rank"}),
    ("gradalign.measure", "before", APART | BEFORE | {"gradalign.score": "cosine"},
     {"gradalign.measure": "update"} | DOT),
    ("gradalign.measure", "before", APART | BEFORE | {"gradalign.score": "cosine"}, TOGETHER),
    ("gradalign.direction.train_on_trusted", True, APART, {"gradalign.direction.train_on_trusted": False}),
    ("gradalign.direction.train_on_trusted", True, APART, TOGETHER),
    ("gradalign.direction.on_degenerate", "stop", TOGETHER, {"gradalign.direction.on_degenerate": "previous"}),
    ("gradalign.direction.on_degenerate", "stop", APART, {"gradalign.direction.on_degenerate": "previous"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "others", "remedy"), [*IN_UPDATE, *FORECAST, *TRUSTED, *COEFFICIENTS, *SEPARATE]
)
def test_what_cannot_be_combined_is_refused_and_the_remedy_passes(verl_config, key, value, others, remedy):
    said = refused(verl_config, {key: value, **others}, key, value).split("Remedy: ")[1].lower()
    written = {name: "null" if good is None else str(good).lower() for name, good in remedy.items()}
    of_itself = f"set it to {written.get(key)}" in said or "leave it out" in said
    assert of_itself or all(f"{name}={good}" in said for name, good in written.items()), said
    change(verl_config, remedy)
    check(verl_config)


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradalign.estimator": "ghost"}, {"gradalign.score": "accuracy_band", "gradalign.measure": "before"}],
)
def test_a_forecast_measured_in_the_update_or_of_rewards_alone_may_be_generated_apart(verl_config, changes):
    change(verl_config, APART | changes)
    check(verl_config)


@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_either_measured_in_the_update_or_refused_once(verl_config, score):
    change(verl_config, {"gradalign.score": score})
    if score in ("dot", "correlation"):
        check(verl_config)
        return
    with pytest.raises(ValueError) as refusal:
        check(verl_config)
    assert str(refusal.value).count("Remedy: ") == 1


def test_own_scores_are_measured_in_the_update_if_they_need_no_norm(verl_config, own_scores):
    change(verl_config, {"gradalign.score": f"{own_scores}:half"})
    check(verl_config)
    plain, of_pool = f"{own_scores}:plain", f"{own_scores}:of_pool"
    message = refused(verl_config, {"gradalign.score": plain}, "gradalign.score", plain)
    assert "name a Score that does not ask for norms" in message
    message = refused(verl_config, {"gradalign.score": of_pool}, "gradalign.score", of_pool)
    assert "say nothing of another step" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"gradalign.score": "cosine", **BEFORE},
        {"gradalign.score": "norm", **BEFORE, **NO_TRUSTED},
        {"gradalign.score": "accuracy_greedy", "gradalign.measure": "before", **NO_TRUSTED},
        {"gradalign.direction.aggregation": "per_problem_unit"},
        {"gradalign.direction.metric": "adam"},
        {"gradalign.estimator": "ghost"},
        TRAINED,
        {**TRAINED, "gradalign.validation.n": 8},
        {"gradalign.validation.n": 4},
        {f"{ACTOR}.entropy_coeff": 0.01, f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.ppo_mini_batch_size": 4},
        CORRELATION,
        {**CORRELATION, f"{ACTOR}.ppo_mini_batch_size": 32},
        {"gradalign.direction.rolling": True, **STEP},
    ],
)
def test_what_can_be_combined_passes(verl_config, changes):
    change(verl_config, changes)
    check(verl_config)


def test_a_set_with_another_number_of_responses_is_named(verl_config):
    sets = [{"name": "a", "files": ["a.parquet"]}, {"name": "b", "files": ["b.parquet"], "n": 16}]
    changes = {**NO_TRUSTED, "gradalign.validation.sets": sets, **TRAINED}
    refused(verl_config, changes, "gradalign.validation.sets[b].n", 16)


@pytest.mark.parametrize(
    ("key", "value"),
    [(f"{ACTOR}.strategy", "megatron"), (f"{ACTOR}.ulysses_sequence_parallel_size", 2)],
)
def test_prompt_features_need_an_actor_that_can_be_read_where_the_score_does_not(verl_config, key, value):
    rewards_alone = {"gradalign.score": "accuracy_greedy", "gradalign.measure": "before", **NO_TRUSTED}
    name, features = "gradalign.forecast.features", "['source', 'prompt']"
    message = refused(verl_config, {**rewards_alone, key: value}, name, features)
    assert f"{name}=[source,text]" in message
    change(verl_config, {name: ["source", "text"]})
    check(verl_config)


def test_whole_problems_need_not_fit_where_the_update_measures(verl_config, caplog):
    change(verl_config, {"gradalign.estimator": "ghost", "gradalign.probe.max_tokens_per_rank": 1100})
    check(verl_config)
    assert not caplog.text
    change(verl_config, {"gradalign.measure": "before"})
    check(verl_config)
    assert "more than the 1100 of a micro-batch" in caplog.text


def test_filtered_groups_are_allowed_with_a_warning(verl_config, caplog):
    change(verl_config, {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "seq_reward"})
    check(verl_config)
    assert "never reach the forecast" in caplog.text


def forecast_of(**values):
    return GradAlignConfig.from_mapping({"schedule": "forecast", **values})


def test_a_pool_of_a_batch_is_enough_and_a_smaller_one_is_refused():
    config = forecast_of(oversample=8)
    check_schedule(config, 16, 16)
    with pytest.raises(ValueError, match=r"data.train_files: hold 15 problems.*data.train_batch_size=15"):
        check_schedule(config, 15, 16)


@pytest.mark.parametrize(
    ("oversample", "num_problems", "most"), [(8, 256, "4"), (4.5, 256, "4"), (4, 200, "3.12"), (2, 40, "1")]
)
def test_a_shortlist_of_most_of_the_pool_is_warned_of(caplog, oversample, num_problems, most):
    check_pool(forecast_of(oversample=oversample), num_problems, 32)
    assert f"gradalign.oversample={most} or less" in caplog.text
    caplog.clear()
    check_pool(forecast_of(oversample=float(most)), num_problems, 32)
    assert not caplog.text


def test_a_shortlist_that_is_not_chosen_from_or_of_another_schedule_is_not_warned_of(caplog):
    check_pool(forecast_of(oversample=8, forecast={"floor": 1.0}), 256, 32)
    check_pool(GradAlignConfig(oversample=8), 256, 32)
    assert not caplog.text


def test_trusted_problems_that_leave_no_room_in_a_batch_are_refused():
    """Of 200, 180 are trained on; in 10 steps 18 a step, and a batch holds 16. In 13 it is 14, in 12 still 15."""
    config = forecast_of(direction={"train_on_trusted": True})
    with pytest.raises(
        ValueError, match=r"gradalign.direction.refresh_interval=10: of 200 .* 18 .*set it to 13 or more"
    ):
        check_num_trusted(config, 200, 16)
    check_num_trusted(forecast_of(direction={"train_on_trusted": True, "refresh_interval": 13}), 200, 16)
    check_num_trusted(forecast_of(), 2000, 16)


def write_problems(path, num, start):
    prompts = [[{"role": "user", "content": f"{start + i} + 1 = ?"}] for i in range(num)]
    pq.write_table(pa.table({"prompt": prompts}), path)
    return str(path)


def test_a_forecasts_storage_holds_a_batch_and_no_candidates(verl_config, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    key = "transfer_queue.backend.SimpleStorage.total_storage_size"
    files = {"data.train_files": write_problems(tmp_path / "pool.parquet", 200, 0), **NO_TRUSTED}
    change(verl_config, {**files, "gradalign.score": "accuracy_greedy", "gradalign.measure": "before", key: 127})
    with pytest.raises(ValueError, match=rf"{key}=127: .*needs 128 rows at once \(16 candidates x 8 responses\)"):
        check_data(read_config(verl_config), verl_config)
    change(verl_config, {key: 128})
    check_data(read_config(verl_config), verl_config)


def test_every_check_is_registered():
    own = {name for name in vars(forecast_checks) if name.startswith("_check_")}
    registered = {check.__name__ for check in (*forecast_checks.CONFIG_CHECKS, *forecast_checks.VERL_CHECKS)}
    assert own == registered
