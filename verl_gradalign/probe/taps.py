# SPDX-License-Identifier: Apache-2.0
"""Taps on the layers of a model: they see each layer's input and output gradient, and let both pass unchanged.

In a pass of its own all weights are frozen, so a backward pass computes activation gradients only; the graph opens at
the first tapped layer. In a training pass nothing is frozen, and every gradient is bit for bit what it is without taps
(`probe/update.py`). A layer's input is kept by autograd, not by a closure, so that checkpointed activations are freed;
a linear layer's in front of it, so that recomputing them still stops where the last layer would be run again.

    with tapped(module, tap_points(module), gather) as taps:
        log_prob_RT, layout = engine.forward(rows, rows_per_problem)
        taps.begin(layout, scale_R)
        (weight_RT * log_prob_RT).sum().backward()
        scores = taps.end()

Shape legend: R rows, P problems, N positions, T positions of a problem, U its distinct tokens, H hidden features.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from verl_gradalign.probe.fsdp import Placement, trainable_placements
from verl_gradalign.probe.gradient import all_parameters, trainable_parameters
from verl_gradalign.probe.layer_rules import (
    COVERED,
    LayerCall,
    LayerRule,
    LayerScores,
    add,
    output_error,
    rule_of,
    without_padding_index,
)
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.tap_nodes import Keep, Tap, keeper_of

Gather = Callable[[Placement], Tensor]
"""Gives the direction of a parameter as its layer's rule wants it: whole (`direction.DirectionGather`) or truncated."""
OWN_HOOKS = ("torch.distributed.", "transformers.", "peft.", "verl.")
"""Whose forward hooks on a layer leave its output's value as it is: FSDP2's, and those that open the graph."""
LEAST_TOLERANCE = 1e-5
"""Of `output_error`: transformers' norms compute in float32 in a float64 model too."""
REMEDY = "Remedy: set gradalign.estimator=backward (exact) or finite_difference"


@dataclass(frozen=True)
class TapPoint:
    """A layer with trainable parameters, and the rule for it."""

    name: str
    module: nn.Module
    rule: LayerRule
    placements: tuple[Placement, ...]

    @property
    def has_matrix(self) -> bool:
        return any(len(placement.shape) > 1 for placement in self.placements)


def tap_points(root: nn.Module) -> list[TapPoint]:
    """Return the layers to tap: all that have trainable parameters, each parameter covered exactly once.

    Raises: ValueError that names the layers without a rule, and what to do. Call it while sharded.
    """
    by_module: dict[nn.Module, list[Placement]] = defaultdict(list)
    for placement in trainable_placements(root):
        by_module[placement.module].append(placement)
    if not by_module:
        raise ValueError("the model has no trainable parameter; there is no gradient to score")
    require_rows_of_tokens(by_module, root)
    points, uncovered = [], []
    for module, placements in by_module.items():
        rule, kind = rule_of(module), type(module).__name__
        if rule is None:
            uncovered += [f"{placement.name} ({kind})" for placement in placements]
        elif missed := [p for p in placements if p.attribute not in COVERED.get(rule, (p.attribute,))]:
            uncovered += [f"{placement.name} ({kind})" for placement in missed]
        else:
            points.append(TapPoint(placements[0].name.rpartition(".")[0] or kind, module, rule, tuple(placements)))
    if uncovered:
        first = ", ".join(uncovered[:5]) + (" and more" if len(uncovered) > 5 else "")
        remedy = f"{REMEDY}, or register a rule (probe.layer_rules.register_layer_rule)."
        raise ValueError(f"no layer rule covers {first}: the scores would miss their gradient. {remedy}")
    require_no_hooks(root, points)
    return points


def require_rows_of_tokens(by_module: Mapping[nn.Module, Sequence[Placement]], root: nn.Module) -> None:
    """Raise ValueError that names trained layers of an encoder of images, video or sound, or of its projector.

    Their positions are patches and not the tokens of the pass, so that taps cannot tell which row each belongs to.
    """
    inside = token_modules(root)
    if inside is None:
        return
    outside = [p.name for module, placements in by_module.items() if module not in inside for p in placements]
    if outside:
        first = ", ".join(outside[:3]) + (f" and {len(outside) - 3} more" if len(outside) > 3 else "")
        trouble = "lie outside the text model, whose positions alone can be told apart by row"
        remedy = "or train adapters of the text model only (LoRA with model.exclude_modules='.*visual.*')"
        raise ValueError(f"{first} {trouble}. {REMEDY}, {remedy}.")


def token_modules(root: nn.Module) -> set[nn.Module] | None:
    """Return the modules of a multi-modal model that run over rows of tokens; None if the whole model does."""
    model: Any = next((m for m in root.modules() if hasattr(getattr(m, "config", None), "get_text_config")), None)
    text = None if model is None else model.config.get_text_config()
    if model is None or text is model.config:
        return None
    parts = [m for m in root.modules() if type(getattr(m, "config", None)) is type(text)]
    head = model.get_output_embeddings()
    return {module for part in (*parts, head) if part is not None for module in part.modules()}


def require_no_hooks(root: nn.Module, points: Sequence[TapPoint]) -> None:
    """Raise ValueError, naming the parameter or layer, if a hook of it may change a gradient out of the taps' sight."""
    for name, parameter in trainable_parameters(root):
        if parameter._backward_hooks:
            trouble = "has a gradient hook (register_hook): training takes what it returns, taps would not see it"
            raise ValueError(f"{name} {trouble}. Remedy: remove the hook, or set gradalign.estimator=backward (exact).")
    # Between a layer that is an FSDP2 unit and its tap; elsewhere taps are the first hooks (`Taps.register`).
    units = [point for point in points if isinstance(point.module, FSDPModule)]
    for point, hook in ((unit, hook) for unit in units for hook in unit.module._forward_hooks.values()):
        if not str(getattr(hook, "__module__", "")).startswith(OWN_HOOKS):
            trouble = f"has a forward hook ({getattr(hook, '__qualname__', hook)}), which may change its output"
            raise ValueError(f"{point.name} {trouble}. Remedy: remove the hook, or set gradalign.estimator=backward.")


@contextmanager
def tapped(
    root: nn.Module, points: Sequence[TapPoint], gather: Gather, gives_norm: bool = True, freezes: bool = True
) -> Iterator[Taps]:
    """Tap the layers and freeze all weights; undo both, also after an exception. Use it inside `leave_no_trace`.

    Without `gives_norm` the squared norms lack a tied weight's cross term. Without `freezes` weights get their
    gradients as ever: for the passes of training itself.
    """
    parameters = [parameter for parameter in all_parameters(root) if parameter.requires_grad and freezes]
    taps = Taps(points, gather, gives_norm)
    handles = [handle for point in points for handle in taps.register(point)]
    handles += [
        point.module.register_forward_hook(partial(taps.verify, point), prepend=True, with_kwargs=True)
        for point in points
    ]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(True)


class Taps:
    """Collects the scores of one micro-batch at a time."""

    def __init__(self, points: Sequence[TapPoint], gather: Gather, gives_norm: bool) -> None:
        self._points, self._gather = points, gather
        tied = TiedWeight.find(points)  # also without norms: it refuses weights that are shared in other ways
        self._tied = tied if gives_norm else None
        self.is_idle = False
        """Whether forward passes are left alone from now on: a backward pass of theirs is not measured."""
        self.passed = (0, 0)
        """Leading axes of the activations, (lines, width), of the last forward pass."""
        self._shape = (0, 0)
        self._layout: Layout | None = None
        self._scale_R = torch.zeros(0)
        self._scores: LayerScores | None = None
        self._seen: set[nn.Module] = set()
        self._verified: set[nn.Module] = set()

    def register(self, point: TapPoint) -> list[RemovableHandle]:
        """Have the layer's output tapped, and a linear layer's input kept in front of it."""
        # First of all hooks: one that changes the output changes what follows the layer, not the layer. But behind
        # FSDP2's, which would take the opened graph of a frozen unit for one that needs its weights once more.
        is_first = not isinstance(point.module, FSDPModule)
        tap = point.module.register_forward_hook(partial(self.tap, point), prepend=is_first, with_kwargs=True)
        # Others may use their input more than once, and gradients of the uses would be added up in another order.
        uses_input_once = isinstance(point.module, nn.Linear)
        keep = [point.module.register_forward_pre_hook(self.keep, with_kwargs=True)] if uses_input_once else []
        return [*keep, tap]

    def begin(self, layout: Layout, scale_R: Tensor, parts: Sequence[Sequence[int]] | None = None) -> None:
        """Start the backward pass of a micro-batch whose forward pass has run.

        With `parts` some rows of each problem count as one (`Layout.merged`): `scale_R` has one number for each part,
        and so has the result's `derivative_R`.
        """
        # Activations keep the shape of the pass, whichever of its rows count as one.
        self._shape, self._layout = layout.shape, layout if parts is None else layout.merged(parts)
        self._scale_R, self._seen = scale_R, set()
        self._scores = LayerScores(torch.zeros_like(scale_R), scale_R.new_zeros(layout.num_problems))

    def end(self) -> LayerScores:
        """Return the scores of the micro-batch.

        Raises: RuntimeError if a layer was not part of the pass.
        """
        missing = [point.name for point in self._points if point.module not in self._seen]
        if missing:
            trouble = "trained but not called in the scoring pass (bypassed by a fused kernel, or unused)"
            remedy = "Remedy: switch the kernel off, or set gradalign.estimator=backward"
            raise RuntimeError(f"{', '.join(missing[:5])}: {trouble}, so its gradient was not seen. {remedy}")
        assert self._scores is not None
        return self._scores

    def keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Return the layer's arguments with its input kept: a forward pre-hook.

        What needs no gradient is left alone, so that none is computed of it; so is what other taps keep already.
        """
        layer_input = _input(args, kwargs)
        if self.is_idle or not torch.is_grad_enabled() or not layer_input.requires_grad or keeper_of(layer_input):
            return None
        kept = Keep.apply(layer_input)  # type: ignore[no-untyped-call]
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): kept})

    def tap(self, point: TapPoint, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the layer's output with a tap behind it: a forward hook."""
        # A layer checkpointed by the reentrant way runs without gradients here, and once more in its backward.
        if self.is_idle or not torch.is_grad_enabled():
            return output
        self.passed = tuple(output.shape[:2])
        layer_input = _input(args, kwargs)
        if self._tied is not None and point is self._tied.embedding:
            self._tied.ids_N = layer_input.flatten()
        # The anchor opens the graph: without it nothing behind frozen weights requires a gradient.
        anchor = torch.empty(0, device=output.device, requires_grad=True)
        keeper, receive = keeper_of(layer_input), partial(self._receive, point)
        own = layer_input if keeper is None else None
        return Tap.apply(output, own, anchor, keeper, receive)  # type: ignore[no-untyped-call]

    def verify(
        self, point: TapPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Compare the layer's first output with what its rule is for: a forward hook before all others.

        Raises: RuntimeError that names the layer if it is something else.
        """
        if module in self._verified:
            return
        self._verified.add(module)
        if not isinstance(output, Tensor):
            trouble = f"puts out a {type(output).__name__}, not a tensor, so its gradient cannot be seen"
            raise RuntimeError(f"{point.name} ({type(module).__name__}) {trouble}. {REMEDY}.")
        error = output_error(module, output, _input(args, kwargs))
        if error > max(LEAST_TOLERANCE, 4 * torch.finfo(output.dtype).eps):
            trouble = f"puts out something else than its layer rule is for (off by {error:.1%} of it)"
            raise RuntimeError(
                f"{point.name} ({type(module).__name__}) {trouble}. {REMEDY}, or register a rule for it."
            )

    def _receive(self, point: TapPoint, layer_input: Tensor, delta: Tensor) -> None:
        """Add the layer's part to the scores."""
        if point.module in self._seen:
            trouble = "was called more than once in one pass, so its gradient has cross terms that no rule covers"
            raise RuntimeError(f"{point.name} {trouble}. {REMEDY}.")
        if tuple(delta.shape[:2]) != self._shape:
            trouble = f"returned a tensor of shape {tuple(delta.shape)} in a pass over {self._shape} (lines, positions)"
            reason = "so its gradient cannot be cut at problem boundaries"
            raise RuntimeError(f"{point.name} {trouble}, {reason}. {REMEDY}.")
        self._seen.add(point.module)
        assert self._layout is not None and self._scores is not None, "begin comes before the backward pass"
        # More than one vector at each position where a layer works on attention heads.
        vectors_per_position = delta.numel() // delta.shape[-1] // (self._shape[0] * self._shape[1])
        is_ids = not layer_input.is_floating_point()
        call = LayerCall(
            module=point.module,
            input=layer_input.flatten() if is_ids else layer_input.reshape(-1, layer_input.shape[-1]),
            delta=delta.reshape(-1, delta.shape[-1]),
            direction={p.attribute: self._gather(p) for p in point.placements},
            layout=self._layout.widened(vectors_per_position),
            scale_R=self._scale_R,
        )
        self._scores = add(self._scores, self._by_rule(point, call))
        if self._tied is not None and point is self._tied.head:
            self._tied.keep_head_rows(call)
        elif self._tied is not None and point is self._tied.embedding:
            self._scores = add(self._scores, self._tied.cross_term(call))

    def _by_rule(self, point: TapPoint, call: LayerCall) -> LayerScores:
        """Return what the layer's rule says.

        Raises: ValueError that names the layer if that has another form, or if the rule changed what it was given.
        """
        assert self._scores is not None
        versions = call.delta._version, call.input._version
        scores, layer = point.rule(call), f"the layer rule of {point.name} ({type(point.module).__name__})"
        remedy = "Remedy: return LayerScores(derivative_R, squared_norm_P), one number per row and one per problem"
        if not isinstance(scores, LayerScores):
            raise ValueError(f"{layer} returned a {type(scores).__name__}. {remedy}.")
        for name in ("derivative_R", "squared_norm_P"):
            given, wanted = getattr(scores, name), getattr(self._scores, name)
            if not isinstance(given, Tensor) or given.is_complex() or given.shape != wanted.shape:
                shown = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                what = "complex numbers" if isinstance(given, Tensor) and given.is_complex() else f"{shown}"
                raise ValueError(f"{layer} returned {name} of {what}, not of shape {tuple(wanted.shape)}. {remedy}.")
        if (call.delta._version, call.input._version) != versions:
            trouble = "changed its input or delta in place, which the layers before it go on with"
            raise ValueError(f"{layer} {trouble}. Remedy: work on a copy (call.delta.clone()).")
        return scores


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a layer was called with."""
    layer_input: Tensor = args[0] if args else next(iter(kwargs.values()))
    return layer_input


class TiedWeight:
    """What is missing when the two uses of a weight, by an embedding and an output layer, are scored apart.

    Products with the direction add up. Squared norms do not: |G_head + G_embedding|^2 has the cross term
    2 <G_head, G_embedding>. G_embedding is non-zero only in the rows of the problem's own tokens, so those rows of
    G_head are kept from the head's backward until the embedding's, and nothing else.
    """

    def __init__(self, embedding: TapPoint, head: TapPoint) -> None:
        self.embedding, self.head = embedding, head
        self.ids_N = torch.zeros(0, dtype=torch.int64)
        """Token ids of the forward pass, which the head's backward needs."""
        self._head_rows_NH: Tensor | None = None

    @classmethod
    def find(cls, points: Sequence[TapPoint]) -> TiedWeight | None:
        """Return the tied weight among the tapped layers, None if no weight is used twice.

        Raises: ValueError that names the layers if a weight is shared in any other way.
        """
        uses = Counter(placement.identity for point in points for placement in point.placements)
        users = [point for point in points if any(uses[placement.identity] > 1 for placement in point.placements)]
        if not users:
            return None
        embeddings = [point for point in users if isinstance(point.module, nn.Embedding)]
        heads = [point for point in users if isinstance(point.module, nn.Linear)]
        if len(users) != 2 or len(embeddings) != 1 or len(heads) != 1:
            names = ", ".join(point.name for point in users)
            rule = "only one embedding tied to one linear layer has a rule"
            raise ValueError(f"{names} share a weight, and {rule}. {REMEDY}.")
        return cls(embeddings[0], heads[0])

    def keep_head_rows(self, call: LayerCall) -> None:
        """Keep, for each position, the row of its problem's head gradient that belongs to its token (N, H)."""
        scale_N1 = call.scale_R[call.layout.row_of_position(call.delta.device)].unsqueeze(-1)
        input_NH = call.input.to(call.dtype) * scale_N1
        parts = []
        for rows in call.layout.problems():
            positions = call.layout.positions_of(rows)
            # Only the columns of tokens that occur: the whole gradient has the vocabulary's size.
            ids_U, place_T = torch.unique(self.ids_N[positions], return_inverse=True)
            grad_UH = call.delta[positions][:, ids_U].to(call.dtype).T @ input_NH[positions]
            parts.append(grad_UH[place_T])
        self._head_rows_NH = torch.cat(parts)

    def cross_term(self, call: LayerCall) -> LayerScores:
        """Return 2 <G_head, G_embedding> of each problem as squared norms, from the embedding's backward."""
        rows_NH, self._head_rows_NH = self._head_rows_NH, None
        assert rows_NH is not None, "the output layer's backward runs before the embedding's"
        row_N = call.layout.row_of_position(call.delta.device)
        product_N = (rows_NH * without_padding_index(call).to(call.dtype)).sum(dim=-1) * call.scale_R[row_N]
        problem_N = call.layout.problem_of_row(call.delta.device)[row_N]
        cross_P = call.scale_R.new_zeros(call.layout.num_problems).index_add(0, problem_N, 2 * product_N)
        return LayerScores(torch.zeros_like(call.scale_R), cross_P)
