# SPDX-License-Identifier: Apache-2.0
"""What others bind to the layers of a model in place of their class's forward.

for norm in norms_of(model):
    norm.forward = types.MethodType(bound_norm(), norm)
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def bound_norm(offset: float = 0.0, factor: float = 1.0) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return an RMSNorm's forward as a kernel is bound to each norm."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        size = hidden.square().mean(-1, keepdim=True).add(self.eps).rsqrt()
        return factor * hidden * size * (self.weight + offset)

    return forward


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def wrapped(layer: nn.Module, factor: float = 1.0) -> Callable[..., Tensor]:
    """Return a layer's forward wrapped as verl's activation offload wraps it."""
    inner = layer.forward

    @functools.wraps(inner)
    def outer(_: nn.Module, *args: Tensor) -> Tensor:
        return factor * inner(*args)

    return types.MethodType(outer, layer)
