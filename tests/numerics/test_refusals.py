# SPDX-License-Identifier: Apache-2.0
"""What the estimators refuse: each message names the culprit and the remedy, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.numerics.cases import CANDIDATES, EXACT, TRUSTED, WHOLE, errors, expect, scale, score
from tests.numerics.models import finished, gpt2, make_model, mixture_of_experts, qwen2
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.probe import layer_rules
from verl_gradalign.probe.direction import Direction, compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.layer_rules import LayerCall, LayerScores, register_layer_rule
from verl_gradalign.probe.matrix_scores import matrix_scores
from verl_gradalign.probe.plain_engine import PlainEngine

RTOL_FLOAT64 = 1e-10  # measured 4.8e-16
TAPPED = ("ghost", "low_rank", "output_layer")


def observe(model: nn.Module) -> list[object]:
    """Return everything that scoring must leave alone."""
    parameters = list(model.parameters())
    return [
        [parameter.detach().numpy().tobytes() for parameter in parameters],
        [parameter.requires_grad for parameter in parameters],
        [parameter.grad is None for parameter in parameters],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()],
    ]


def direction_of(model: nn.Module) -> Direction:
    rows, shares = tabulate(TRUSTED)
    with leave_no_trace(model):
        return compute_direction(PlainEngine(model, rows, TEMPERATURE), shares)


def refused(
    model: nn.Module,
    estimator: str,
    kind: type[Exception],
    *words: str,
    direction: Direction | None = None,
    max_tokens: int = 16384,
) -> None:
    """Assert that scoring raises `kind` with all `words` in its message, and leaves the model as it was."""
    direction = direction_of(model) if direction is None else direction
    rows, shares = tabulate(CANDIDATES)
    engine = PlainEngine(model, rows, TEMPERATURE, max_tokens)
    before = observe(model)
    with pytest.raises(kind) as refusal, leave_no_trace(model):
        ESTIMATORS[estimator]().score(engine, shares, direction)
    assert all(word in str(refusal.value) for word in words), str(refusal.value)
    assert observe(model) == before


class OddLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gain


def with_layers(*layers: nn.Module) -> nn.Module:
    """Return a model whose final norm is a chain of layers."""
    model = make_model("qwen2-untied")
    model.model.norm = nn.Sequential(model.model.norm, *layers).double()
    return model


@pytest.mark.parametrize("estimator", ["ghost", "low_rank"])
def test_a_layer_that_no_rule_covers_is_named(estimator: str) -> None:
    model = with_layers(OddLayer())
    words = ("model.norm.1.gain (OddLayer)", "Remedy", "estimator=backward", "register_layer_rule")
    with pytest.raises(ValueError) as refusal:
        ESTIMATORS[estimator]().check(model)
    assert all(word in str(refusal.value) for word in words)
    refused(model, estimator, ValueError, *words)


def test_adapters_that_are_no_layers_are_named() -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens"], lora_dropout=0.0)
    model = finished(get_peft_model(qwen2(tie_word_embeddings=False), config))
    refused(model, "ghost", ValueError, "lora_embedding_A", "ParameterDict", "estimator=backward")


def test_only_the_first_few_uncovered_layers_are_named() -> None:
    refused(with_layers(*(OddLayer() for _ in range(7))), "ghost", ValueError, "model.norm.5.gain", "and more")


def test_a_layer_called_twice_in_one_pass_is_named() -> None:
    twice = nn.Linear(16, 16)
    model = with_layers(twice, nn.Tanh(), twice)
    refused(model, "ghost", RuntimeError, "model.norm.1 was called more than once", "Remedy", "estimator=backward")


class Bypassed(nn.Module):
    """Uses its layer's weight without calling the layer, as a fused kernel does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.inner.weight.T


def test_a_layer_that_is_bypassed_is_named() -> None:
    model = with_layers(Bypassed())
    refused(model, "ghost", RuntimeError, "model.norm.1.inner", "not called", "fused kernel", "estimator=backward")


def test_three_layers_that_share_a_weight_are_named() -> None:
    first, second, third = (nn.Linear(16, 16, bias=False) for _ in range(3))
    second.weight = third.weight = first.weight
    names = ("model.norm.1", "model.norm.2", "model.norm.3", "share a weight", "estimator=backward")
    refused(with_layers(first, second, third), "ghost", ValueError, *names)


class Transposing(nn.Module):
    """Calls its layer with positions before lines, where problems cannot be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden.transpose(0, 1)).transpose(0, 1)


def test_a_layer_whose_output_does_not_begin_with_lines_and_positions_is_named() -> None:
    refused(with_layers(Transposing()), "ghost", RuntimeError, "model.norm.1.inner returned", "estimator=backward")


@pytest.mark.parametrize("estimator", WHOLE)
def test_a_response_larger_than_a_micro_batch_is_refused(estimator: str) -> None:
    model = make_model("qwen2-untied")
    words = ("p4, one response alone, takes 41 positions", "the 40 of a micro-batch", "max_tokens_per_rank")
    refused(model, estimator, ValueError, *words, max_tokens=40)


@pytest.mark.parametrize("estimator", WHOLE)
def test_a_problem_whose_rows_lie_on_several_ranks_is_refused(estimator: str) -> None:
    model = make_model("qwen2-untied")
    direction = direction_of(model)
    rows, shares = tabulate(CANDIDATES)
    shares[0] = type(shares[0])(shares[0].uid, shares[0].rows[:1], 3, shares[0].num_tokens, shares[0].longest_row)
    with pytest.raises(ValueError, match="p0 has 1 of its 3 rows on this rank"), leave_no_trace(model):
        ESTIMATORS[estimator]().score(PlainEngine(model, rows, TEMPERATURE), shares, direction)


@pytest.mark.parametrize("estimator", TAPPED)
def test_an_exception_inside_a_rule_leaves_nothing_hooked_or_frozen(
    monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    model = make_model("qwen2-untied", has_checkpointing=True)

    def fails(call: LayerCall) -> LayerScores:
        raise ArithmeticError("in the middle of the backward pass")

    direction = direction_of(model)
    monkeypatch.setitem(layer_rules.LAYER_RULES, nn.Linear, fails)
    if estimator == "low_rank":
        monkeypatch.setattr("verl_gradalign.probe.estimators.low_rank.linear", fails)
    refused(model, estimator, ArithmeticError, "in the middle", direction=direction)
    monkeypatch.undo()
    expected = expect(model, TRUSTED, CANDIDATES)
    assert max(errors(score("ghost", model, TRUSTED, CANDIDATES), expected).values()) <= RTOL_FLOAT64


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_direction_of_another_width_is_refused_by_parameter(estimator: str) -> None:
    model = make_model("qwen2-tied")
    narrow = direction_of(model)
    wide = Direction(tuple(torch.cat([s, s]) for s in narrow.shards if s is not None), 1.0)
    refused(model, estimator, RuntimeError, "model.embed_tokens.weight", "compute_direction", direction=wide)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_direction_of_other_parameters_is_refused_by_parameter(estimator: str) -> None:
    other = direction_of(make_model("qwen3-tied"))
    refused(make_model("qwen2-tied"), estimator, RuntimeError, "model.layers.", "compute_direction", direction=other)


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_a_parameter_frozen_since_is_named(estimator: str) -> None:
    model = make_model("qwen2-tied")
    direction = direction_of(model)
    model.model.norm.weight.requires_grad_(False)
    refused(model, estimator, RuntimeError, "trainable parameters", "compute_direction", direction=direction)


@pytest.mark.parametrize("estimator", [*EXACT, "low_rank", "output_layer"])
def test_gradients_present_on_entry_are_refused_by_parameter(estimator: str) -> None:
    model = make_model("qwen2-tied")
    direction = direction_of(model)
    rows, shares = tabulate(CANDIDATES)
    engine = PlainEngine(model, rows, TEMPERATURE)
    with leave_no_trace(model):
        engine.backward(shares[:1])
        with pytest.raises(RuntimeError, match="model.embed_tokens.weight already has a gradient"):
            ESTIMATORS[estimator]().score(engine, shares, direction)
        with pytest.raises(RuntimeError, match="model.embed_tokens.weight already has a gradient"):
            compute_direction(engine, shares)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = make_model("qwen2-tied").requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        ESTIMATORS["ghost"]().check(model)


def test_an_empty_trusted_set_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="trusted set is empty"):
        compute_direction(PlainEngine(model, [], TEMPERATURE), [])


def test_a_direction_that_is_not_finite_is_degenerate(model: nn.Module) -> None:
    rows, shares = tabulate([scale(TRUSTED[0], float("nan"))])
    with leave_no_trace(model):
        direction = compute_direction(PlainEngine(model, rows, TEMPERATURE), shares)
    assert direction.is_degenerate
    assert all(torch.equal(shard, torch.zeros_like(shard)) for shard in direction.shards if shard is not None)


def test_the_oracle_refuses_less_than_float64() -> None:
    with pytest.raises(ValueError, match="model.embed_tokens.weight is torch.float32"):
        problem_gradients_float64(make_model("qwen2-tied").float(), CANDIDATES, TEMPERATURE)


@pytest.fixture
def rule_for() -> Callable[[type[nn.Module]], Callable]:
    """Register rules for the length of a test."""
    before = dict(layer_rules.LAYER_RULES)
    yield register_layer_rule
    layer_rules.LAYER_RULES.clear()
    layer_rules.LAYER_RULES.update(before)


def test_a_registered_rule_makes_another_layer_exact(rule_for: Callable) -> None:
    model = finished(gpt2())
    layer = type(model.transformer.h[0].mlp.c_fc)
    refused(model, "ghost", ValueError, "transformer.h.0.attn.c_attn.weight (Conv1D)")

    @rule_for(layer)
    def transposed_linear(call: LayerCall) -> LayerScores:
        direction_OI = call.direction["weight"].T
        scores = LayerScores(*matrix_scores(call.delta, call.input, direction_OI, call.layout, call.scale_R))
        return layer_rules.add(scores, layer_rules.vector_scores(call.delta, call.direction["bias"], call))

    found = errors(score("ghost", model, TRUSTED, CANDIDATES), expect(model, TRUSTED, CANDIDATES))
    assert max(found.values()) <= RTOL_FLOAT64, found


def built_otherwise() -> nn.Module:
    """Return a model of experts that says its matrices are (inputs, outputs)."""
    model = mixture_of_experts()
    model.model.layers[0].mlp.experts.is_transposed = True
    return model


def test_experts_that_are_built_otherwise_are_refused_by_name() -> None:
    refused(built_otherwise(), "ghost", ValueError, "layers.0.mlp.experts.gate_up_proj", "estimator=backward")


def test_backward_scores_what_has_no_rule() -> None:
    model = built_otherwise()
    found = errors(score("backward", model, TRUSTED, CANDIDATES), expect(model, TRUSTED, CANDIDATES))
    assert max(found.values()) <= RTOL_FLOAT64, found
