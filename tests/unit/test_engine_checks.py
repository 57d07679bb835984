# SPDX-License-Identifier: Apache-2.0
"""Which engines scores are taken on, by what is composed for them, and what is refused there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import verl
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, open_dict

from tests.unit.configurations import change, check, composed_of
from tests.unit.test_checks import GOOD, assert_refused

ACTOR = "actor_rollout_ref.actor"
COMPOSED = {"veomni": "veomni", "torchtitan": "torchtitan", "fsdp_turbo": "dp", "automodel": "dp"}
"""Strategy -> verl's model_engine. verl 0.9.1 composes no actor of automodel."""
PASSES = {"gradalign.estimator": "backward"}
DIFFERENCES = {"gradalign.estimator": "finite_difference", "gradalign.score": "dot"}


@pytest.fixture(scope="module")
def composed():
    configs = {name: composed_of([*GOOD, f"model_engine={engine}"]) for name, engine in COMPOSED.items()}
    change(configs["fsdp_turbo"], {f"{ACTOR}.strategy": "fsdp_turbo"})
    block = OmegaConf.load(Path(verl.__file__).parent / "trainer" / "config" / "engine" / "automodel.yaml")
    change(configs["automodel"], {f"{ACTOR}.strategy": "automodel", f"{ACTOR}.automodel": block})
    with open_dict(configs["automodel"].actor_rollout_ref.actor) as actor:
        del actor["fsdp_config"]
    return configs


@pytest.fixture(params=COMPOSED)
def engine(request):
    return request.param


@pytest.fixture
def verl_config(composed, engine):
    return copy.deepcopy(composed[engine])


def refusal_of(verl_config):
    with pytest.raises(ValueError) as refusal:
        check(verl_config)
    return refusal


@pytest.mark.parametrize("changes", [PASSES, DIFFERENCES, {"gradalign.score": "random"}])
def test_what_asks_for_passes_alone_is_accepted(verl_config, changes):
    change(verl_config, changes)
    check(verl_config)


@pytest.mark.parametrize("estimator", ["ghost", "low_rank", "output_layer"])
def test_estimators_that_read_layers_are_refused_with_backward_as_the_remedy(verl_config, engine, estimator):
    change(verl_config, {"gradalign.estimator": estimator, "gradalign.score": "dot"})
    refusal = refusal_of(verl_config)
    assert_refused(refusal, "gradalign.estimator", estimator)
    assert engine in str(refusal.value) and "gradalign.estimator=backward" in str(refusal.value)


def test_measuring_in_the_update_is_refused(verl_config):
    changes = {"gradalign.schedule": "forecast", "gradalign.measure": "update", "gradalign.score": "dot"}
    change(verl_config, changes)
    refusal = refusal_of(verl_config)
    assert_refused(refusal, "gradalign.measure", "update")
    assert "gradalign.estimator=backward" in str(refusal.value)


@pytest.mark.parametrize(
    ("engine", "key", "value", "others"),
    [
        ("veomni", "actor.veomni.ulysses_parallel_size", 2, {}),
        ("veomni", "actor.veomni.expert_parallel_size", 2, {}),
        ("veomni", "actor.veomni.router_replay.mode", "R2", {}),
        ("veomni", "actor.veomni.mixed_precision", False, DIFFERENCES),
        ("torchtitan", "actor.torchtitan.tensor_parallel_size", 2, {}),
        ("torchtitan", "actor.torchtitan.pipeline_parallel_size", 2, {}),
        ("torchtitan", "actor.torchtitan.context_parallel_size", 2, {}),
        ("torchtitan", "actor.torchtitan.expert_parallel_size", 2, {}),
        ("torchtitan", "actor.torchtitan.data_parallel_replicate_size", 2, {}),
        ("automodel", "actor.automodel.tp_size", 2, {}),
        ("automodel", "actor.automodel.cp_size", 2, {}),
        ("automodel", "actor.automodel.ep_size", 2, {}),
        ("automodel", "actor.automodel.distributed_strategy", "ddp", {}),
        ("automodel", "actor.automodel.enable_fp8", True, {}),
        ("automodel", "actor.automodel.model_dtype", "bf16", DIFFERENCES),
        ("fsdp_turbo", "actor.ulysses_sequence_parallel_size", 2, {}),
        ("fsdp_turbo", "actor.fsdp_config.ulysses_sequence_parallel_size", 2, {}),
        ("fsdp_turbo", "actor.fsdp_config.turbo_config.distributed.tensor_parallel_size", 2, {}),
        ("fsdp_turbo", "actor.fsdp_config.model_dtype", "bf16", DIFFERENCES),
        ("veomni", "model.lora_rank", 8, {}),
        ("torchtitan", "model.lora_rank", 8, {}),
        ("automodel", "model.lora_rank", 8, {}),
        ("fsdp_turbo", "model.lora_rank", 8, {}),
    ],
)
def test_what_has_not_been_shown_on_an_engine_is_refused(composed, engine, key, value, others):
    verl_config = copy.deepcopy(composed[engine])
    change(verl_config, PASSES | others | {f"actor_rollout_ref.{key}": value})
    assert_refused(refusal_of(verl_config), f"actor_rollout_ref.{key}", value)


def test_the_optimizers_metric_is_refused(verl_config):
    change(verl_config, PASSES | {"gradalign.direction.metric": "adam"})
    assert_refused(refusal_of(verl_config), "gradalign.direction.metric", "adam")


@pytest.mark.parametrize("named", ["megatron", "veomni", "torchtitan"])
def test_an_actor_block_of_one_engine_with_the_strategy_of_another_is_refused(named):
    verl_config = composed_of([*GOOD, f"model_engine={named}"])
    for strategy in ("fsdp2", "torchtitan" if named == "veomni" else "veomni"):
        for changes in (PASSES, DIFFERENCES, {"gradalign.direction.metric": "adam"}):
            change(verl_config, {f"{ACTOR}.strategy": strategy, **changes})
            message = str(refusal_of(verl_config).value)
            assert f"{ACTOR}.strategy={strategy}: is that of another engine than the actor block's ({named})" in message


def test_megatron_is_refused_with_the_scores_that_work_on_it():
    verl_config = composed_of([*GOOD, "model_engine=megatron", *(f"{key}={value}" for key, value in PASSES.items())])
    refusal = refusal_of(verl_config)
    assert_refused(refusal, f"{ACTOR}.strategy", "megatron")
    assert "model_engine=dp" in str(refusal.value)
    for score in ("accuracy_greedy", "accuracy_band", "random"):
        change(verl_config, {"gradalign.score": score})
        check(verl_config)


def test_verl_composes_no_actor_of_automodel_by_itself():
    """When it does, the actor block is to be taken from there."""
    with pytest.raises(ConfigCompositionException):
        composed_of([*GOOD, "model_engine=automodel"])
