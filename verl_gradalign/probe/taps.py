# SPDX-License-Identifier: Apache-2.0
"""Taps on the layers of a model: they see each layer's input and output gradient, and let both pass unchanged.

While tapped, all weights are frozen, so a backward pass computes activation gradients only; the graph opens at the
first tapped layer. A layer's input is kept by autograd, not by a closure, so that checkpointed activations are freed.

    with tapped(module, tap_points(module), gather) as taps:
        log_prob_RT, layout = engine.forward(rows, rows_per_problem)
        taps.begin(layout, scale_R)
        (weight_RT * log_prob_RT).sum().backward()
        scores = taps.end()

Shape legend: R rows, P problems, N positions, H hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from verl_gradalign.probe.fsdp import Placement
from verl_gradalign.probe.gradient import all_parameters
from verl_gradalign.probe.layer_rules import LayerCall, LayerScores, add
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.tap_points import TapPoint
from verl_gradalign.probe.tied import TiedWeight

Gather = Callable[[Placement], Tensor]
"""Gives the direction of a parameter as its layer's rule wants it: whole (`direction.DirectionGather`) or truncated."""


@contextmanager
def tapped(root: nn.Module, points: Sequence[TapPoint], gather: Gather, gives_norm: bool = True) -> Iterator[Taps]:
    """Tap the layers and freeze all weights; undo both, also after an exception. Use it inside `leave_no_trace`.

    Without `gives_norm` the squared norms lack a tied weight's cross term.
    """
    parameters = [parameter for parameter in all_parameters(root) if parameter.requires_grad]
    taps = Taps(points, gather, gives_norm)
    handles = [point.module.register_forward_hook(taps.hook(point), with_kwargs=True) for point in points]
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
        self._points = points
        self._gather = gather
        tied = TiedWeight.find(points)
        self._tied = tied if gives_norm else None
        self._shape = (0, 0)
        self._layout: Layout | None = None
        self._scale_R = torch.zeros(0)
        self._scores: LayerScores | None = None
        self._seen: set[int] = set()

    def begin(self, layout: Layout, scale_R: Tensor, parts: Sequence[Sequence[int]] | None = None) -> None:
        """Start the backward pass of a micro-batch whose forward pass has run.

        With `parts` some rows of each problem count as one (`Layout.merged`): `scale_R` has one number for each part,
        and so has the result's `derivative_R`.
        """
        self._shape, self._layout = layout.shape, layout if parts is None else layout.merged(parts)
        self._scale_R, self._seen = scale_R, set()
        self._scores = LayerScores(torch.zeros_like(scale_R), scale_R.new_zeros(layout.num_problems))

    def end(self) -> LayerScores:
        """Return the scores of the micro-batch.

        Raises: RuntimeError if a layer was not part of the pass.
        """
        missing = [point.name for point in self._points if id(point.module) not in self._seen]
        if missing:
            raise RuntimeError(
                f"{', '.join(missing[:5])}: trained but not called in the scoring pass (bypassed by a fused kernel, or "
                "unused), so its gradient was not seen. Remedy: switch the kernel off, or set "
                "gradalign.estimator=backward"
            )
        assert self._scores is not None
        return self._scores

    def hook(self, point: TapPoint) -> Callable[..., Tensor]:
        """Return the forward hook that puts a tap behind the layer."""

        def tap_output(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():
                return output
            layer_input = args[0] if args else next(iter(kwargs.values()))
            if self._tied is not None:
                self._tied.note_input(point, layer_input)
            # The anchor opens the graph: without it nothing behind frozen weights requires a gradient.
            anchor = torch.empty(0, device=output.device, requires_grad=True)
            return _Tap.apply(output, layer_input, anchor, lambda *call: self._receive(point, *call))  # type: ignore[no-untyped-call]

        return tap_output

    def _receive(self, point: TapPoint, layer_input: Tensor, delta: Tensor) -> None:
        if id(point.module) in self._seen:
            raise RuntimeError(
                f"{point.name} was called more than once in one pass, so its gradient has cross terms that no rule "
                "covers. Remedy: set gradalign.estimator=backward (exact) or finite_difference."
            )
        self._seen.add(id(point.module))
        layout = self._layout
        assert layout is not None and self._scores is not None, "begin comes before the backward pass"
        layout = layout.widened(_vectors_per_position(point, delta, self._shape))
        is_ids = not layer_input.is_floating_point()
        call = LayerCall(
            module=point.module,
            input=layer_input.flatten() if is_ids else layer_input.reshape(-1, layer_input.shape[-1]),
            delta=delta.reshape(-1, delta.shape[-1]),
            direction={p.attribute: self._gather(p) for p in point.placements},
            layout=layout,
            scale_R=self._scale_R,
        )
        self._scores = add(self._scores, point.rule(call))
        if self._tied is not None:
            self._scores = add(self._scores, self._tied.cross_term(point, call))


class _Tap(torch.autograd.Function):
    """The identity on a layer's output. Its backward hands (input, output gradient) to `receive`."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, layer_input: Tensor, anchor: Tensor, receive: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(layer_input)
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (layer_input,) = ctx.saved_tensors
        ctx.receive(layer_input, grads[0])
        return grads[0], None, None, None


def _vectors_per_position(point: TapPoint, delta: Tensor, shape: tuple[int, int]) -> int:
    """Return how many vectors the layer saw at each position, e.g. one per attention head."""
    if tuple(delta.shape[:2]) != shape:
        raise RuntimeError(
            f"{point.name} returned a tensor of shape {tuple(delta.shape)} in a pass over {shape} (lines, "
            "positions), so its gradient cannot be cut at problem boundaries. Remedy: set gradalign.estimator=backward "
            "(exact) or finite_difference."
        )
    return delta.numel() // delta.shape[-1] // (shape[0] * shape[1])
