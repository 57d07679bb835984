# SPDX-License-Identifier: Apache-2.0
"""Taps on the layers of a model: they see each layer's input and output gradient, and let both pass unchanged.

In a pass of its own all weights are frozen, so a backward pass computes activation gradients only; the graph opens at
the first tapped layer. In a training pass nothing is frozen, and every gradient is bit for bit what it is without taps
(`probe/update.py`). A layer's input is kept by autograd, not by a closure, so that checkpointed activations are freed;
a linear layer's in front of it, so that recomputing them still stops where the last layer would be run again.

    with tapped(module, tap_points(module), gather, head=plain_head(engine)) as taps:
        log_prob_RT, layout = taps.forward(engine, rows, rows_per_problem)
        taps.begin(layout, scale_R)
        (weight_RT * log_prob_RT).sum().backward()
        scores = taps.end()

Shape legend: R rows, P problems, N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from verl_gradalign.probe.engine import GradientEngine, HeadBlock
from verl_gradalign.probe.fsdp import Placement
from verl_gradalign.probe.gradient import all_parameters
from verl_gradalign.probe.gradient_sum import GradientSum
from verl_gradalign.probe.layer_rules import LayerCall, LayerScores, add, output_error
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.tap_nodes import Keep, Tap, TapProduct, keeper_of
from verl_gradalign.probe.tap_points import REMEDY, TapPoint
from verl_gradalign.probe.tied import TiedWeight

Gather = Callable[[Placement], Tensor]
"""Gives the direction of a parameter as its layer's rule wants it: whole (`DirectionGather`) or truncated."""
LEAST_TOLERANCE = 1e-5
"""Of `output_error`: transformers' norms compute in float32 in a float64 model too."""


@contextmanager
def tapped(
    root: nn.Module,
    points: Sequence[TapPoint],
    gather: Gather,
    gives_norm: bool = True,
    freezes: bool = True,
    head: nn.Module | None = None,
) -> Iterator[Taps]:
    """Tap the layers and freeze all weights; undo both, also after an exception. Use it inside `leave_no_trace`.

    Without `gives_norm` the squared norms lack a tied weight's cross term. Without `freezes` weights get their
    gradients as ever: for the passes of training itself. A `head` that gives log-probs in place of logits
    (`probe/head.py`) is not hooked: `Taps.forward` has it give its part.
    """
    parameters = [parameter for parameter in all_parameters(root) if parameter.requires_grad and freezes]
    taps = Taps(points, gather, gives_norm, head)
    hooked = [point for point in points if point is not taps.head]
    handles = [handle for point in hooked for handle in taps.register(point)]
    handles += [
        point.module.register_forward_hook(partial(taps.verify, point), prepend=True, with_kwargs=True)
        for point in hooked
        if not point.is_inside
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

    def __init__(
        self, points: Sequence[TapPoint], gather: Gather, gives_norm: bool, head: nn.Module | None = None
    ) -> None:
        self._points, self._gather, self._gives_norm = points, gather, gives_norm
        self.head = next((point for point in points if point.module is head and point.by_outputs), None)
        """The output layer, if it gives its part in blocks."""
        self._needs_logits = head is None or (self.head is None and any(point.module is head for point in points))
        """Whether the pass must form logits: as the model does something of its own with them, or as the output layer
        is tapped as other layers are."""
        self._bare: Layout | None = None
        """Of the pass, each row for itself."""
        self._parts: Sequence[Sequence[int]] | None = None
        self._gradient: GradientSum | None = None
        self._of_blocks: tuple[Layout, dict[str, Tensor]] | None = None
        """The layout of the output layer's blocks, and its direction: the same for all of a pass."""
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
        self._opened: list[TapProduct] = []
        self._errors: list[tuple[TapPoint, float, Tensor]] = []
        """Of layers' first outputs, each with what is allowed."""

    def register(self, point: TapPoint) -> list[RemovableHandle]:
        """Have the layer's output tapped, and a linear layer's input kept in front of it."""
        if point.is_inside:
            opened = point.module.register_forward_pre_hook(partial(self.open, point))
            return [opened, point.module.register_forward_hook(self.close, always_call=True)]
        # First of all hooks: one that changes the output changes what follows the layer, not the layer. But behind
        # FSDP2's, which would take the opened graph of a frozen unit for one that needs its weights once more.
        is_first = not isinstance(point.module, FSDPModule)
        tap = point.module.register_forward_hook(partial(self.tap, point), prepend=is_first, with_kwargs=True)
        # Others may use their input more than once, and gradients of the uses would be added up in another order.
        uses_input_once = isinstance(point.module, nn.Linear)
        keep = [point.module.register_forward_pre_hook(self.keep, with_kwargs=True)] if uses_input_once else []
        return [*keep, tap]

    def begin(
        self,
        layout: Layout,
        scale_R: Tensor,
        parts: Sequence[Sequence[int]] | None = None,
        gradient: GradientSum | None = None,
    ) -> None:
        """Start the backward pass of a micro-batch whose forward pass has run.

        With `parts` some rows of each problem count as one (`Layout.merged`): `scale_R` has one number for each part,
        and so has the result's `derivative_R`. With one problem its (scaled, summed) gradient is added to `gradient`,
        and the result's squared norms are of no use.
        """
        # Activations keep the shape of the pass, whichever of its rows count as one.
        self._shape, self._layout = layout.shape, layout if parts is None else layout.merged(parts)
        self._bare, self._parts, self._of_blocks, self._gradient = layout, parts, None, gradient
        self._scale_R, self._seen = scale_R, set()
        self._scores = LayerScores(torch.zeros_like(scale_R), scale_R.new_zeros(layout.num_problems))

    def end(self) -> LayerScores:
        """Return the scores of the micro-batch.

        Raises: RuntimeError if a layer was not part of the pass, or puts out something else than its rule is for.
        """
        self._require_known_outputs()
        missing = [point.name for point in self._points if point.module not in self._seen]
        if missing:
            trouble = "trained but not called in the scoring pass (bypassed by a fused kernel, or unused)"
            remedy = "Remedy: switch the kernel off, or set gradalign.estimator=backward"
            raise RuntimeError(f"{', '.join(missing[:5])}: {trouble}, so its gradient was not seen. {remedy}")
        assert self._scores is not None
        return self._scores

    def forward(
        self, engine: GradientEngine, rows: Sequence[int], rows_per_problem: Sequence[int]
    ) -> tuple[Tensor, Layout]:
        """Return what the engine's forward pass gives, with the output layer read as it is tapped. Collective."""
        on_block = None if self.head is None else partial(self._receive_block, self.head)
        return engine.forward(rows, rows_per_problem, on_block, self._needs_logits)

    def keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Return the layer's arguments with its input kept: a forward pre-hook.

        What needs no gradient is left alone, so that none is computed of it; so is what other taps keep already.
        """
        layer_input = _input(args, kwargs)
        if self.is_idle or not torch.is_grad_enabled() or not layer_input.requires_grad or keeper_of(layer_input):
            return None
        kept = Keep.apply(layer_input)  # type: ignore[no-untyped-call]
        return ((kept, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): kept})

    def open(self, point: TapPoint, module: nn.Module, _: Any) -> None:
        """Have the linear product in the layer tapped from now on: a forward pre-hook."""
        shape: torch.Size = module.weight.shape  # type: ignore[assignment]
        self._opened.append(TapProduct(shape, partial(self._tap_product, point)))
        self._opened[-1].__enter__()  # type: ignore[no-untyped-call]

    def close(self, *_: Any) -> None:
        """End it: a forward hook that is called after exceptions too."""
        self._opened.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _tap_product(self, point: TapPoint, layer_input: Tensor, output: Tensor) -> Tensor:
        tapped: Tensor = self.tap(point, point.module, (layer_input,), {}, output)
        return tapped

    def tap(self, point: TapPoint, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the layer's output with a tap behind it: a forward hook."""
        # A layer checkpointed by the reentrant way runs without gradients here, and once more in its backward.
        if self.is_idle or not torch.is_grad_enabled():
            return output
        layer_input = _input(args, kwargs)
        if output.dim() > 2:  # what experts and routers are given has lost its lines
            self.passed = tuple(output.shape[:2])
        if self._tied is not None and point is self._tied.embedding:
            self._tied.ids_N = layer_input.flatten()
        # The anchor opens the graph: without it nothing behind frozen weights requires a gradient.
        anchor = torch.empty(0, device=output.device, requires_grad=True)
        further = _further(args, kwargs) if point.is_given_all else ()
        keeper, receive = keeper_of(layer_input), partial(self._receive, point, further)
        own = layer_input if keeper is None else None
        return Tap.apply(output, own, anchor, keeper, receive)  # type: ignore[no-untyped-call]

    def verify(
        self, point: TapPoint, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Compare the layer's first output with what its rule is for: a forward hook before all others.

        What differs is refused at the end of the pass, all layers together: to read an error is to wait for the device.
        Raises: RuntimeError that names the layer if it puts out no tensor.
        """
        if module in self._verified:
            return
        self._verified.add(module)
        if not isinstance(output, Tensor):
            trouble = f"puts out a {type(output).__name__}, not a tensor, so its gradient cannot be seen"
            raise RuntimeError(f"{point.name} ({type(module).__name__}) {trouble}. {REMEDY}.")
        further = _further(args, kwargs) if point.is_given_all else ()
        error = output_error(module, output, _input(args, kwargs), *further)
        if error is not None:
            tolerance = max(LEAST_TOLERANCE, 4 * torch.finfo(output.dtype).eps)
            self._errors.append((point, tolerance, error))

    def _require_known_outputs(self) -> None:
        """Raise RuntimeError, naming the layer, if one put out something else than its rule is for (`verify`)."""
        noted, self._errors = self._errors, []
        errors = torch.stack([error for _, _, error in noted]).tolist() if noted else []
        for (point, tolerance, _), error in zip(noted, errors, strict=True):
            if error > tolerance:
                trouble = f"puts out something else than its layer rule is for (off by {error:.1%} of it)"
                kind = type(point.module).__name__
                raise RuntimeError(f"{point.name} ({kind}) {trouble}. {REMEDY}, or register a rule for it.")

    def _receive(self, point: TapPoint, further: tuple[Any, ...], layer_input: Tensor, delta: Tensor) -> None:
        """Add the layer's part to the scores."""
        self._require_first_call(point)
        layer_input, delta = _positions_first(point.module, layer_input, delta, self._shape)
        # Experts and what is beside them are given all positions one after another.
        is_flat = delta.dim() == 2 and len(delta) == self._shape[0] * self._shape[1]
        if not is_flat and tuple(delta.shape[:2]) != self._shape:
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
            gradient=self._totals(point),
            further=further,
        )
        self._add(point, call)

    def _receive_block(self, point: TapPoint, block: HeadBlock) -> None:
        """Add the part of some of the output layer's outputs to the scores."""
        self._require_first_call(point)
        assert self._bare is not None and self._layout is not None and self._scores is not None
        if self._of_blocks is None:
            layout = self._bare.of_responses(block.lengths)
            layout = layout if self._parts is None else layout.merged(self._parts)
            self._of_blocks = layout, {p.attribute: self._gather(p) for p in point.placements}
        layout, direction = self._of_blocks
        call = LayerCall(
            module=point.module,
            input=block.input_MH,
            delta=block.delta_MB,
            direction=direction,
            layout=layout,
            scale_R=self._scale_R,
            outputs=block.outputs,
            gradient=self._totals(point),
        )
        self._add(point, call)
        if block.is_last:
            self._of_blocks = None
            self._seen.add(point.module)

    def _add(self, point: TapPoint, call: LayerCall) -> None:
        """Add what the layer's rule says to the scores, and a tied weight's cross term."""
        assert self._layout is not None and self._scores is not None
        self._scores = add(self._scores, self._by_rule(point, call))
        if self._gradient is not None:
            self._gradient.add(point, call)
        if self._tied_here is not None and point is self._tied_here.head:
            self._tied_here.keep_head_rows(call, self._layout)
        elif self._tied_here is not None and point is self._tied_here.embedding:
            self._scores = add(self._scores, self._tied_here.cross_term(call))

    @property
    def _tied_here(self) -> TiedWeight | None:
        """The tied weight whose cross term this pass needs: a gradient that is added up whole has it."""
        return self._tied if self._gradient is None else None

    def _totals(self, point: TapPoint) -> dict[str, Tensor] | None:
        """Return what the layer's gradient is to be added to, None if it is not wanted."""
        return None if self._gradient is None else self._gradient.totals(point, self._scale_R)

    def _require_first_call(self, point: TapPoint) -> None:
        """Raise RuntimeError if the layer has given its part already."""
        if point.module in self._seen:
            trouble = "was called more than once in one pass, so its gradient has cross terms that no rule covers"
            raise RuntimeError(f"{point.name} {trouble}. {REMEDY}.")

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


_runs_over_heads: WeakSet[nn.Module] = WeakSet()
"""Layers whose activations were seen to be (lines, heads, positions, features)."""


def _positions_first(
    module: nn.Module, layer_input: Tensor, delta: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return a layer's input and output gradient as (lines, positions, ...).

    Norms of some models run over attention heads first. As many heads as positions are told apart by what was seen
    before, and by how the input lies in memory: heads are cut out of positions.
    """
    lines, width = shape
    if delta.dim() != 4 or layer_input.shape != delta.shape or (delta.shape[0], delta.shape[2]) != (lines, width):
        return layer_input, delta
    if delta.shape[1] != width:
        _runs_over_heads.add(module)
    elif module not in _runs_over_heads and layer_input.stride(1) >= layer_input.stride(2):
        return layer_input, delta
    return layer_input.transpose(1, 2), delta.transpose(1, 2)


def _further(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what else a layer was called with."""
    others = (*args[1:], *kwargs.values()) if args else tuple(kwargs.values())[1:]
    return tuple(each.detach() if isinstance(each, Tensor) else each for each in others)


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a layer was called with."""
    layer_input: Tensor = args[0] if args else next(iter(kwargs.values()))
    return layer_input
