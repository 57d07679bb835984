# SPDX-License-Identifier: Apache-2.0
"""The direction v: the trusted set's policy gradient, normalised once, kept as shards aligned with the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.gradient import drop_gradients, gradient_shards, trainable_parameters
from verl_gradalign.types import ProblemRows


@dataclass(frozen=True)
class Direction:
    """v / |v| on this rank, one shard per trainable parameter (None where the rank holds nothing of it)."""

    shards: tuple[Tensor | None, ...]
    norm: float
    """|v| before it was normalised."""

    @property
    def is_degenerate(self) -> bool:
        """True if there is no direction: a zero or non-finite gradient."""
        return not math.isfinite(self.norm) or self.norm == 0

    def check_fits(self, module: torch.nn.Module) -> None:
        """Raise RuntimeError, naming the parameter, if the shards are not those of `module`'s trainable parameters."""
        gradients = gradient_shards(module)
        names = [name for name, _ in trainable_parameters(module)]
        if len(names) != len(self.shards):
            raise RuntimeError(
                f"the direction has {len(self.shards)} shards but the model has {len(names)} trainable parameters; "
                "make a new direction with this model"
            )
        for name, shard, gradient in zip(names, self.shards, gradients, strict=True):
            if shard is not None and gradient is not None and shard.shape != gradient.shape:
                raise RuntimeError(
                    f"direction shard of {name} has shape {tuple(shard.shape)}, its gradient "
                    f"{tuple(gradient.shape)}; make a new direction with this model and sharding"
                )

    def dot_and_square(self, module: torch.nn.Module) -> Tensor:
        """Return this rank's (<g, v / |v|>, |g|^2) of the gradient in `.grad`, summed in float64, shape (2,)."""
        total = torch.zeros(2, dtype=torch.float64)
        for shard, gradient in zip(self.shards, gradient_shards(module), strict=True):
            if gradient is None:
                continue
            square = gradient.square().sum(dtype=torch.float64)
            dot = torch.zeros_like(square) if shard is None else (gradient * shard).sum(dtype=torch.float64)
            total += torch.stack([dot, square]).cpu()
        return total


def compute_direction(engine: GradientEngine, problems: Sequence[ProblemRows]) -> Direction:
    """Return the direction: one accumulated backward over all responses of all trusted problems. Collective.

    Leaves every `.grad` None. A zero or non-finite gradient gives a degenerate direction, not an error.
    """
    drop_gradients(engine.module)
    engine.backward(problems)
    shards = [None if g is None else g.detach() * engine.gradient_scale for g in gradient_shards(engine.module)]
    drop_gradients(engine.module)
    squares = [shard.square().sum(dtype=torch.float64).cpu() for shard in shards if shard is not None]
    total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    norm = math.sqrt(all_reduce_sum(total, engine).item())
    scale = 1 / norm if math.isfinite(norm) and norm > 0 else 0.0
    return Direction(shards=tuple(None if s is None else s * scale for s in shards), norm=norm)


def all_reduce_sum(values: Tensor, engine: GradientEngine) -> Tensor:
    """Return the sum of a CPU tensor over the ranks that share the parameters. Collective."""
    if engine.shard_group is None:
        return values
    device = next(engine.module.parameters()).device
    reduced = values.to(device)
    dist.all_reduce(reduced, group=engine.shard_group)
    return reduced.cpu()
