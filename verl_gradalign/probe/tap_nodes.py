# SPDX-License-Identifier: Apache-2.0
"""The nodes that a tap puts into the graph, one in front of a layer and one behind it. Values pass unchanged.

kept = Keep.apply(layer_input)
output = Tap.apply(layer(kept), None, anchor, keeper_of(kept), receive)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


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


class TapProduct(TorchFunctionMode):
    """Puts a tap behind the linear products with a weight of this shape, while it is entered."""

    def __init__(self, shape: torch.Size, tap: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._shape, self._tap = shape, tap

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # Of the weight itself, or of a copy in another dtype.
        is_one = function is torch.nn.functional.linear and len(args) > 1 and args[1].shape == self._shape
        return self._tap(args[0], result) if is_one else result
