# SPDX-License-Identifier: Apache-2.0
"""The function for use without verl: token ids and advantages in, scores out, the model untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.numerics.cases import expect
from tests.numerics.models import finished, gpt2, llama, make_model, qwen2
from tests.numerics.problems import VOCABULARY, Problem, with_coefficients
from tests.numerics.test_neutrality import observe
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe import score_problems as module
from verl_gradalign.probe.audit import spearman
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.objective import LOSS_AGG_MODES
from verl_gradalign.probe.score_problems import Response, score_problems

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
    with pytest.raises(ValueError, match="problem 3, response 1 has an empty prompt"):
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


def test_a_problem_larger_than_a_micro_batch_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="more than the 30 of a micro-batch"):
        score_problems(model, TRUSTED, CANDIDATES, max_tokens=30)


def test_a_problem_without_responses_scores_zero(model: nn.Module) -> None:
    scores = score_problems(model, TRUSTED, [CANDIDATES[0], []])
    assert scores.cosine_P[1] == 0.0 and scores.cosine_P[0] != 0.0
