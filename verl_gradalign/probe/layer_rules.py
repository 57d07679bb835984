# SPDX-License-Identifier: Apache-2.0
"""How each kind of layer turns its input and its output gradient into per-problem gradient products.

A rule sees one layer in one micro-batch. It returns, for this layer's parameters, each row's product of its gradient
with the direction, and each problem's squared gradient norm; the gradient itself is formed at most one problem at a
time and dropped. Support another layer by writing such a function and registering it:

    @register_layer_rule(MyLayer)
    def my_layer(call: LayerCall) -> LayerScores: ...

Shape legend: N flattened positions, I input features, O output features, D normalised features, H hidden features,
R rows, P problems.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from verl_gradalign.probe.layout import Layout, row_sums
from verl_gradalign.probe.matrix_scores import matrix_scores


@dataclass(frozen=True)
class LayerCall:
    """One backward pass of one layer. Tensors are flattened over positions; heads and the like count as positions."""

    module: nn.Module
    input: Tensor
    """What the layer was given: (positions, features), or token ids (positions,)."""
    delta: Tensor
    """Gradient of sum_t weight_t log pi(y_t) by the layer's output, (positions, features)."""
    direction: Mapping[str, Tensor]
    """v of each *trainable* parameter of the layer, by attribute name, in the parameter's shape."""
    layout: Layout
    scale_R: Tensor
    """Factor of each row's gradient in its problem's gradient, in the accumulation dtype."""
    outputs: slice = field(default_factory=lambda: slice(None))
    """Which of the layer's output features `delta` has; `direction` is of all. What a rule gives for each is added up
    (rules in `BY_OUTPUTS` only)."""
    gradient: Mapping[str, Tensor] | None = None
    """With one problem only: what its (scaled, summed) gradient is to be added to, by attribute name, of the parameters
    it is wanted of (rules in `COVERED` only)."""
    further: tuple[Any, ...] = ()
    """What else the layer was given, by position (experts only)."""

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype: float32, or float64 if the model computes in it."""
        return self.scale_R.dtype

    def total(self, attribute: str) -> Tensor | None:
        """Return what the gradient of the parameter, as far as the call has it, is to be added to, if it is wanted."""
        whole = None if self.gradient is None else self.gradient.get(attribute)
        return None if whole is None else whole[self.outputs]


@dataclass(frozen=True)
class LayerScores:
    """A layer's part of the scores, in the accumulation dtype."""

    derivative_R: Tensor
    """Each row's (unscaled) gradient times the direction, (rows,)."""
    squared_norm_P: Tensor
    """Squared norm of each problem's (scaled, summed) gradient, (problems,)."""


LayerRule = Callable[[LayerCall], LayerScores]

LAYER_RULES: dict[type[nn.Module], LayerRule] = {}
"""Rules by module type, subclasses that inherit `forward` included. RMSNorm classes are found by name (`rule_of`)."""


NAMED_RULES: list[tuple[Callable[[nn.Module], bool], LayerRule]] = []
"""Rules of layers that are known by how they are built, and not by their class."""
OUTPUTS: dict[LayerRule, Callable[..., Tensor]] = {}
"""What layers of such rules put out, given the layer and all that it is called with, which their calls have too."""
SHOWN_POSITIONS = 64
"""At which `output_error` compares."""


def register_layer_rule(*types: type[nn.Module]) -> Callable[[LayerRule], LayerRule]:
    """Return a decorator that makes a function the rule of module types (and of subclasses with their `forward`).

    The rule gets a `LayerCall` and returns `LayerScores` of its shapes, of all trainable parameters of the layer; what
    it is given it must not change. Raises: TypeError if something else than types of modules is given.
    """
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"register_layer_rule({kind!r}): give the class of the layers, such as MyLayer")

    def register(rule: LayerRule) -> LayerRule:
        LAYER_RULES.update(dict.fromkeys(types, rule))
        return rule

    return register


def rule_of(module: nn.Module) -> LayerRule | None:
    """Return the rule of the registered class whose `forward` the module runs, else one by its name, else None.

    A subclass with a `forward` of its own computes something else than its base's rule is for. By their names known
    are RMSNorms and LayerNorms, of which transformers' models have classes of their own, all with a `weight` and an
    epsilon, and embeddings times a number (Gemma's). Where more than the class decides what is computed, `output_error`
    says whether it is what the rule is for.
    """
    norm, base = _norm_by_name(module), _base_of(module)
    # A forward bound to the instance: a kernel (Liger's norms), or a wrapper that says what it wraps (verl's offload).
    own = vars(module).get("forward")
    if own is not None and not (norm is rms_norm or isinstance(module, nn.RMSNorm) or _is_wrapped(own, module)):
        return None
    if base is not None:
        return LAYER_RULES[base]
    if embedding_scale(module) is not None:
        return embedding
    return norm or next((rule for is_built, rule in NAMED_RULES if is_built(module)), None)


def _norm_by_name(module: nn.Module) -> LayerRule | None:
    if epsilon_of(module) is None:
        return None
    rules = {"RMSNorm": rms_norm, "LayerNorm": layer_norm}
    return next((rule for name, rule in rules.items() if type(module).__name__.endswith(name)), None)


def embedding_scale(module: nn.Module) -> Any:
    """Return the number that an embedding multiplies its weight's rows by, None for one that does not."""
    is_scaled = isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
    return getattr(module, "embed_scale", None) if is_scaled else None


def _base_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the registered class whose `forward` the module's class has."""
    classes = (base for base in type(module).__mro__ if base in LAYER_RULES)
    return next((base for base in classes if type(module).forward is base.forward), None)


def _is_wrapped(forward: Any, module: nn.Module) -> bool:
    """Return whether a forward says (functools.wraps) that it wraps the one of the module's class."""
    while (inner := getattr(forward, "__wrapped__", None)) is not None:
        forward = inner
    return getattr(forward, "__func__", None) is type(module).forward


def output_error(module: nn.Module, output: Tensor, layer_input: Tensor, *further: Any) -> Tensor | None:
    """Return by how much a layer's output differs from what its rule is for, as a share of it, at the first positions.

    A float64 scalar on the device, nan where either is not finite. None where the class alone decides: no forward of
    the instance, no rule by name, no hooks of all modules. Call it where the parameters are whole. `further`: what else
    the layer was given, cut as the output is.

    Shapes: output (lines, positions, ...), layer_input (lines, positions[, ..., features]).
    """
    base = _base_of(module)
    if base is not None and "forward" not in vars(module) and not _global_forward_hooks:
        return None
    # Of the first line, where there are lines; what else a layer is called with, its tap refuses.
    has_lines = layer_input.dim() >= (3 if layer_input.is_floating_point() else 2)
    some = (slice(0, 1), slice(0, SHOWN_POSITIONS)) if has_lines else slice(0, SHOWN_POSITIONS)
    actual, value = output[some].detach(), layer_input[some].detach()
    with torch.no_grad():
        if base is not None:
            known = [base.forward(module, value)]
        elif (scale := embedding_scale(module)) is not None:
            known = [nn.Embedding.forward(cast(nn.Embedding, module), value) * scale]
        elif (made := OUTPUTS.get(cast(LayerRule, rule_of(module)))) is not None:
            known = [made(module, value, *(each[some] for each in further))]
        elif _norm_by_name(module) is layer_norm:
            known = [_standardised(module, value)]
        else:
            # Some RMSNorms have a weight, others its offset from one.
            known = _normalised(module, value)
        errors = [(actual.double() - each.double()).norm() / each.double().norm() for each in known]
    return torch.stack(errors).min()


def _normalised(module: nn.Module, value: Tensor) -> list[Tensor]:
    """Return what an RMSNorm may put out, its weight as it is or as an offset from one."""
    value_D = value.to(torch.promote_types(value.dtype, torch.float32))
    epsilon: Any = epsilon_of(module)
    factor = torch.rsqrt(value_D.square().mean(dim=-1, keepdim=True) + epsilon)
    weight_D: Any = module.weight
    return [value_D * factor * weight_D, value_D * factor * (1 + weight_D)]


def _standardised(module: Any, value: Tensor) -> Tensor:
    """Return what a LayerNorm puts out."""
    value_D = value.to(torch.promote_types(value.dtype, torch.float32))
    normalised_D = nn.functional.layer_norm(value_D, value_D.shape[-1:], eps=cast(float, epsilon_of(module)))
    bias_D = getattr(module, "bias", None)
    return normalised_D * module.weight if bias_D is None else normalised_D * module.weight + bias_D


def add(first: LayerScores, *others: LayerScores) -> LayerScores:
    """Return the scores of disjoint sets of parameters together."""
    total = first
    for other in others:
        total = LayerScores(total.derivative_R + other.derivative_R, total.squared_norm_P + other.squared_norm_P)
    return total


@register_layer_rule(nn.Linear)
def linear(call: LayerCall) -> LayerScores:
    """Linear layers, with and without bias, LoRA's A and B among them: gradient delta^T input, and sum of delta."""

    def of_weight(direction_OI: Tensor) -> LayerScores:
        of_outputs, total_OI = direction_OI[call.outputs], call.total("weight")
        return LayerScores(*matrix_scores(call.delta, call.input, of_outputs, call.layout, call.scale_R, total_OI))

    return weight_and_bias(call, of_weight)


@register_layer_rule(nn.Embedding)
def embedding(call: LayerCall) -> LayerScores:
    """Embeddings, times a number or not: the rows of delta, added up by token id.

    The padding index gets no gradient, as in torch.
    """
    module: Any = call.module
    require_plain_embedding(module)
    delta_NH = embedding_delta(call).to(call.dtype)
    product_N = (delta_NH * call.direction["weight"][call.input].to(call.dtype)).sum(dim=-1)
    derivative_R = row_sums(product_N, call.layout, call.dtype)
    row_N = call.layout.row_of_position(delta_NH.device)
    problem_N = call.layout.problem_of_row(delta_NH.device)[row_N]
    # A token that occurs twice has one row of gradient, whose square is of the sum: rows are added up before squaring.
    key_N = problem_N * module.num_embeddings + call.input
    key_U = torch.unique(call.layout.of_all_slices(key_N), sorted=True)
    place_N = torch.searchsorted(key_U, key_N)
    grad_UH = delta_NH.new_zeros(len(key_U), delta_NH.shape[-1])
    grad_UH.index_add_(0, place_N, delta_NH * call.scale_R[row_N].unsqueeze(-1))
    if (total_VH := call.total("weight")) is not None:
        total_VH.index_add_(0, key_U, grad_UH)  # of one problem, whose keys are the tokens
        return LayerScores(derivative_R, grad_UH.new_zeros(1))
    squared_norm_P = delta_NH.new_zeros(call.layout.num_problems)
    share_UH = call.layout.summed(grad_UH)
    squared_norm_P.index_add_(0, key_U // module.num_embeddings, share_UH.square().sum(dim=-1))
    return LayerScores(derivative_R, squared_norm_P)


@register_layer_rule(nn.RMSNorm)
def rms_norm(call: LayerCall) -> LayerScores:
    """RMSNorm, also where the weight is an offset from one: gradient sum of delta times the normalised input."""
    # In the accumulation dtype, as transformers computes its norms whatever they are given.
    input_ND = call.input.to(call.dtype)
    factor_N = inverse_rms(call.module, input_ND)
    direction_D, total_D = call.direction["weight"], call.total("weight")
    return vector_scores(input_ND * call.delta, direction_D, call, factor_N, total_D)


@register_layer_rule(nn.LayerNorm)
def layer_norm(call: LayerCall) -> LayerScores:
    """LayerNorm over the last axis: as RMSNorm with the mean taken off, and a bias."""

    def of_weight(direction_D: Tensor) -> LayerScores:
        input_ND, epsilon = call.input.to(call.dtype), cast(float, epsilon_of(call.module))
        normalised_ND = nn.functional.layer_norm(input_ND, input_ND.shape[-1:], eps=epsilon)
        return vector_scores(call.delta * normalised_ND, direction_D, call, total_F=call.total("weight"))

    return weight_and_bias(call, of_weight)


COVERED: dict[LayerRule, tuple[str, ...]] = {
    linear: ("weight", "bias"),
    embedding: ("weight",),
    rms_norm: ("weight",),
    layer_norm: ("weight", "bias"),
}
"""Parameters that the rules of this module know. A rule of the user's must know all that its layer trains."""
BY_OUTPUTS = {linear}
"""Rules that can be given some of a layer's outputs at a time."""


def weight_and_bias(call: LayerCall, of_weight: Callable[[Tensor], LayerScores]) -> LayerScores:
    """Return the scores of a layer's weight, by a function of v of it, and of its bias, as far as they are trained."""
    parts = [of_weight(call.direction["weight"])] if "weight" in call.direction else []
    if "bias" in call.direction:
        direction_O = call.direction["bias"][call.outputs]
        parts.append(vector_scores(call.delta, direction_O, call, total_F=call.total("bias")))
    return add(*parts)


def vector_scores(
    grad_NF: Tensor,
    direction_F: Tensor,
    call: LayerCall,
    factor_N: Tensor | None = None,
    total_F: Tensor | None = None,
) -> LayerScores:
    """Return the scores of a vector parameter whose gradient is the sum of `factor_N * grad_NF` over positions.

    The (scaled, summed) gradient of all problems is added to `total_F`, if given.
    """
    grad_RF = row_sums(grad_NF, call.layout, call.dtype, factor_N)
    problem_R = call.layout.problem_of_row(grad_RF.device)
    grad_PF = grad_RF.new_zeros(call.layout.num_problems, grad_RF.shape[-1])
    grad_PF.index_add_(0, problem_R, grad_RF * call.scale_R.unsqueeze(-1))
    derivative_R = grad_RF @ direction_F.to(call.dtype)
    if total_F is not None:
        total_F += grad_PF.sum(dim=0)
        return LayerScores(derivative_R, call.scale_R.new_zeros(call.layout.num_problems))
    return LayerScores(derivative_R, call.layout.summed(grad_PF).square().sum(dim=-1))


def require_plain_embedding(module: nn.Module) -> None:
    """Raise ValueError if an embedding's option makes its gradient something else than rows of delta added up."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if value := getattr(module, option, None):
            raise ValueError(f"an embedding with {option}={value} has no layer rule; use the estimator backward")


def inverse_rms(module: nn.Module, input_ND: Tensor) -> Tensor:
    """Return what an RMSNorm multiplies each position's input by, before its weight, (positions,)."""
    epsilon = epsilon_of(module)
    epsilon = torch.finfo(input_ND.dtype).eps if epsilon is None else epsilon
    return torch.rsqrt(torch.linalg.vector_norm(input_ND, dim=-1).square() / input_ND.shape[-1] + epsilon)


def embedding_delta(call: LayerCall) -> Tensor:
    """Return the gradient by the weight's row of each position's token, (positions, features).

    0 at the padding index.
    """
    padding_idx, scale = cast(nn.Embedding, call.module).padding_idx, embedding_scale(call.module)
    delta_NH = call.delta if scale is None else call.delta * torch.as_tensor(scale).to(call.delta)
    return delta_NH if padding_idx is None else delta_NH.masked_fill((call.input == padding_idx).unsqueeze(-1), 0.0)


def epsilon_of(module: nn.Module) -> float | None:
    """Return a norm's epsilon, by torch's or transformers' name."""
    epsilon = getattr(module, "eps", None)
    return epsilon if epsilon is not None else getattr(module, "variance_epsilon", None)
