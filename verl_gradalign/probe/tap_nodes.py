# SPDX-License-Identifier: Apache-2.0
"""The nodes that a tap puts into the graph, one in front of a layer and one behind it. Values pass unchanged.

kept = Keep.apply(layer_input)
output = Tap.apply(layer(kept), None, anchor, keeper_of(kept), receive)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Keep(torch.autograd.Function):
    """The identity on a layer's input, which it keeps for all taps behind the layer."""

    @staticmethod
    def forward(ctx: Any, layer_input: Tensor) -> Tensor:
        ctx.save_for_backward(layer_input)
        ctx.unpacked = None
        return layer_input.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        ctx.unpacked = None
        return grads[0]

    @staticmethod
    def read(node: Any) -> Tensor:
        """Return the input that a node keeps. A checkpointed one may be asked for once, and taps can be several."""
        if node.unpacked is None:
            (node.unpacked,) = node.saved_tensors
        unpacked: Tensor = node.unpacked
        return unpacked


def keeper_of(layer_input: Tensor) -> Any:
    """Return the node of the graph that keeps the input; None if there is none, or a hook changed the input since."""
    node = layer_input.grad_fn
    return node if getattr(node, "_forward_cls", None) is Keep else None


class Tap(torch.autograd.Function):
    """The identity on a layer's output. Its backward hands (input, output gradient) to `receive`.

    The input is read from the `keeper`, or kept here if there is none. Kept here, behind the layer, it would have
    activation checkpointing recompute the layer too: in a decoder layer that ends with a large matrix, a quarter of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        layer_input: Tensor | None,
        anchor: Tensor,
        keeper: Any,
        receive: Callable[[Tensor, Tensor], None],
    ) -> Tensor:
        if layer_input is not None:
            ctx.save_for_backward(layer_input)
        ctx.keeper, ctx.receive = keeper, receive
        # Not a view: what follows may work on it in place, as it may on the layer's own output.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        layer_input = Keep.read(ctx.keeper) if ctx.keeper is not None else ctx.saved_tensors[0]
        ctx.receive(layer_input, grads[0])
        return grads[0], None, None, None, None


class TapAll(torch.autograd.Function):
    """As `Tap`, on a layer's several outputs. Its backward hands (input, gradients, None where there is none) on."""

    @staticmethod
    def forward(
        ctx: Any,
        layer_input: Tensor,
        anchor: Tensor,
        receive: Callable[[Tensor, tuple[Tensor | None, ...]], None],
        *outputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(layer_input)
        ctx.set_materialize_grads(False)
        ctx.receive = receive
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.receive(ctx.saved_tensors[0], grads)
        return None, None, None, *grads
