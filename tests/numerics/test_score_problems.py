# SPDX-License-Identifier: Apache-2.0
"""The function for use without verl: token ids and advantages in, scores out, the model untouched."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BatchEncoding

from tests.numerics.cases import expect
from tests.numerics.models import finished, gpt2, llama, make_model, qwen2
from tests.numerics.problems import VOCABULARY, Problem, with_coefficients
from tests.numerics.test_neutrality import observe
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe import score_problems as module
from verl_gradalign.probe.audit import spearman
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.objective import LOSS_AGG_MODES
from verl_gradalign.probe.responses import Response
from verl_gradalign.probe.score_problems import score_problems

RTOL_FLOAT64 = 1e-10  # of the gradient's norm; measured 5e-17
LEAST_SPEARMAN = 0.99  # measured 0.9993
NUM_CANDIDATES = 32
TEMPERATURE = 0.75  # as the oracle's


def draw_responses(lengths: list[int], seed: int) -> list[Response]:
    """Return a problem whose advantages are rewards of 0 and 1 minus their mean, never all zero."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(VOCABULARY, (1 + seed % 5,), generator=generator).tolist()
    rewards = [float(index % 2) for index in range(len(lengths))]
    mean = sum(rewards) / len(rewards)
    return [
        Response(prompt, torch.randint(VOCABULARY, (length,), generator=generator).tolist(), reward - mean)
        for length, reward in zip(lengths, rewards, strict=True)
    ]


def as_problem(responses: list[Response], loss_agg_mode: str) -> Problem:
    tokens = [torch.tensor(response.response_ids, dtype=torch.int64) for response in responses]
    prompt = torch.tensor(responses[0].prompt_ids, dtype=torch.int64)
    return with_coefficients(prompt, tokens, [response.advantage for response in responses], loss_agg_mode)


TRUSTED = [draw_responses([5, 3], 1), draw_responses([4, 6, 2], 2)]
CANDIDATES = [draw_responses([7, 1, 4], 3), draw_responses([3, 9], 4), draw_responses([0, 5, 2, 8], 5)]


@pytest.mark.parametrize("loss_agg_mode", [mode for mode in LOSS_AGG_MODES if mode != "seq-mean-token-sum-norm"])
def test_scores_equal_autograd(model: nn.Module, loss_agg_mode: str) -> None:
    scores = score_problems(model, TRUSTED, CANDIDATES, TEMPERATURE, loss_agg_mode=loss_agg_mode)
    trusted, candidates = ([as_problem(each, loss_agg_mode) for each in problems] for problems in (TRUSTED, CANDIDATES))
    expected = expect(model, trusted, candidates)
    assert ((scores.dot_P - expected.dot_P).abs() <= RTOL_FLOAT64 * expected.norm_P).all()
    assert ((scores.cosine_P - expected.cosine_P).abs() <= RTOL_FLOAT64).all()
    order = scores.cosine_P.argsort(descending=True)
    assert torch.equal(order, expected.cosine_P.argsort(descending=True))
    assert len(scores.uid) == len(CANDIDATES)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_every_estimator_leaves_the_model_as_it_was(estimator: str) -> None:
    model = make_model("qwen2-tied")
    model(input_ids=torch.arange(6).unsqueeze(0), use_cache=False).logits.sum().backward()
    model.model.layers[0].eval()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    before = observe(model)
    score_problems(model, TRUSTED, CANDIDATES, estimator=estimator, config=ProbeConfig(rank=2))
    assert observe(model) == before


def test_a_micro_batch_size_changes_nothing(model: nn.Module) -> None:
    small, large = (score_problems(model, TRUSTED, CANDIDATES, max_tokens=size) for size in (60, 16384))
    torch.testing.assert_close(small.dot_P, large.dot_P, rtol=0.0, atol=RTOL_FLOAT64)


@pytest.mark.parametrize("estimator", ["ghost", "backward"])
def test_bfloat16_ranks_problems_as_float32_does(estimator: str) -> None:
    torch.manual_seed(0)
    model = finished(qwen2(tie_word_embeddings=True)).float()
    candidates = [draw_responses([3 + k % 7, 5, 9, 2 + k % 4], 100 + k) for k in range(NUM_CANDIDATES)]
    exact = score_problems(model, TRUSTED, candidates)
    scores = score_problems(model, TRUSTED, candidates, estimator=estimator, autocast_dtype=torch.bfloat16)
    assert exact.norm_P is not None and scores.norm_P is not None
    assert spearman(scores.dot_P, exact.dot_P) >= LEAST_SPEARMAN
    assert spearman(scores.norm_P, exact.norm_P) >= LEAST_SPEARMAN
    assert not torch.equal(scores.dot_P, exact.dot_P)  # autocast did something


def test_an_unknown_estimator_is_named_with_the_known_ones(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="'magic': unknown; known are ghost, backward"):
        score_problems(model, TRUSTED, CANDIDATES, estimator="magic")


def test_an_empty_prompt_is_named(model: nn.Module) -> None:
    broken = [CANDIDATES[0][0], Response([], [3, 4], 1.0)]
    with pytest.raises(ValueError, match=r"candidates\[1\]\[1\] has an empty prompt"):
        score_problems(model, TRUSTED, [CANDIDATES[1], broken])


def test_trusted_problems_without_a_gradient_are_refused(model: nn.Module) -> None:
    alike = [[Response([1, 2], [3, 4], 0.0), Response([1, 2], [5], 0.0)]]
    before = observe(model)
    with pytest.raises(ValueError, match="gradient of norm 0.0: there is no direction.*differ in advantage"):
        score_problems(model, alike, CANDIDATES)
    assert observe(model) == before


def test_no_trusted_problems_are_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="trusted set is empty"):
        score_problems(model, [], CANDIDATES)


def test_dropout_is_refused_by_name() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="self_attn.*dropout|dropout.*self_attn") as refusal:
        score_problems(finished(llama(attention_dropout=0.1)), TRUSTED, CANDIDATES)
    assert "Remedy" in str(refusal.value)
    model = finished(gpt2())
    model.transformer.drop.p = 0.2
    with pytest.raises(ValueError, match=r"transformer.drop \(p=0.2\)"):
        score_problems(model, TRUSTED, CANDIDATES)


def test_a_model_that_the_estimator_cannot_score_is_refused_before_any_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compute_direction", None)
    with pytest.raises(ValueError, match="Conv1D.*estimator=backward"):
        score_problems(finished(gpt2()), TRUSTED, CANDIDATES)


def test_problems_larger_than_a_micro_batch_run_in_several(model: nn.Module) -> None:
    whole, cut = (score_problems(model, TRUSTED, CANDIDATES, max_tokens=n) for n in (16384, 30))
    for name in ("dot_P", "norm_P", "response_derivative_PR"):
        expected, found = getattr(whole, name), getattr(cut, name)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_response_larger_than_a_micro_batch_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="takes 7 positions, more than the 5 of a micro-batch"):
        score_problems(model, TRUSTED, CANDIDATES, max_tokens=5)


def test_a_problem_without_responses_scores_zero(model: nn.Module) -> None:
    scores = score_problems(model, TRUSTED, [CANDIDATES[0], []])
    assert scores.cosine_P[1] == 0.0 and scores.cosine_P[0] != 0.0


def with_field(**changed: Any) -> list[list[Response]]:
    """Return candidates of which the second response of the first problem has another field."""
    return [[CANDIDATES[0][0], replace(CANDIDATES[0][1], **changed)], CANDIDATES[1]]


TAKEN: dict[str, Callable[[Any], Any]] = {
    "arrays": np.array,
    "small arrays": lambda ids: np.array(ids, dtype=np.int16),
    "unsigned arrays": lambda ids: np.array(ids, dtype=np.uint64),
    "tensors": torch.tensor,
    "small tensors": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "tuples": tuple,
    "lists of tensors": lambda ids: list(torch.tensor(ids)),
}


@pytest.mark.parametrize("form", TAKEN.values(), ids=TAKEN.keys())
def test_ids_and_advantages_are_taken_in_any_form(model: nn.Module, form: Callable[[Any], Any]) -> None:
    def formed(response: Response) -> Response:
        advantage = np.float32(response.advantage) if form is np.array else torch.tensor(response.advantage)
        return Response(form(response.prompt_ids), form(response.response_ids), advantage)

    trusted, candidates = ([[*map(formed, problem)] for problem in each] for each in (TRUSTED, CANDIDATES[:2]))
    expected = score_problems(model, TRUSTED, CANDIDATES[:2])
    scores = score_problems(model, (iter(p) for p in trusted), map(tuple, candidates))
    torch.testing.assert_close(scores.dot_P, expected.dot_P, rtol=1e-6, atol=0.0)


FAULTY: dict[str, tuple[dict[str, Any], str]] = {
    "an advantage of nan": ({"advantage": float("nan")}, r"advantage=nan: must be finite"),
    "an infinite advantage": ({"advantage": float("-inf")}, r"advantage=-inf: must be finite"),
    "no advantage": ({"advantage": None}, r"advantage=None: must be a number"),
    "an advantage of text": ({"advantage": "0.5"}, r"advantage='0.5': must be a number"),
    "an advantage for each token": ({"advantage": [0.5, 0.5]}, r"advantage=\[0.5, 0.5\]: must be a number"),
    "a tensor of advantages": ({"advantage": torch.ones(2)}, r"advantage=tensor.*must be a number"),
    "text": ({"response_ids": "twelve"}, r"response_ids is text.*tokenizer"),
    "bytes": ({"prompt_ids": b"what"}, r"prompt_ids is text"),
    "words": ({"response_ids": ["a", "b"]}, r"response_ids holds 'a'"),
    "fractions": ({"response_ids": [1.0, 2.5]}, r"response_ids holds 1.0, not token ids"),
    "a tensor of floats": ({"response_ids": torch.tensor([1.0, 2.0])}, r"response_ids holds 1.0"),
    "a hole": ({"response_ids": [1, None]}, r"response_ids holds None"),
    "truth values": ({"response_ids": [True, False]}, r"response_ids holds True"),
    "a mapping": ({"prompt_ids": {"input_ids": [1]}}, r"prompt_ids has shape \(\)"),
    "a batch of one": ({"prompt_ids": torch.tensor([[1, 2]])}, r"prompt_ids has shape \(1, 2\).*batch axis"),
    "a batch of one in lists": ({"response_ids": [[1, 2]]}, r"response_ids has shape \(1, 2\)"),
    "a single id": ({"response_ids": 3}, r"response_ids has shape \(\)"),
    "uneven lists": ({"response_ids": [[1], [2, 3]]}, r"response_ids is no list of token ids"),
    "an id beyond the vocabulary": (
        {"response_ids": [3, VOCABULARY]},
        rf"response_ids\[1\]={VOCABULARY}.*0 to {VOCABULARY - 1}",
    ),
    "an id far beyond": (
        {"response_ids": np.array([2**63 + 1], dtype=np.uint64)},
        r"response_ids\[0\]=9223372036854775809",
    ),
    "a label": ({"prompt_ids": [5, -100, 2]}, r"prompt_ids\[1\]=-100.*-100"),
    "an empty prompt": ({"prompt_ids": []}, r"has an empty prompt"),
}


@pytest.mark.parametrize(("changed", "words"), FAULTY.values(), ids=FAULTY.keys())
def test_a_response_that_does_not_fit_is_named_with_its_place(
    model: nn.Module, changed: dict[str, Any], words: str
) -> None:
    for trusted, candidates, name in (
        (TRUSTED, with_field(**changed), "candidates"),
        (with_field(**changed), [], "trusted"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\[0\]\[1\].?{words}"):
            score_problems(model, trusted, candidates)


def test_what_tokenizers_return_is_told_from_ids(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"prompt_ids is a BatchEncoding. Remedy: give its input_ids"):
        score_problems(model, TRUSTED, with_field(prompt_ids=BatchEncoding({"input_ids": [1, 2]})))


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        (CANDIDATES[0], r"candidates\[0\] is a Response; give a problem: a list of Responses"),
        (CANDIDATES[0][0], "candidates is a Response; give a list of problems"),
        ([["text"]], r"candidates\[0\]\[0\] is a str without prompt_ids; give a verl_gradalign.Response"),
        ([[{"prompt_ids": [1]}]], r"candidates\[0\]\[0\] is a dict"),
        (["text"], r"candidates\[0\] is a str"),
        ([3], r"candidates\[0\] is a int"),
        (None, "candidates is a NoneType"),
    ],
)
def test_what_are_no_problems_is_refused_by_its_place(model: nn.Module, candidates: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        score_problems(model, TRUSTED, candidates)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("temperature", value) for value in (0, 0.0, -1.0, float("nan"), float("inf"), None, "1.0", True)],
        *[("max_tokens", value) for value in (0, -5, 2.5, None, True)],
        *[("loss_agg_mode", value) for value in ("mean", None, "seq-mean-token-sum-norm")],
        *[("autocast_dtype", value) for value in ("bf16", torch.int64, float)],
        *[("estimator", value) for value in ("Ghost", None)],
        ("config", {"rank": 3}),
    ],
)
def test_an_option_that_cannot_be_is_named_with_its_value(model: nn.Module, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option}={re.escape(repr(value))}: "):
        score_problems(model, TRUSTED, CANDIDATES, **{option: value})


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_the_callers_mode_changes_nothing(mode: Callable[[], Any], estimator: str) -> None:
    model = make_model("qwen2-untied").float()
    expected = score_problems(model, TRUSTED, CANDIDATES, estimator=estimator, config=ProbeConfig(rank=2))
    with mode():
        # Ids that were made under inference_mode too.
        made = [[Response(torch.tensor(r.prompt_ids), r.response_ids, r.advantage) for r in p] for p in CANDIDATES]
        before = observe(model)
        scores = score_problems(model, TRUSTED, made, estimator=estimator, config=ProbeConfig(rank=2))
        assert observe(model) == before
    assert torch.equal(scores.dot_P, expected.dot_P) and not scores.dot_P.is_inference()


def test_a_model_made_under_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = make_model("qwen2-tied")
    with pytest.raises(ValueError, match="embed_tokens.weight was made under torch.inference_mode.*outside of it"):
        score_problems(model, TRUSTED, CANDIDATES)


def test_models_without_a_gradient_are_refused_for_every_estimator() -> None:
    frozen = make_model("qwen2-tied").requires_grad_(False)
    for estimator in ESTIMATORS:
        with pytest.raises(ValueError, match="no trainable parameter. Remedy"):
            score_problems(frozen, TRUSTED, CANDIDATES, estimator=estimator)
    with torch.device("meta"):
        empty = qwen2()
    with pytest.raises(ValueError, match="embed_tokens.weight is on the meta device.*load the weights"):
        score_problems(empty, TRUSTED, CANDIDATES)
    with pytest.raises(TypeError, match="the model is a str; give a causal language model"):
        score_problems("Qwen/Qwen3-0.6B", TRUSTED, CANDIDATES)


def test_an_optimizer_inside_the_backward_pass_is_refused() -> None:
    model = make_model("qwen2-tied")
    model.model.norm.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(ValueError, match="model.norm.weight has a hook .*would train the model"):
        score_problems(model, TRUSTED, CANDIDATES)


def test_parameters_that_are_not_finite_are_told_from_equal_advantages() -> None:
    model = make_model("qwen2-tied")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="gradient of norm nan: there is no direction. Look for parameters"):
        score_problems(model, TRUSTED, CANDIDATES)


@pytest.mark.parametrize(
    ("attribute", "p"), [("dropout", 0.1), ("layerdrop", 0.2), ("activation_dropout", 1), ("router_jitter_noise", 0.01)]
)
def test_chance_that_is_no_module_of_torchs_is_refused_by_name(attribute: str, p: float) -> None:
    model = make_model("qwen2-tied")
    setattr(model.model.layers[1].mlp, attribute, p)
    with pytest.raises(ValueError, match=rf"model.layers.1.mlp \({attribute}={p}\).*Remedy"):
        score_problems(model, TRUSTED, CANDIDATES)
    setattr(model.model.layers[1].mlp, attribute, 0.0)
    score_problems(model, TRUSTED, CANDIDATES)


def test_problems_of_different_numbers_of_responses_and_none_at_all_are_scored(model: nn.Module) -> None:
    assert len(score_problems(model, TRUSTED, []).uid) == 0
    empty = [Response([1, 2], [], 0.5), Response([1, 2], [], -0.5)]
    scores = score_problems(model, [*TRUSTED, []], [CANDIDATES[0], empty, CANDIDATES[0][:1]])
    assert scores.cosine_P[1] == 0.0 and scores.dot_P[[0, 2]].all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_problems_in_range_are_scored_and_any_id_out_of_range_is_refused(
    model: nn.Module, data: st.DataObject
) -> None:
    ids = st.integers(0, VOCABULARY - 1)
    advantages = st.floats(-3, 3)
    response = st.builds(Response, st.lists(ids, min_size=1, max_size=4), st.lists(ids, max_size=5), advantages)
    candidates = data.draw(st.lists(st.lists(response, max_size=3), max_size=3))
    scores = score_problems(model, TRUSTED, candidates)
    assert scores.dot_P.isfinite().all() and len(scores.uid) == len(candidates)
    outside = data.draw(st.integers(-(2**40), -1) | st.integers(VOCABULARY, 2**40))
    with pytest.raises(ValueError, match=rf"trusted\[0\]\[0\].response_ids\[1\]={outside}: the model knows"):
        score_problems(model, [[Response([1], [2, outside], 1.0)]], candidates)
