# SPDX-License-Identifier: Apache-2.0
"""The direction v that problems are compared with: the trusted set's policy gradient, kept as this rank's shards.

It does not decide which problems are trusted, nor when the direction is refreshed.

    with leave_no_trace(engine.module):
        direction = compute_direction(engine, trusted)
    if direction.is_degenerate: ...
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.gradient import clear_gradients, local_grad, require_no_gradients, trainable_parameters
from verl_gradalign.types import ProblemRows

__all__ = [
    "Direction",
    "compute_direction",
    "dot_with_gradient",
    "on_cpu",
    "require_same_shards",
    "squared_gradient_norm",
    "with_adam_metric",
]


@dataclass(frozen=True)
class Direction:
    """v / |v|, sharded as the gradient is."""

    shards: tuple[Tensor | None, ...]
    """One per trainable parameter, in the module's order, with the shape and dtype of the parameter's local gradient
    shard; None where this rank had no gradient. All zeros if the direction is degenerate."""
    norm: float
    """|v| before it was normalised, over all shards, in units of the gradient (gradient scale removed)."""

    @property
    def is_degenerate(self) -> bool:
        """True if there is no direction: |v| is zero (every trusted group all right or all wrong) or not finite."""
        return not (math.isfinite(self.norm) and self.norm > 0.0)


def compute_direction(engine: GradientEngine, problems: Sequence[ProblemRows]) -> Direction:
    """Return the unit direction of the summed gradient of `problems`. Collective: every rank calls it alike.

    One accumulated backward pass over all rows; the gradients are None afterwards.

    Raises: ValueError without problems; RuntimeError if gradients are present on entry.
    """
    if not problems:
        raise ValueError("the trusted set is empty; give at least one problem to take the direction from")
    require_no_gradients(engine.module)
    engine.backward(problems)
    parameters = trainable_parameters(engine.module)
    squared_norm = squared_gradient_norm(engine)
    if engine.shard_group is not None:
        torch.distributed.all_reduce(squared_norm, group=engine.shard_group)
    raw_norm = math.sqrt(squared_norm.item())
    norm = raw_norm * engine.gradient_scale
    usable = math.isfinite(raw_norm) and raw_norm > 0.0
    shards: list[Tensor | None] = []
    for _, parameter in parameters:
        shard = local_grad(parameter)
        if shard is not None:
            shard = shard.detach() / raw_norm if usable else torch.zeros_like(shard)
        shards.append(shard)
        parameter.grad = None
    clear_gradients(engine.module)
    return Direction(shards=tuple(shards), norm=norm)


def dot_with_gradient(engine: GradientEngine, direction: Direction) -> Tensor:
    """Return <.grad, v / |v|> over this rank's shards, a float64 scalar on the parameters' device.

    Units: those of `.grad`; multiply by `engine.gradient_scale` after summing over `engine.shard_group`.
    Raises: RuntimeError if the direction was made for other parameters or shards.
    """
    require_same_shards(engine.module, direction)
    products = []
    for (_, parameter), shard in zip(trainable_parameters(engine.module), direction.shards, strict=True):
        grad = local_grad(parameter)
        if grad is not None and shard is not None:
            products.append(torch.sum(grad * shard.to(grad.device, non_blocking=True), dtype=torch.float64))
    return _total(products, engine)


def require_same_shards(root: nn.Module, direction: Direction) -> None:
    """Raise RuntimeError if the direction was made for other parameters, or for other shards of them.

    Call it while the module is sharded.
    """
    parameters = trainable_parameters(root)
    if len(parameters) != len(direction.shards):
        raise RuntimeError(_count_mismatch([name for name, _ in parameters], len(direction.shards)))
    for (name, parameter), shard in zip(parameters, direction.shards, strict=True):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if shard is not None and shard.shape != local.shape:
            raise RuntimeError(
                f"{name}: this rank's shard has shape {tuple(local.shape)} but the direction's has "
                f"{tuple(shard.shape)}; it was made for another model or another sharding: recompute the direction "
                "(compute_direction)"
            )


def with_adam_metric(direction: Direction, engine: GradientEngine, optimizer: torch.optim.Optimizer) -> Direction:
    """Return v / (sqrt(v_hat) + eps), normalised, with Adam's bias-corrected second moments v_hat. Collective.

    Before the optimizer's first step there are no moments: the direction is returned as it is. Its `norm` stays that
    of the plain v.

    Raises: ValueError if the optimizer keeps no second moments.
    Source: GradAlign's `use_optimizer` and LESS (arXiv 2402.04333) section 3, there for the trusted side too.
    """
    if direction.is_degenerate or not optimizer.state:
        return direction
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    shards: list[Tensor | None] = []
    for (name, parameter), shard in zip(trainable_parameters(engine.module), direction.shards, strict=True):
        state = optimizer.state.get(parameter, {})
        if shard is not None and "exp_avg_sq" not in state:
            raise ValueError(
                f"gradalign.direction.metric=adam: {type(optimizer).__name__} keeps no second moments of {name}. "
                "Remedy: use an Adam optimizer, or set gradalign.direction.metric=none."
            )
        if shard is not None:
            group = groups[id(parameter)]
            moment = state["exp_avg_sq"]
            moment = (moment.to_local() if isinstance(moment, DTensor) else moment).to(shard.device)
            shard = shard / (moment / (1 - group["betas"][1] ** float(state["step"]))).sqrt().add_(group["eps"])
        shards.append(shard)
    squared_norm = _total([torch.sum(s * s, dtype=torch.float64) for s in shards if s is not None], engine)
    if engine.shard_group is not None:
        torch.distributed.all_reduce(squared_norm, group=engine.shard_group)
    norm = math.sqrt(squared_norm.item())
    return replace(direction, shards=tuple(None if s is None else s / norm for s in shards))


def on_cpu(direction: Direction) -> Direction:
    """Return the direction with its shards in CPU memory; they are brought back where they are used."""
    return replace(direction, shards=tuple(None if shard is None else shard.cpu() for shard in direction.shards))


def squared_gradient_norm(engine: GradientEngine) -> Tensor:
    """Return |.grad|^2 over this rank's shards, a float64 scalar on the parameters' device.

    Units: those of `.grad` squared; multiply by `engine.gradient_scale` squared after summing over the shard group.
    """
    grads = (local_grad(parameter) for _, parameter in trainable_parameters(engine.module))
    return _total([torch.sum(grad * grad, dtype=torch.float64) for grad in grads if grad is not None], engine)


def _total(terms: list[Tensor], engine: GradientEngine) -> Tensor:
    if terms:
        return torch.stack(terms).sum()
    # A rank may hold no shard at all; it still takes part in the reduction.
    device = next(engine.module.parameters()).device
    return torch.zeros((), dtype=torch.float64, device=device)


def _count_mismatch(names: list[str], num_shards: int) -> str:
    if len(names) > num_shards:
        culprit = f"{names[num_shards]} is trainable now but has no shard in the direction"
    else:
        culprit = f"the direction goes on after {names[-1] if names else 'nothing'}, the last trainable parameter"
    return (
        f"the direction has {num_shards} shards for {len(names)} trainable parameters: {culprit}; "
        "recompute the direction (compute_direction) after changing what is trained"
    )
