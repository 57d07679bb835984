# SPDX-License-Identifier: Apache-2.0
"""What the launch asks of a model before workers start: from its config alone, in seconds, whatever its size."""

import json
import time

import pytest
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoConfig

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration import hub
from verl_gradalign.integration.model_check import check_model, model_from_config, model_refusals
from verl_gradalign.probe import layer_rules

NO_DROPOUT = {"attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def folder_of(place, model_type, architecture, **options):
    """A folder with a config alone: no weights, no tokenizer."""
    config = AutoConfig.for_model(model_type, **options)
    config.architectures = [architecture]
    folder = place / model_type
    config.save_pretrained(folder)
    return folder


def verl_config(path, sharing=1, response=100, **model):
    keys = {
        "path": str(path),
        "trust_remote_code": False,
        "override_config": {},
        "lora_rank": 0,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "external_lib": None,
        "use_remove_padding": False,
    }
    actor = {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 4096, "ulysses_sequence_parallel_size": sharing}
    parts = {"model": keys | model, "actor": actor, "rollout": {"n": 8}}
    return OmegaConf.create(
        {"actor_rollout_ref": parts, "data": {"max_prompt_length": 100, "max_response_length": response}}
    )


def own(**keys):
    return GradAlignConfig.from_mapping({"validation": {"files": ["trusted.parquet"]}, **keys})


def refused(path, config=None, **model):
    """The messages of the refusals."""
    return [str(error) for error in check_model(config or own(), verl_config(path, **model))]


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("llama", "LlamaForCausalLM"),
        ("qwen3", "Qwen3ForCausalLM"),
        ("olmo3", "Olmo3ForCausalLM"),
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("exaone4", "Exaone4ForCausalLM"),
    ],
)
def test_dense_models_are_accepted_whatever_their_size(tmp_path, model_type, architecture):
    folder = folder_of(tmp_path, model_type, architecture, hidden_size=8192, num_hidden_layers=80)
    model = model_from_config(verl_config(folder))
    assert model.num_parameters > 20e9 and next(model.module.parameters()).is_meta
    refusals = model_refusals(own(), verl_config(folder), model)
    assert refusals.errors == [] and refusals.untried == ""


@pytest.mark.parametrize(
    ("model_type", "architecture", "layer"),
    [
        # Without a rule: seen in the layers.
        ("gpt_oss", "GptOssForCausalLM", "mlp.experts.gate_up_proj"),
        ("qwen3_vl", "Qwen3VLForConditionalGeneration", "visual.patch_embed.proj"),
        # With rules for all layers: seen in a pass only.
        ("gpt_bigcode", "GPTBigCodeForCausalLM", "transformer.wpe"),
    ],
)
def test_layers_that_cannot_be_scored_are_refused_by_name(tmp_path, model_type, architecture, layer):
    (message,) = refused(folder_of(tmp_path, model_type, architecture, **NO_DROPOUT))
    assert layer in message and "Remedy: set gradalign.estimator=backward" in message


def test_an_estimator_that_needs_no_rules_takes_what_ghost_refuses(tmp_path):
    folder = folder_of(tmp_path, "gpt_oss", "GptOssForCausalLM", **NO_DROPOUT)
    assert refused(folder, own(estimator="backward")) == []


@pytest.mark.parametrize(
    ("model_type", "architecture"), [("qwen3_moe", "Qwen3MoeForCausalLM"), ("mixtral", "MixtralForCausalLM")]
)
def test_mixtures_of_experts_are_accepted(tmp_path, model_type, architecture):
    assert refused(folder_of(tmp_path, model_type, architecture, **NO_DROPOUT)) == []


def test_dropout_is_refused_also_where_no_layer_shows_it(tmp_path):
    assert "dropout is active" in refused(folder_of(tmp_path, "gpt_bigcode", "GPTBigCodeForCausalLM"))[0]
    folder = folder_of(tmp_path, "seed_oss", "SeedOssForCausalLM", attention_dropout=0.0)
    (message,) = refused(folder)
    assert "residual_dropout=0.1" in message
    assert "+actor_rollout_ref.model.override_config.residual_dropout=0" in message
    assert refused(folder, override_config={"residual_dropout": 0}) == []


def test_adapters_are_added_as_training_adds_them(tmp_path):
    folder = folder_of(tmp_path, "llama", "LlamaForCausalLM")
    model = model_from_config(verl_config(folder, lora_rank=8))
    trained = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert refused(folder, lora_rank=8, target_modules=["q_proj", "down_proj"]) == []
    (message,) = refused(folder, lora_rank=8, target_modules=["w_query"])
    assert message.startswith("actor_rollout_ref.model.target_modules=['w_query']")
    assert "q_proj" in message.partition("Remedy: ")[2]


class Doubled(nn.Linear):
    """A layer with a rule of the user's own."""


def test_a_rule_of_the_users_own_gives_norms_of_whole_problems_only(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, "llama", "LlamaForCausalLM", hidden_size=64, num_hidden_layers=1)
    model = model_from_config(verl_config(folder))
    model.module.model.layers[0].mlp.up_proj.__class__ = Doubled
    monkeypatch.setitem(layer_rules.LAYER_RULES, Doubled, lambda call: layer_rules.linear(call))
    whole, cut, shared = (
        model_refusals(own(), verl_config(folder, **keys), model).errors
        for keys in ({}, {"response": 900}, {"sharing": 2})
    )
    backward, sketch = (
        model_refusals(own(probe={"oversized": oversized}), verl_config(folder, response=900), model).errors
        for oversized in ("backward", "sketch")
    )
    assert not whole and not backward and "gradalign.probe.oversized=sketch" in str(sketch[0])
    (of_cut,), (of_shared,) = cut, shared
    layer = "the layer rule of model.layers.0.mlp.up_proj (Doubled) gives norms of whole problems only"
    assert str(of_cut).startswith(layer) and "gradalign.probe.oversized=accumulate" in str(of_cut)
    assert "Remedy: set gradalign.probe.oversized=backward" in str(of_cut)
    assert str(of_shared).startswith(layer) and "ulysses_sequence_parallel_size=2" in str(of_shared)


def test_models_whose_rows_run_otherwise_than_scores_follow_are_refused(tmp_path):
    options = {"hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16, "attention_bias": False}
    vision = folder_of(tmp_path, "qwen3_vl", "Qwen3VLForConditionalGeneration")
    (message,) = [str(e) for e in check_model(own(estimator="backward"), verl_config(vision, sharing=2))]
    assert "ulysses_sequence_parallel_size=2: a model for images" in message
    biased = folder_of(tmp_path, "phi", "PhiForCausalLM", **NO_DROPOUT, **options)
    (message,) = refused(biased, use_fused_kernels=True)
    assert "actor_rollout_ref.model.use_fused_kernels=True: leaves the output layer's bias out" in message
    assert refused(biased) == []


def test_scores_without_gradients_ask_nothing_of_the_model(tmp_path):
    assert refused(tmp_path / "nowhere", own(score="random")) == []


def test_a_model_that_cannot_be_built_here_is_left_to_the_worker(tmp_path, caplog):
    assert refused(tmp_path / "nowhere") == []
    assert "no such folder" in caplog.text


@pytest.mark.parametrize("architectures", [None, ["LlamaForCausalLM", "Other"]])
def test_a_config_must_name_one_architecture(tmp_path, architectures):
    folder = folder_of(tmp_path, "llama", "LlamaForCausalLM")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": architectures}))
    with pytest.raises(ValueError, match="architectures; verl asks for one"):
        model_from_config(verl_config(folder))


def test_a_hub_id_without_a_network_fails_in_seconds_with_what_to_do(monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.hub_answers.cache_clear()
    began = time.monotonic()
    with pytest.raises(ValueError, match="hf download someone/a-model-that-is-nowhere"):
        model_from_config(verl_config("someone/a-model-that-is-nowhere"))
    assert time.monotonic() - began < hub.TIMEOUT_S + 3
    hub.hub_answers.cache_clear()
