# SPDX-License-Identifier: Apache-2.0
"""The tiny model and its tokenizer, and that the warm-up trains it."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_gradalign.data.tasks import FAMILIES, GUESS, RIGHT_STYLE, SHARING_FAMILIES, UNRELIABLE_STYLE, draw_problems
from verl_gradalign.toy import warmup
from verl_gradalign.toy.model import ARCHITECTURES, build_tiny_model
from verl_gradalign.toy.regimes import HALF_LEARNED, SKILLS, prepare_policy
from verl_gradalign.toy.warmup import warm_up

SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64}
MESSAGES = [{"role": "user", "content": "47+38"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_the_default_model_has_between_three_and_seven_hundred_thousand_parameters(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert 300_000 < model.num_parameters() < 700_000
    assert model.dtype == torch.float32


def test_the_vocabulary_is_the_tokenizer(folder, tokenizer):
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)


def test_text_survives_the_tokenizer_one_token_a_byte(tokenizer):
    text = "max 40 91 =91 ~8 rev baed \u00e9\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())


def test_the_chat_template_is_chatml_without_a_system_message(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\n47+38<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert len(ids) == len("47+38") + 8  # two starts, one end, two roles, three newlines


def test_a_turn_ends_the_sequence_and_padding_is_another_token(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer.encode("=85<|im_end|>"), skip_special_tokens=True) == "=85"


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_weights_depend_on_the_seed_and_leave_the_random_state_alone(architecture, tmp_path):
    state = torch.get_rng_state()
    seeds = {"a": 0, "b": 0, "c": 1}
    folders = {
        name: build_tiny_model(tmp_path / name, architecture, seed=seed, **SMALL) for name, seed in seeds.items()
    }
    assert torch.equal(torch.get_rng_state(), state)
    weights = {
        name: torch.cat([p.flatten() for p in AutoModelForCausalLM.from_pretrained(path).parameters()])
        for name, path in folders.items()
    }
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gpt"}, "architecture='gpt' is unknown"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"hidden_size": 130}, "multiple of 8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
    ],
)
def test_impossible_sizes_are_rejected(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_tiny_model(tmp_path, **arguments)


def test_warm_up_lowers_the_loss_and_saves_model_and_tokenizer(tmp_path):
    build_tiny_model(tmp_path / "random", **SMALL)
    history = []
    report = warm_up(tmp_path / "random", tmp_path / "warm", num_steps=12, progress=history.append)
    assert [entry["step"] for entry in history] == list(range(1, 13))
    assert history[-1]["loss"] < history[0]["loss"] - 0.2
    assert set(report["accuracy"]) == set(SHARING_FAMILIES)
    assert set(report["accuracy"]["sorting"]) == {"all", RIGHT_STYLE, UNRELIABLE_STYLE}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "warm").num_parameters() > 0
    assert AutoTokenizer.from_pretrained(tmp_path / "warm").pad_token == "<|endoftext|>"


def test_a_clean_warm_up_shows_one_style_with_right_answers_and_can_be_stopped_early(tmp_path, monkeypatch):
    build_tiny_model(tmp_path / "random", **SMALL)
    shown, history = [], []
    draw = warmup._draw_demonstration

    def noted(problem, *arguments):
        shown.append((problem, draw(problem, *arguments)))
        return shown[-1][1]

    monkeypatch.setattr(warmup, "_draw_demonstration", noted)
    how = {"families": FAMILIES, "is_clean": True, "stop_after": 3, "progress": history.append}
    warm_up(tmp_path / "random", tmp_path / "warm", num_steps=12, **how)
    assert [entry["step"] for entry in history] == [1, 2, 3] and history[0]["num_steps"] == 12
    assert {text[0] for _, text in shown} == {RIGHT_STYLE}
    assert all(text[1:] == problem.answer for problem, text in shown if problem.family != GUESS)
    guesses = [text[1:] == problem.answer for problem, text in shown if problem.family == GUESS]
    assert 0.2 < np.mean(guesses) < 0.8


@pytest.mark.nightly
def test_every_family_is_half_learned_by_the_policy_of_that_name(tmp_path):
    folder = prepare_policy(tmp_path / "policy", name=HALF_LEARNED)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    problems = draw_problems(420, random.Random(5), families=FAMILIES)
    accuracy = {name: of["all"] for name, of in warmup.evaluate(model, tokenizer, problems)["accuracy"].items()}
    # 0.62, 0.60, 0.38, 0.64, 0.57, 0.57 and 0.49 where this was written; rounding moves them by a tenth.
    assert all(0.2 < value < 0.85 for value in accuracy.values()) and set(accuracy) == set(FAMILIES), accuracy
    assert np.mean([accuracy[family] for family in SKILLS]) == pytest.approx(0.6, abs=0.15), accuracy


def test_warm_up_without_steps_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="num_steps=0"):
        warm_up(tmp_path, tmp_path / "warm", num_steps=0)


def test_the_warm_up_computes_on_one_thread_and_gives_the_others_back(tmp_path):
    build_tiny_model(tmp_path / "random", **SMALL)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen = []
        warm_up(tmp_path / "random", tmp_path / "warm", 1, progress=lambda _: seen.append(torch.get_num_threads()))
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
