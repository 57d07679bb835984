# SPDX-License-Identifier: Apache-2.0
"""The policy's hidden states over prompts, as the driver asks for them: ids, dealing, refusals. A real tiny model."""

import asyncio
import copy
import shutil

import numpy as np
import pytest
import torch
import verl  # noqa: F401  (loads the plugin, which makes +gradalign known)
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, MllamaImageProcessorPil, MllamaProcessor
from verl.experimental.agent_loop import agent_loop
from verl.utils.config import omega_conf_to_dataclass

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.prompt_states import PromptStates, check_prompt_states, prompt_tokens
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.prompt_states import prompt_states
from verl_gradalign.toy.model import build_tiny_model
from verl_gradalign.types import TokenRow

CHATS = [
    [{"role": "user", "content": text}]
    for text in ("what is 1 + 2?", "reverse abc", "?", "how many letters are there in a word as long as this one?")
]
BUDGET = TokenBudget(64, is_padded=True)
NOTHING = torch.zeros(0, dtype=torch.int64)
ATOL = 1e-5  # in float32, padded and alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=32, num_layers=2, intermediate_size=48)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def composed(folder):
    overrides = ["+gradalign=cosine", f"actor_rollout_ref.model.path={folder}", "gradalign.schedule=forecast"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=overrides)


@pytest.fixture
def verl_config(composed):
    return copy.deepcopy(composed)


def change(verl_config, **changes):
    with open_dict(verl_config):
        for key, value in changes.items():
            OmegaConf.update(verl_config, key.replace("__", "."), value, force_add=True)


class Workers:
    """Answers as a group of workers whose ranks share a model."""

    def __init__(self, model, num_ranks):
        self._model, self._num_ranks, self.shares = model, num_ranks, []

    def _query_dispatch_info(self, mesh):
        assert mesh == "actor"
        return list(range(self._num_ranks))

    def gradalign_prompt_features(self, prompts, budgets):
        assert len(prompts) == len(budgets) == self._num_ranks
        self.shares = prompts
        return [states_of(self._model, mine, budget.max_tokens) for mine, budget in zip(prompts, budgets, strict=True)]


def states_of(model, prompts, max_tokens):
    rows = [TokenRow(torch.tensor(prompt), NOTHING, NOTHING) for prompt in (*prompts, [0])]
    return prompt_states(PlainEngine(model, rows, max_tokens=max_tokens), len(prompts)).numpy()


def plain_states(model, ids):
    with torch.no_grad():
        state_TH = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return torch.cat([state_TH[-1], state_TH.mean(dim=0)]).numpy()


@pytest.mark.parametrize("num_ranks", [1, 3, 7])
def test_states_are_those_of_a_plain_pass_however_many_ranks_read_them(verl_config, model, num_ranks):
    tokens, workers = prompt_tokens(verl_config), Workers(model, num_ranks)
    found = PromptStates(tokens, workers, BUDGET)(CHATS)
    expected = np.stack([plain_states(model, tokens(chat)) for chat in CHATS])
    assert found.dtype == np.float32 and found.shape == (4, 64)
    np.testing.assert_allclose(found, expected, atol=ATOL)
    assert sorted(map(tuple, (ids for mine in workers.shares for ids in mine))) == sorted(
        map(tuple, map(tokens, CHATS))
    )


def test_no_prompt_at_all_has_no_states(verl_config, model):
    assert PromptStates(prompt_tokens(verl_config), Workers(model, 2), BUDGET)([]).shape == (0, 64)


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
def test_states_do_not_depend_on_the_budget_or_the_order(model, max_tokens):
    prompts = [list(range(1, 1 + length)) for length in (3, 1, 40, 8, 8, 21)]
    found = states_of(model, prompts, max_tokens)
    np.testing.assert_allclose(found, [plain_states(model, ids) for ids in prompts], atol=ATOL)
    np.testing.assert_allclose(states_of(model, prompts[::-1], max_tokens)[::-1], found, atol=ATOL)


def test_no_logits_are_formed_and_nothing_is_left_behind(model):
    shapes, head = [], model.get_output_embeddings()
    watch = head.register_forward_hook(lambda _, inputs, output: shapes.append(tuple(output.shape)))
    states_of(model, [[1, 2, 3], [4, 5, 6, 7]], 1000)
    watch.remove()
    assert shapes == [(2, 1, len(AutoTokenizer.from_pretrained(model.name_or_path)))]
    assert not head._forward_pre_hooks and all(p.grad is None for p in model.parameters())


def test_ids_are_those_of_verls_agent_loop(verl_config, folder):
    change(verl_config, data__apply_chat_template_kwargs={"add_generation_prompt_twice": False})

    class Loop(agent_loop.AgentLoopBase):
        async def run(self, sampling_params, **kwargs):
            return await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))

    model = omega_conf_to_dataclass(verl_config.actor_rollout_ref.model)

    async def of_loop():
        wrap = agent_loop.DictConfigWrap
        options = {"dataset_cls": object, "data_config": wrap(verl_config.data), "hf_model_type": "qwen2"}
        loop = Loop(wrap(verl_config), None, model.tokenizer, None, **options)
        return [await loop.run({}, raw_prompt=chat) for chat in CHATS]

    for longest in (1024, 20):
        change(verl_config, actor_rollout_ref__rollout__prompt_length=longest)
        expected = asyncio.run(of_loop())
        assert [prompt_tokens(verl_config)(chat) for chat in CHATS] == expected
        assert max(map(len, expected)) <= longest


def test_a_model_for_images_is_refused(verl_config, folder, tmp_path):
    seeing = shutil.copytree(folder, tmp_path / "seeing")
    MllamaProcessor(MllamaImageProcessorPil(), AutoTokenizer.from_pretrained(folder)).save_pretrained(seeing)
    change(verl_config, actor_rollout_ref__model__path=str(seeing))
    with pytest.raises(ValueError, match=r"gradalign.forecast.features=.*has an image processor. Remedy: take prompt"):
        prompt_tokens(verl_config)


def test_a_model_without_a_named_output_layer_is_refused(model):
    class Nameless(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, **inputs):
            return self.inner(**inputs)

    with pytest.raises(
        ValueError, match=r"gradalign.forecast.features: .*Nameless does not name .*Remedy: take prompt"
    ):
        states_of(Nameless(), [[1]], 10)


def test_a_model_that_passes_its_output_layer_by_is_refused(model):
    class Fused(type(model)):
        def forward(self, input_ids, **_):
            states = self.model(input_ids).last_hidden_state
            return type("Output", (), {"logits": states @ self.lm_head.weight.T})

    fused = Fused(model.config)
    with pytest.raises(RuntimeError, match=r"gradalign.forecast.features: .*was given \[\] for .*Remedy: take prompt"):
        states_of(fused, [[1]], 10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"actor_rollout_ref__actor__strategy": "megatron"}, "strategy=megatron"),
        ({"actor_rollout_ref__actor__ulysses_sequence_parallel_size": 2}, "sequence parallelism"),
        ({"actor_rollout_ref__actor__fsdp_config__ulysses_sequence_parallel_size": 2}, "sequence parallelism"),
    ],
)
def test_an_actor_whose_states_cannot_be_read_is_refused_only_where_they_are_asked_for(verl_config, changes, said):
    forecast = {"schedule": "forecast"}
    check_prompt_states(GradAlignConfig.from_mapping(forecast), verl_config)
    change(verl_config, **changes)
    with pytest.raises(ValueError, match=rf"gradalign.forecast.features=.*{said}.*Remedy: take prompt out") as refused:
        check_prompt_states(GradAlignConfig.from_mapping(forecast), verl_config)
    assert "gradalign.forecast.features=['source', 'prompt']" in str(refused.value)
    for without in ({**forecast, "forecast": {"features": ["source", "text"]}}, {}):
        check_prompt_states(GradAlignConfig.from_mapping(without), verl_config)
