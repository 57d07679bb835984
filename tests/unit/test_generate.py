# SPDX-License-Identifier: Apache-2.0
"""Sampling: the draws follow the distribution that the reported log-probabilities come from, and are repeatable."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl_gradalign.cpu.generate import SamplingParams, SequenceGenerator
from verl_gradalign.toy.model import build_tiny_model

LOG_PROB_ATOL = 1e-4  # float32, cached against whole-sequence forwards; measured 5e-6
NUM_DRAWS = 2000
MAX_DEVIATION = 0.035  # standard error of a share is at most 0.011 at 2000 draws
PROMPTS = ("2+2=", "what comes after seven?", "a", "spell the word backwards: house")


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    sizes = {"hidden_size": 32, "num_layers": 2, "intermediate_size": 64}
    # Untied: a tied head at random weights repeats its last token for ever.
    folder = build_tiny_model(tmp_path_factory.mktemp("tiny"), tie_word_embeddings=False, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    # Random weights give a flat distribution; sharper logits make a wrong temperature or token visible.
    with torch.no_grad():
        model.model.norm.weight.mul_(6.0)
    return SequenceGenerator(model, AutoTokenizer.from_pretrained(folder))


@pytest.fixture
def prompts(generator):
    return [generator.tokenizer(text).input_ids for text in PROMPTS]


def until_length(**changes):
    """Parameters under which nothing but a stop ends a completion before its sixth token."""
    return SamplingParams(**({"max_tokens": 6, "ignore_eos": True} | changes))


@torch.no_grad()
def raw_logits(generator, prompt, token_ids=()):
    """Logits before each token of `token_ids`, and before the one after them, from one plain forward."""
    logits = generator.model(torch.tensor([[*prompt, *token_ids]])).logits[0]
    return logits[len(prompt) - 1 :]


def forward_log_probs(generator, prompt, token_ids, temperature=1.0):
    log_p = torch.log_softmax(raw_logits(generator, prompt, token_ids)[:-1] / temperature, dim=-1)
    return log_p.gather(1, torch.tensor(token_ids)[:, None]).squeeze(1)


def assert_log_probs(completion, expected):
    torch.testing.assert_close(torch.tensor(completion.log_probs), expected, rtol=0, atol=LOG_PROB_ATOL)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_equal_those_of_a_plain_forward_at_the_sampling_temperature(generator, prompts, temperature):
    params = SamplingParams(max_tokens=6, temperature=temperature)
    completions = generator.generate(prompts, params, seeds=range(len(prompts)))
    assert any(len(completion.token_ids) == 6 for completion in completions)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(completion.token_ids) == len(completion.log_probs)
        assert_log_probs(completion, forward_log_probs(generator, prompt, completion.token_ids, temperature))


def test_the_models_own_generation_settings_change_nothing(generator, prompts, monkeypatch):
    params = until_length()
    plain = generator.generate(prompts, params, seeds=range(4))
    # What instruction-tuned checkpoints carry in generation_config.json.
    for name, value in {"repetition_penalty": 1.5, "temperature": 0.7, "top_p": 0.5, "top_k": 3}.items():
        monkeypatch.setattr(generator.model.generation_config, name, value)
    assert generator.generate(prompts, params, seeds=range(4)) == plain


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_first_tokens_are_drawn_from_the_softmax(generator, prompts, temperature):
    params = until_length(max_tokens=1, temperature=temperature, n=NUM_DRAWS)
    completions = generator.generate([prompts[0]], params, seeds=range(NUM_DRAWS))
    p = torch.softmax(raw_logits(generator, prompts[0])[-1] / temperature, dim=-1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=len(p))
    assert p.max() > 0.05  # sharp enough for the comparison to mean something
    assert (counts / NUM_DRAWS - p).abs().max() < MAX_DEVIATION


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"top_k": 1}, {"top_k": 1, "temperature": 1.5}])
def test_temperature_zero_and_top_k_one_are_greedy(generator, prompts, changes):
    completions = generator.generate(prompts, until_length(**changes), seeds=[11] * len(prompts))
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = raw_logits(generator, prompt, completion.token_ids)[:-1]
        assert completion.token_ids == logits.argmax(dim=-1).tolist()


def test_greedy_log_probs_are_those_of_temperature_one(generator, prompts):
    (completion,) = generator.generate([prompts[1]], until_length(temperature=0), seeds=[0])
    assert_log_probs(completion, forward_log_probs(generator, prompts[1], completion.token_ids))


def test_top_k_draws_from_the_k_likeliest_renormalised(generator, prompts):
    params = until_length(max_tokens=1, top_k=3, n=200)
    completions = generator.generate([prompts[0]], params, seeds=range(200))
    values, tokens = raw_logits(generator, prompts[0])[-1].topk(3)
    log_p = dict(zip(tokens.tolist(), torch.log_softmax(values, dim=-1).tolist(), strict=True))
    assert {c.token_ids[0] for c in completions} == set(log_p)
    for completion in completions:
        assert completion.log_probs[0] == pytest.approx(log_p[completion.token_ids[0]], abs=LOG_PROB_ATOL)


def test_top_p_draws_from_the_nucleus_renormalised(generator, prompts):
    top_p = 0.5
    params = until_length(max_tokens=1, top_p=top_p, n=200)
    completions = generator.generate([prompts[0]], params, seeds=range(200))
    p, order = torch.softmax(raw_logits(generator, prompts[0])[-1], dim=-1).sort(descending=True)
    size = int((p.cumsum(0) < top_p).sum()) + 1
    nucleus = dict(zip(order[:size].tolist(), (p[:size] / p[:size].sum()).log().tolist(), strict=True))
    assert 1 < size < len(p) / 2
    assert {c.token_ids[0] for c in completions} <= set(nucleus)
    for completion in completions:
        assert completion.log_probs[0] == pytest.approx(nucleus[completion.token_ids[0]], abs=LOG_PROB_ATOL)


def test_repetition_penalty_changes_the_reported_distribution(generator, prompts):
    params = until_length(max_tokens=1, repetition_penalty=2.0, temperature=0)
    (completion,) = generator.generate([prompts[3]], params, seeds=[0])
    logits = raw_logits(generator, prompts[3])[-1].clone()
    seen = torch.tensor(sorted(set(prompts[3])))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 2.0, logits[seen] * 2.0)
    assert_log_probs(completion, torch.log_softmax(logits, dim=-1).max()[None])


def test_n_completions_per_prompt_come_prompt_major_and_differ(generator, prompts):
    seeds = list(range(3 * len(prompts)))
    together = generator.generate(prompts, until_length(n=3), seeds)
    assert len(together) == len(seeds)
    for i, prompt in enumerate(prompts):
        own = together[3 * i : 3 * i + 3]
        assert [c.token_ids for c in own] == [
            c.token_ids for c in generator.generate([prompt], until_length(n=3), seeds[3 * i : 3 * i + 3])
        ]
        assert len({tuple(c.token_ids) for c in own}) == 3


def test_a_completion_depends_on_its_prompt_and_seed_only(generator, prompts):
    params = until_length(max_tokens=12)
    (alone,) = generator.generate([prompts[2]], params, seeds=[5])
    batch = [prompts[3], prompts[2], prompts[0], prompts[2]]  # the longest pads the others
    mixed = generator.generate(batch, params, seeds=[1, 5, 2, 6])
    assert mixed[1].token_ids == alone.token_ids
    assert_log_probs(mixed[1], torch.tensor(alone.log_probs))
    assert mixed[3].token_ids != alone.token_ids


def test_the_global_random_state_plays_no_part(generator, prompts):
    params = until_length()
    before = generator.generate(prompts, params, seeds=range(4))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert generator.generate(prompts, params, seeds=range(4)) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_completion_ends_with_its_end_of_sequence_token(generator, prompts):
    end = generator.tokenizer.eos_token_id
    completions = generator.generate([prompts[0]], SamplingParams(max_tokens=16, n=300), seeds=range(300))
    ended = [c for c in completions if c.stop_reason == "stop"]
    assert 0 < len(ended) < 300
    for completion in completions:
        assert len(completion.log_probs) == len(completion.token_ids)
        assert end not in completion.token_ids[:-1]
        assert (completion.token_ids[-1] == end) == (completion.stop_reason == "stop")
        assert completion.stop_reason == "stop" or len(completion.token_ids) == 16


@pytest.mark.parametrize(("num_tokens", "reason"), [(1, "aborted"), (3, "aborted"), (6, "length")])
def test_a_stopped_batch_keeps_the_tokens_it_has(generator, prompts, num_tokens, reason):
    free = generator.generate(prompts, until_length(), seeds=range(4))
    answers = iter([False] * (num_tokens - 1) + [True])
    stopped = generator.generate(prompts, until_length(), seeds=range(4), should_stop=lambda: next(answers))
    for whole, part in zip(free, stopped, strict=True):
        assert part.token_ids == whole.token_ids[:num_tokens]
        assert part.log_probs == whole.log_probs[:num_tokens]
        assert part.stop_reason == reason


def test_ignore_eos_goes_on_to_the_length_limit(generator, prompts):
    end = generator.tokenizer.eos_token_id
    completions = generator.generate([prompts[0]], until_length(max_tokens=16, n=300), seeds=range(300))
    assert all(c.stop_reason == "length" and len(c.token_ids) == 16 for c in completions)
    passed = next(c for c in completions if end in c.token_ids[:-1])
    assert_log_probs(passed, forward_log_probs(generator, prompts[0], passed.token_ids))


def test_stop_token_ids_end_a_completion_and_belong_to_it(generator, prompts):
    (free,) = generator.generate([prompts[0]], until_length(max_tokens=8), seeds=[3])
    stop_at = next(i for i in range(3, 8) if free.token_ids[i] not in free.token_ids[:i])
    params = until_length(max_tokens=8, stop_token_ids=(free.token_ids[stop_at],))
    (stopped,) = generator.generate([prompts[0]], params, seeds=[3])
    assert stopped.token_ids == free.token_ids[: stop_at + 1]
    assert stopped.log_probs == pytest.approx(free.log_probs[: stop_at + 1], abs=LOG_PROB_ATOL)
    assert stopped.stop_reason == "stop"


def begin_with_letters(generator, prompt, params, num_seeds=2000):
    """A completion that begins with four different printable ASCII characters, its seed, and the four."""
    many = dataclasses.replace(params, n=num_seeds)
    for seed, free in enumerate(generator.generate([prompt], many, seeds=range(num_seeds))):
        text = generator.tokenizer.decode(free.token_ids[:4])
        if len(set(text)) == len(text) == 4 and text.isascii() and text.isprintable():
            return free, seed, text
    raise AssertionError("no printable completion among the seeds")


def test_a_stop_string_ends_a_completion_and_belongs_to_it(generator, prompts):
    params = until_length(max_tokens=6, top_k=40)
    free, seed, text = begin_with_letters(generator, prompts[0], params)
    stopping = dataclasses.replace(params, stop=("never in there", text[1:3]))
    (stopped, other) = generator.generate([prompts[0], prompts[1]], stopping, seeds=[seed, seed])
    assert stopped.token_ids == free.token_ids[:3]
    assert stopped.log_probs == pytest.approx(free.log_probs[:3], abs=LOG_PROB_ATOL)
    assert stopped.stop_reason == "stop"
    assert other.stop_reason == "length" and len(other.token_ids) == 6


def test_a_stop_string_that_begins_in_the_prompt_does_not_end_a_completion(generator, prompts):
    params = until_length(max_tokens=6, top_k=40)
    free, seed, text = begin_with_letters(generator, prompts[0], params)
    stop = PROMPTS[0][-1] + text[0]
    assert stop not in text
    (stopped,) = generator.generate([prompts[0]], dataclasses.replace(params, stop=(stop,)), seeds=[seed])
    assert stopped.token_ids == free.token_ids
    assert stopped.stop_reason == "length"


def test_a_stop_string_inside_a_longer_token_ends_the_completion_with_that_token(generator, prompts):
    word = generator.tokenizer.convert_tokens_to_ids("assistant")
    params = until_length(max_tokens=4, n=600, stop=("ss",), temperature=3.0)
    completions = generator.generate([prompts[0]], params, seeds=range(600))
    reached = [c for c in completions if word in c.token_ids]
    assert reached
    for completion in reached:
        assert completion.token_ids.index(word) == len(completion.token_ids) - 1
        assert completion.stop_reason == "stop"


def test_from_request_reads_verls_dictionary():
    params = SamplingParams.from_request(
        {"temperature": 0.7, "top_p": 0.9, "top_k": -1, "stop": "END", "stop_token_ids": None, "logprobs": 0},
        default_max_tokens=32,
    )
    assert params.max_tokens == 32 and params.stop == ("END",) and params.stop_token_ids == ()
    assert params.temperature == 0.7 and params.top_p == 0.9
    assert SamplingParams.from_request({"stop": ["a", "b"], "max_new_tokens": 5}, 32).max_tokens == 5
    assert SamplingParams.from_request({"max_tokens": 4}, 32).max_tokens == 4


def test_from_request_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="min_p"):
        SamplingParams.from_request({"temperature": 1.0, "min_p": 0.1}, default_max_tokens=8)


def test_from_request_does_not_take_zero_tokens_for_the_default():
    with pytest.raises(ValueError, match="max_tokens=0"):
        SamplingParams.from_request({"max_tokens": 0}, default_max_tokens=8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("n", 0),
        ("repetition_penalty", 0.0),
    ],
)
def test_a_bad_value_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SamplingParams(**({"max_tokens": 4} | {name: value}))


def test_a_wrong_number_of_seeds_is_refused(generator, prompts):
    with pytest.raises(ValueError, match="3 seeds for 4 prompts x n=1"):
        generator.generate(prompts, until_length(), seeds=[0, 1, 2])
