# SPDX-License-Identifier: Apache-2.0
"""Models that others have put hooks, kernels or wrappers on: scored right, or refused with the layer's name."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from tests.numerics.cases import CANDIDATES, TRUSTED, errors, expect, score
from tests.numerics.kernels import bound_norm, norms_of, wrapped
from tests.numerics.models import make_model
from tests.numerics.problems import VOCABULARY
from tests.numerics.test_refusals import refused, with_layers
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe import layer_rules
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.layer_rules import LayerCall, LayerScores, linear, register_layer_rule

RTOL_FLOAT64 = 1e-10  # measured 1e-15
HOOKED = ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "model.norm", "lm_head")


def assert_exact(model: nn.Module, estimator: str = "ghost", config: ProbeConfig | None = None) -> None:
    found = errors(score(estimator, model, TRUSTED, CANDIDATES, config=config), expect(model, TRUSTED, CANDIDATES))
    assert max(found.values()) <= RTOL_FLOAT64, found


def differs(model: nn.Module, from_model: nn.Module) -> bool:
    ids = torch.arange(9).unsqueeze(0)
    return not torch.allclose(model(input_ids=ids).logits, from_model(input_ids=ids).logits)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "scaled output": lambda layer: layer.register_forward_hook(lambda *call: call[-1] * 1.7),
    "bent output": lambda layer: layer.register_forward_hook(lambda *call: torch.tanh(call[-1])),
    "changed input": lambda layer: layer.register_forward_pre_hook(
        lambda _, args: tuple(torch.tanh(a) if a.is_floating_point() else (a + 1) % VOCABULARY for a in args)
    ),
}


@pytest.mark.parametrize("where", HOOKED)
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_changes_a_layers_output_or_input_leaves_the_scores_exact(kind: str, where: str) -> None:
    model = make_model("qwen2-untied")
    HOOKS[kind](model.get_submodule(where))
    assert differs(model, make_model("qwen2-untied"))
    assert_exact(model)


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_on_a_tied_weight_leaves_the_scores_exact(kind: str) -> None:
    for where in ("model.embed_tokens", "lm_head"):
        model = make_model("qwen2-tied")
        HOOKS[kind](model.get_submodule(where))
        assert_exact(model)


def test_a_hook_that_changes_the_gradient_on_its_way_leaves_the_scores_exact() -> None:
    model = make_model("qwen2-untied")
    model.model.layers[1].mlp.up_proj.register_full_backward_pre_hook(lambda _, grads: tuple(2 * g for g in grads))
    model.model.layers[0].mlp.up_proj.register_full_backward_hook(lambda _, given, __: tuple(3 * g for g in given))
    assert_exact(model)


@pytest.fixture
def everywhere() -> Iterator[Callable[[Callable[..., Any]], None]]:
    """Register hooks of all modules, for the length of a test."""
    handles = []
    yield lambda hook: handles.append(register_module_forward_hook(hook))
    for handle in handles:
        handle.remove()


def test_a_hook_of_all_modules_that_looks_on_does_no_harm(everywhere: Callable[..., None]) -> None:
    seen: list[str] = []
    everywhere(lambda module, *_: seen.append(type(module).__name__))
    assert_exact(make_model("qwen2-untied"))
    assert "Linear" in seen


def test_a_hook_of_all_modules_that_changes_outputs_is_refused(everywhere: Callable[..., None]) -> None:
    model = make_model("qwen2-untied")
    everywhere(lambda module, _, output: output * 1.01 if module is model.model.layers[0].mlp.up_proj else None)
    refused(model, "ghost", RuntimeError, "model.layers.0.mlp.up_proj (Linear)", "off by 1.0%", "estimator=backward")


@pytest.mark.parametrize("estimator", ["ghost", "low_rank", "output_layer"])
def test_a_gradient_hook_of_a_parameter_is_refused_and_backward_heeds_it(estimator: str) -> None:
    model = make_model("qwen2-untied")
    model.lm_head.weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(ValueError, match=r"lm_head.weight has a gradient hook.*estimator=backward"):
        ESTIMATORS[estimator]().check(model)
    assert_exact(model, "backward")


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied"])
def test_norms_by_a_kernel_that_is_bound_to_each_are_scored_exactly(name: str) -> None:
    model = make_model(name)
    for norm in norms_of(model):
        norm.forward = types.MethodType(bound_norm(), norm)
    ESTIMATORS["ghost"]().check(model)
    assert_exact(model)


class ShiftedRMSNorm(nn.Module):
    """Named as transformers names them; its weight is an offset from one."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.eps, self.factor = nn.Parameter(torch.randn(16).double()), 1e-6, factor

    def forward(self, hidden: Tensor) -> Tensor:
        return bound_norm(offset=1.0, factor=self.factor)(self, hidden)


def test_a_norm_whose_weight_is_an_offset_is_scored_exactly_by_its_name() -> None:
    assert_exact(with_layers(ShiftedRMSNorm()))


@pytest.mark.parametrize("factor", [-1.0, 1.1, 16**0.5])
def test_what_is_called_a_norm_and_computes_something_else_is_refused(factor: float) -> None:
    refused(
        with_layers(ShiftedRMSNorm(factor)), "ghost", RuntimeError, "model.norm.1 (ShiftedRMSNorm)", "something else"
    )
    model = make_model("qwen2-untied")
    model.model.norm.forward = types.MethodType(bound_norm(factor=factor), model.model.norm)
    refused(model, "ghost", RuntimeError, "model.norm (RMSNorm) puts out something else", "estimator=backward")


def test_a_norm_with_a_parameter_that_its_rule_does_not_know_is_refused_at_once() -> None:
    norm = ShiftedRMSNorm()
    norm.bias = nn.Parameter(torch.randn(16).double())
    model = with_layers(norm)
    with pytest.raises(ValueError, match=r"no layer rule covers model.norm.1.bias \(ShiftedRMSNorm\)"):
        ESTIMATORS["ghost"]().check(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_made_of_other_parameters_is_refused_at_once() -> None:
    model = with_layers(torch.nn.utils.weight_norm(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match=r"model.norm.1.weight_g \(Linear\), model.norm.1.weight_v"):
        ESTIMATORS["ghost"]().check(model)


@pytest.mark.parametrize("estimator", ["ghost", "output_layer"])
def test_a_wrapper_that_says_what_it_wraps_is_looked_through(estimator: str) -> None:
    model = make_model("qwen2-untied")
    plain = score(estimator, model, TRUSTED, CANDIDATES)
    model.lm_head.forward = wrapped(model.lm_head)
    model.lm_head.forward = wrapped(model.lm_head)
    through = score(estimator, model, TRUSTED, CANDIDATES)
    # The wrapped one gives whole logits, the plain one blocks of them.
    torch.testing.assert_close(through.dot_P, plain.dot_P, rtol=1e-12, atol=1e-13)
    changing = make_model("qwen2-untied")
    changing.lm_head.forward = wrapped(changing.lm_head, 2.0)
    refused(changing, estimator, RuntimeError, "lm_head", "something else", "off by 100.0%")


def test_another_forward_of_one_layer_is_refused_at_once() -> None:
    model = make_model("qwen2-untied")
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda hidden: nn.functional.linear(hidden, layer.weight) * 2
    with pytest.raises(ValueError, match=r"no layer rule covers model.layers.0.mlp.up_proj.weight \(Linear\)"):
        ESTIMATORS["ghost"]().check(model)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(16).double())

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.gain


class Pair(Gain):
    def forward(self, hidden: Tensor) -> tuple[Tensor]:
        return (super().forward(hidden),)


@pytest.fixture
def rules() -> Iterator[None]:
    before = dict(layer_rules.LAYER_RULES)
    yield
    layer_rules.LAYER_RULES.clear()
    layer_rules.LAYER_RULES.update(before)


def gain_rule(call: LayerCall) -> LayerScores:
    return layer_rules.vector_scores(call.delta * call.input, call.direction["gain"], call)


def test_a_users_rule_of_the_right_form_is_exact(rules: None) -> None:
    register_layer_rule(Gain)(gain_rule)
    assert_exact(with_layers(Gain()))


def in_place(call: LayerCall) -> LayerScores:
    call.delta.mul_(call.input)
    return layer_rules.vector_scores(call.delta, call.direction["gain"], call)


FAULTY: dict[str, tuple[Callable[[LayerCall], Any], str]] = {
    "one number for all": (lambda call: LayerScores(call.scale_R.sum(), call.scale_R.sum()), r"derivative_R of \(\)"),
    "one derivative too few": (lambda call: LayerScores(call.scale_R[1:], call.scale_R), r"derivative_R of \("),
    "norms in a column": (
        lambda call: LayerScores(gain_rule(call).derivative_R, gain_rule(call).squared_norm_P.unsqueeze(1)),
        r"squared_norm_P of \(\d+, 1\), not of shape \(\d+,\)",
    ),
    "numbers of Python's": (lambda call: LayerScores(0.0, gain_rule(call).squared_norm_P), "derivative_R of float"),
    "complex numbers": (
        lambda call: LayerScores(gain_rule(call).derivative_R + 0j, gain_rule(call).squared_norm_P),
        "derivative_R of complex numbers",
    ),
    "a pair": (lambda call: (gain_rule(call).derivative_R, gain_rule(call).squared_norm_P), "returned a tuple"),
    "nothing": (lambda call: None, "returned a NoneType"),
    "a change in place": (in_place, "in place"),
}


@pytest.mark.parametrize(("rule", "words"), FAULTY.values(), ids=FAULTY.keys())
def test_a_users_rule_of_another_form_is_refused_by_the_layers_name(
    rules: None, rule: Callable[[LayerCall], Any], words: str
) -> None:
    register_layer_rule(Gain)(rule)
    model = with_layers(Gain())
    with pytest.raises(ValueError, match=words) as refusal:
        score("ghost", model, TRUSTED, CANDIDATES)
    assert "the layer rule of model.norm.1 (Gain)" in str(refusal.value) and "Remedy" in str(refusal.value)


def test_a_layer_that_puts_out_no_tensor_is_refused(rules: None) -> None:
    register_layer_rule(Pair)(gain_rule)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Pair()

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden)[0]

    refused(with_layers(First()), "ghost", RuntimeError, "model.norm.1.inner (Pair) puts out a tuple")


@pytest.mark.parametrize("kind", [nn.Linear(2, 2), "Linear", Tensor])
def test_a_rule_for_something_that_is_no_class_of_layers_is_refused(rules: None, kind: Any) -> None:
    with pytest.raises(TypeError, match="give the class of the layers"):
        register_layer_rule(kind)(linear)
