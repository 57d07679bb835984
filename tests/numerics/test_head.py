# SPDX-License-Identifier: Apache-2.0
"""The output layer in blocks of the vocabulary: log-probs, gradients and scores are those of whole logits.

Shape legend: N positions, V vocabulary, H hidden features, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.benchmarks.counting import peak_bytes
from tests.numerics.cases import ALL_KINDS, TRUSTED, expect, score
from tests.numerics.models import GROUPED, WIDTHS, make_model, qwen2
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe import head as head_module
from verl_gradalign.probe import sizes
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.engine import HeadBlock, PreparedPass
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.head import plain_head, response_log_probs
from verl_gradalign.probe.layer_rules import LAYER_RULES, LayerCall, LayerScores, linear
from verl_gradalign.probe.objective import token_log_probs
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.sketch import sketched_scores

SEVERAL = 700
"""Elements of a chunk at which the tests' passes over some dozen tokens take many blocks of the vocabulary of 261."""
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def pass_of(head: nn.Module, hidden_NH: Tensor, ids_N: Tensor) -> PreparedPass:
    return PreparedPass(ids_N.unsqueeze(0), (0,), lambda: head(hidden_NH.unsqueeze(0)))


@pytest.mark.parametrize("chunk", [1, 100, 2**26])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_log_probs_and_all_gradients_equal_those_of_whole_logits(
    dtype: torch.dtype, has_bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    head = nn.Linear(7, 23, bias=has_bias, dtype=dtype)
    hidden_NH = torch.randn(20, 7, dtype=dtype, requires_grad=True)
    ids_N, spans = torch.randint(23, (20,)), [(2, 5), (9, 0), (10, 3)]
    weight_RT = torch.randn(3, 5).to(dtype)
    leaves = [hidden_NH, *head.parameters()]
    logits_NV = head(hidden_NH)
    position_M = torch.tensor([2, 3, 4, 5, 6, 10, 11, 12])
    expected_M = token_log_probs(logits_NV, position_M - 1, ids_N[position_M], TEMPERATURE)
    expected = torch.autograd.grad((expected_M * torch.cat([weight_RT[0], weight_RT[2, :3]])).sum(), leaves)
    blocks: list[HeadBlock] = []
    actual_RT = response_log_probs(pass_of(head, hidden_NH, ids_N), spans, TEMPERATURE, head, blocks.append)
    actual = torch.autograd.grad((actual_RT * weight_RT).sum(), leaves)
    assert actual_RT.dtype == expected_M.dtype and "forward" not in vars(head)
    torch.testing.assert_close(torch.cat([actual_RT[0], actual_RT[2, :3]]), expected_M, rtol=1e-5, atol=1e-5)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= TOLERANCES[dtype] * other.norm()
    assert [b.outputs.start for b in blocks] == list(range(0, 23, max(1, chunk // 8)))
    assert [b.is_last for b in blocks] == [False] * (len(blocks) - 1) + [True]
    assert all(b.lengths == (5, 0, 3) and b.delta_MB.dtype == dtype for b in blocks)


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "neox", "padding-tied", "head-only", "lora"])
@pytest.mark.parametrize("per_response", [True, False])
def test_scores_in_many_blocks_equal_autograd(name: str, per_response: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", SEVERAL)
    model, config = make_model(name), ProbeConfig(response_derivatives=per_response)
    scores, expected = score("ghost", model, TRUSTED, ALL_KINDS, config=config), expect(model, TRUSTED, ALL_KINDS)
    scale = expected.norm_P.max()
    assert ((scores.dot_P - expected.dot_P).abs() <= 1e-10 * scale).all()
    assert scores.norm_P is not None and ((scores.norm_P - expected.norm_P).abs() <= 1e-10 * scale).all()


@pytest.mark.parametrize("name", ["qwen2-tied", "neox"])
@pytest.mark.parametrize("estimator", ["low_rank", "output_layer", "finite_difference", "sketch"])
def test_scores_do_not_depend_on_the_number_of_blocks(
    estimator: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored() -> tuple[Tensor | None, ...]:
        model = make_model(name)
        rows, shares = tabulate([*TRUSTED, *ALL_KINDS])
        engine, problems = PlainEngine(model, rows, TEMPERATURE), shares[len(TRUSTED) :]
        with leave_no_trace(model):
            if estimator == "sketch":
                found = sketched_scores(engine, problems, None, rank=4, seed=0)
            else:
                direction = compute_direction(engine, shares[: len(TRUSTED)])
                found = ESTIMATORS[estimator]().score(engine, problems, direction)
        return found.dot_P, found.norm_P, found.response_derivative_PR

    whole = scored()
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", SEVERAL)
    # Log-probs are rounded at other places, and differences of them divided by a small step.
    tolerance = 1e-5 if estimator == "finite_difference" else 1e-9
    for one, other in zip(scored(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_a_model_that_caps_its_logits_is_scored_by_these() -> None:
    torch.manual_seed(0)
    options = {"final_logit_softcapping": 2.0, "attn_implementation": "eager"}
    model = Gemma2ForCausalLM(Gemma2Config(**WIDTHS, **GROUPED, **options)).train()
    rows, shares = tabulate(TRUSTED)
    engine = PlainEngine(model, rows, TEMPERATURE)
    assert plain_head(engine) is None
    log_prob_RT, _ = engine.forward(shares[0].rows, (len(shares[0].rows),))
    row = rows[0]
    logits_SV = model(input_ids=torch.cat([row.prompt, row.response]).unsqueeze(0)).logits[0]
    expected_SV = (logits_SV / TEMPERATURE).log_softmax(dim=-1)
    expected_T = expected_SV[len(row.prompt) - 1 : -1].gather(1, row.response.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(log_prob_RT[0, : len(expected_T)], expected_T, rtol=1e-5, atol=1e-5)


def with_hook(hook: Callable[..., Tensor]) -> tuple[nn.Module, PlainEngine]:
    model = make_model("qwen2-untied")
    model.lm_head.register_forward_hook(hook)
    return model, PlainEngine(model, tabulate(TRUSTED)[0], TEMPERATURE)


def test_a_head_whose_output_is_changed_or_replaced_gives_logits() -> None:
    _, engine = with_hook(lambda module, inputs, output: 2 * output)
    assert plain_head(engine) is None
    _, engine = with_hook(lambda module, inputs, output: None)  # it reads the output, and would get log-probs
    assert plain_head(engine) is None
    model = make_model("qwen2-untied")
    engine = PlainEngine(model, tabulate(TRUSTED)[0], TEMPERATURE)
    assert plain_head(engine) is model.lm_head
    handle = model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits.tanh()))
    assert plain_head(engine) is None
    handle.remove()
    assert plain_head(engine) is model.lm_head
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, model.lm_head.weight)
    assert plain_head(engine) is None


class Wrapper(nn.Module):
    """As FSDP1's and PEFT's, passes attributes on to the model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner, self.get_output_embeddings = model, model.get_output_embeddings

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def test_a_hook_inside_a_wrapper_is_seen() -> None:
    model = make_model("qwen2-untied")
    engine = PlainEngine(Wrapper(model), tabulate(TRUSTED)[0], TEMPERATURE)
    assert plain_head(engine) is model.lm_head
    model.register_forward_hook(lambda module, inputs, output: setattr(output, "logits", output.logits.tanh()))
    assert plain_head(engine) is None


def test_a_model_that_caps_its_logits_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options = {"final_logit_softcapping": 2.0, "attn_implementation": "eager", "attention_dropout": 0.0}
    model = Gemma2ForCausalLM(Gemma2Config(**WIDTHS, **GROUPED, **options)).double().train()
    num_tried = []
    found = head_module._puts_out_logits_of
    monkeypatch.setattr(head_module, "_puts_out_logits_of", lambda *args: num_tried.append(args) or found(*args))
    scores, expected = score("ghost", model, TRUSTED, ALL_KINDS), score("backward", model, TRUSTED, ALL_KINDS)
    torch.testing.assert_close(scores.dot_P, expected.dot_P, rtol=1e-6, atol=1e-9)
    assert len(num_tried) == 1


def test_a_rule_of_the_users_own_for_linear_layers_sees_the_whole_head(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def own(call: LayerCall) -> LayerScores:
        seen.append(call.delta.shape[-1])
        return linear(call)

    monkeypatch.setitem(LAYER_RULES, nn.Linear, own)
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", SEVERAL)
    model = make_model("qwen2-untied")
    scores, expected = score("ghost", model, TRUSTED, ALL_KINDS), expect(model, TRUSTED, ALL_KINDS)
    torch.testing.assert_close(scores.dot_P, expected.dot_P, rtol=1e-9, atol=1e-9)
    assert WIDTHS["vocab_size"] in seen


def test_a_head_that_is_given_other_positions_is_refused() -> None:
    head, hidden_NH = nn.Linear(4, 9), torch.randn(6, 4)
    passed = PreparedPass(torch.randint(9, (1, 6)), (0,), lambda: head(hidden_NH[:5].unsqueeze(0)))
    with pytest.raises(RuntimeError, match="output layer was given 5 positions in a pass over 6"):
        response_log_probs(passed, [(1, 3)], 1.0, head)
    assert "forward" not in vars(head)


def test_memory_of_a_pass_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = 2**16
    monkeypatch.setattr(sizes, "CHUNK_ELEMENTS", chunk)

    def peak(vocabulary: int) -> int:
        torch.manual_seed(0)
        model = qwen2(tie_word_embeddings=False)
        model.resize_token_embeddings(vocabulary)
        engine = PlainEngine(model.train(), rows, TEMPERATURE)
        plain_head(engine)
        with leave_no_trace(model):
            direction = compute_direction(engine, shares[:2])
            return peak_bytes(lambda: ESTIMATORS["ghost"]().score(engine, shares, direction), "cpu")

    rows, shares = tabulate(TRUSTED + ALL_KINDS)
    narrow, wide = peak(1024), peak(40_960)
    # Two matrices of the vocabulary, in which the direction is looked up; their products are formed in blocks.
    matrices = 2 * 40_960 * 16 * 4
    logits = sum(p.num_tokens for p in shares) * 40_960 * 4
    assert wide < narrow + matrices + 6 * chunk * 4 < logits
