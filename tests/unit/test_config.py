# SPDX-License-Identifier: Apache-2.0
"""The configuration: YAML and dataclasses agree, and what is wrong is refused with a remedy."""

import ast
import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import verl_gradalign.config
from verl_gradalign.config import GradAlignConfig
from verl_gradalign.config_fields import decisive
from verl_gradalign.integration.checks import read_config
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.objective import LOSS_AGG_MODES
from verl_gradalign.selection.scores import SCORES

CONFIGS = Path(__file__).parents[2] / "configs" / "gradalign"
SCORE_FILES = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem not in ("base", "forecast"))


def load(path):
    return OmegaConf.to_container(OmegaConf.load(path), resolve=False)["gradalign"]


def as_lists(values):
    """YAML knows lists only."""
    if isinstance(values, dict):
        return {key: as_lists(value) for key, value in values.items()}
    return [as_lists(value) for value in values] if isinstance(values, list | tuple) else values


def keys_and_types(values):
    if isinstance(values, dict):
        return {key: keys_and_types(value) for key, value in values.items()}
    return type(values).__name__


def built(values):
    """The configuration of a `gradalign` block, as a run reads it."""
    return read_config(OmegaConf.create({"gradalign": values}))


def test_base_yaml_has_exactly_the_keys_and_defaults_of_the_dataclasses():
    defaults = as_lists(dataclasses.asdict(GradAlignConfig(score="random")))
    defaults["score"] = next(f.default for f in dataclasses.fields(GradAlignConfig) if f.name == "score")
    # Filled in by the schedule when the whole is built.
    defaults["direction"] = as_lists(dataclasses.asdict(verl_gradalign.config.DirectionConfig()))
    base = load(CONFIGS / "base.yaml")
    assert keys_and_types(base) == keys_and_types(defaults)
    assert base == defaults


def test_every_score_has_a_file_and_every_file_names_its_score():
    assert {path.stem for path in SCORE_FILES} == set(SCORES)
    for path in SCORE_FILES:
        assert load(path) == {"score": path.stem}


def test_base_yaml_builds_the_default_configuration():
    values = load(CONFIGS / "base.yaml")
    values["validation"]["files"] = "trusted.parquet"
    config = built(values)
    assert config == GradAlignConfig(validation=verl_gradalign.config.ValidationConfig(files=("trusted.parquet",)))


def test_the_directions_upkeep_follows_the_schedule_where_it_is_left_open():
    by_schedule = {
        name: built({"score": "accuracy_greedy", "schedule": name}).direction for name in ("step", "forecast")
    }
    kept = {
        name: (d.refresh_interval, d.rolling, d.replay, d.ema, d.keeps_responses) for name, d in by_schedule.items()
    }
    assert kept == {"step": (1, False, 1, 0.0, False), "forecast": (10, True, 5, 0.8, True)}
    own = {"schedule": "forecast", "direction": {"refresh_interval": 3, "rolling": False, "replay": 1}}
    held = built({"score": "accuracy_greedy", **own}).direction
    assert not held.keeps_responses and held.ema == 0
    assert built({"score": "accuracy_greedy", "schedule": "forecast", "direction": {"ema": 0.0}}).direction.ema == 0


def test_the_word_forecast_is_the_cheap_schedule():
    config = built(load(CONFIGS / "forecast.yaml") | {"validation": {"files": ["trusted.parquet"]}})
    assert (config.score, config.schedule, config.measure, config.estimator) == (
        "dot",
        "forecast",
        "update",
        "low_rank",
    )
    assert config.direction.train_on_trusted and config.direction.refresh_interval == 20
    assert config.direction.keeps_responses and config.oversample == 4


def test_an_empty_mapping_with_a_trusted_set_gives_the_defaults():
    assert built({"validation": {"files": ["a", "b"]}}).validation.files == ("a", "b")


def test_whole_numbers_are_accepted_where_a_float_is_asked_for():
    config = built({"score": "random", "oversample": 2})
    assert config.oversample == 2.0 and isinstance(config.oversample, float)


def nested(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score", "fancy"),
        ("estimator", "fancy"),
        ("schedule", "epoch"),
        ("dead_groups", "keep"),
        ("advantage", "raw"),
        ("direction.on_degenerate", "ignore"),
        ("loss_agg_mode", "token-median"),
        ("oversample", 0.5),
        ("oversample", float("nan")),
        ("oversample", float("inf")),
        ("validation.n", 0),
        ("direction.refresh_interval", 0),
        ("direction.metric", "sgd"),
        ("direction.offload", "yes"),
        ("direction.aggregation", "mean"),
        ("direction.ema", 1.0),
        ("direction.ema", float("nan")),
        ("direction.metric_problems", 1),
        ("probe.pool_dots", "rough"),
        ("probe.sketch_rank", 3),
        ("probe.sketch_rank", 0),
        ("score_options.band_low", 0.9),
        ("measure", "update"),
        ("measure", "after"),
        ("direction.replay", 0),
        ("direction.part", 0.0),
        ("direction.audit", 1.0),
        ("forecast.floor", -0.1),
        ("forecast.floor", 1.1),
        ("forecast.floor", float("nan")),
        ("forecast.memory", 1.0),
        ("forecast.features", ["colour"]),
        ("forecast.features", ["source", "source"]),
        ("forecast.num_features", 0),
        ("forecast.feature_interval", 0),
        ("forecast.rest", -1),
        ("forecast.per", "word"),
        ("forecast.on_no_lift", "stop"),
        ("score_options.z", -1.0),
        ("curriculum.keep", 0.0),
        ("curriculum.keep", 1.5),
        ("curriculum.steps_per_round", 0),
        ("curriculum.num_candidates", 0),
        ("curriculum.n", 0),
        ("curriculum.warmup_steps", -1),
        ("curriculum.stages", [0, 5]),
        ("curriculum.stages", [9, 5]),
        ("reliability.min_reliability", 1.5),
        ("reliability.of", "norms"),
        ("reliability.fallback", "cosine"),
        ("reliability.shrinkage", 1.1),
        ("validation.sets", [{"name": "a b", "files": ["x"]}]),
        ("validation.sets", [{"name": "a"}]),
        ("validation.sets", [{"name": "a", "files": ["x"], "weight": 0.0}]),
        ("validation.sets", [{"name": "a", "files": ["x"], "kind": "y"}]),
        ("probe.rank", 0),
        ("probe.fidelity_problems", 2),
        ("probe.canary_interval", -1),
        ("probe.canary_problems", 0),
        ("probe.canary_threshold", 0.0),
        ("probe.canary_threshold", float("nan")),
        ("probe.canary_threshold", float("inf")),
        ("probe.relative_step", 0.0),
        ("probe.relative_step", float("nan")),
        ("probe.max_tokens_per_rank", 0),
        ("probe.max_tokens_per_rank", 0.5),
        ("probe.oversized", "drop"),
        ("probe.ranks", 4),
        ("probe", 3),
        ("poll_interval_s", 0.0),
        ("seed", -1),
        ("overample", 4.0),
        ("validation.file", "x.parquet"),
        ("oversample", "four"),
        ("seed", 1.5),
        ("seed", True),
        ("score", None),
        ("validation", "x.parquet"),
        ("validation", 3),
        ("validation.files", 3),
        ("validation.files", [3]),
        ("log.dir", 3),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_remedy(key, value):
    with pytest.raises(ValueError) as refusal:
        built({"score": "random"} | nested(key, value))
    message = str(refusal.value)
    shown = value[0] if isinstance(value, list) else value
    shown = "" if isinstance(shown, dict) else str(shown)
    key = key.replace("band_low", "band_low, band_high")
    assert f"gradalign.{key}" in message and shown in message and "Remedy" in message, message


@pytest.mark.parametrize("score", [name for name, score in SCORES.items() if score.needs_direction])
def test_a_score_with_a_direction_is_refused_without_a_trusted_set(score):
    with pytest.raises(ValueError) as refusal:
        built({"score": score})
    message = str(refusal.value)
    assert "gradalign.validation.files=[]" in message and score in message and "Remedy" in message


@pytest.mark.parametrize("estimator", [name for name, method in ESTIMATORS.items() if not method.gives_norm])
def test_a_score_of_norms_is_refused_for_an_estimator_without_norms(estimator):
    values = {"estimator": estimator, "validation": {"files": ["trusted.parquet"]}}
    with pytest.raises(ValueError) as refusal:
        built(values | {"score": "cosine"})
    message = str(refusal.value)
    assert f"gradalign.estimator='{estimator}'" in message and "cosine" in message and "Remedy" in message
    assert built(values | {"score": "dot"}).estimator == estimator


def test_the_least_values_are_accepted():
    probe = {"rank": 1, "fidelity_problems": 3, "canary_interval": 0, "canary_problems": 1, "max_tokens_per_rank": 1}
    made = built({"score": "random", "probe": probe}).probe
    assert {key: getattr(made, key) for key in probe} == probe


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GradAlignConfig(score="random").seed = 1


REFUSED_TOGETHER = [
    ("estimator", {"score": "correlation", "estimator": "backward"}),
    ("estimator", {"score": "lower_bound", "probe": {"response_derivatives": False}}),
    ("estimator", {"score": "learnalign", "estimator": "finite_difference"}),
    ("probe.pool_dots", {"score": "learnalign", "estimator": "backward", "probe": {"pool_dots": "sketch"}}),
    ("reliability.min_reliability", {"score": "learnalign", "reliability": {"min_reliability": 0.1}}),
    ("reliability.min_reliability", {"score": "norm", "reliability": {"min_reliability": 0.1, "of": "direction"}}),
    ("validation.sets", {"score": "cosine", "validation": {"files": ["x"], "sets": [{"name": "a", "files": ["y"]}]}}),
    ("validation.sets", {"validation": {"sets": [{"name": "a", "files": ["y"]}, {"name": "a", "files": ["z"]}]}}),
]


@pytest.mark.parametrize(("key", "values"), REFUSED_TOGETHER)
def test_values_that_do_not_go_together_are_refused(key, values):
    with pytest.raises(ValueError) as refusal:
        built({"validation": {"files": ["x"]}} | values)
    assert f"gradalign.{key}" in str(refusal.value) and "Remedy" in str(refusal.value)


def test_the_names_of_estimators_and_loss_modes_are_those_of_the_probe():
    assert verl_gradalign.config.ESTIMATORS == tuple(ESTIMATORS)
    assert verl_gradalign.config.LOSS_AGG_MODES == tuple(LOSS_AGG_MODES)


def test_all_but_marked_keys_must_be_the_same_after_a_resume():
    values, every = decisive(GradAlignConfig()), dataclasses.asdict(GradAlignConfig())
    assert set(every) - set(values) == {"poll_interval_s", "log"}
    assert set(every["probe"]) - set(values["probe"]) == {
        "max_tokens_per_rank",
        "canary_interval",
        "canary_problems",
        "canary_threshold",
    }
    assert set(every["direction"]) - set(values["direction"]) == {"offload"}
    for block in ("curriculum", "reliability", "score_options"):
        assert values[block] == every[block]


def test_files_alone_are_one_trusted_set_and_sets_take_the_common_n():
    (single,) = built({"validation": {"files": ["x"], "n": 4}}).validation.trusted_sets()
    assert (single.name, single.files, single.weight, single.n) == ("trusted", ("x",), 1.0, 4)
    sets = [{"name": "a", "files": ["x"], "weight": 2}, {"name": "b", "files": "y", "n": 16}]
    first, second = built({"validation": {"sets": sets, "n": 4}}).validation.trusted_sets()
    assert (first.n, first.weight, second.n, second.files) == (4, 2.0, 16, ("y",))


def test_every_field_is_followed_by_its_documentation():
    """Blocks are documented by their classes; two more are a trusted set's and the one that checks them all."""
    classes = [
        node
        for node in ast.parse(Path(verl_gradalign.config.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    blocks = {f.name for f in dataclasses.fields(GradAlignConfig) if dataclasses.is_dataclass(f.default_factory)}
    assert len(classes) == len(blocks) + 2 and len(blocks) == 8
    for node in classes:
        assert ast.get_docstring(node), node.name
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign) or statement.target.id in blocks:
                continue
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            assert is_text and len(following.value.value) > 20, f"{node.name}.{statement.target.id} has no sentence"
