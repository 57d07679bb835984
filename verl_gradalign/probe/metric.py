# SPDX-License-Identifier: Apache-2.0
"""The direction seen through a diagonal metric: divided, coordinate by coordinate, by how large gradients are there.

Every estimator works on the result unchanged; norms of problems stay plain.

    direction = with_adam_metric(direction, engine, optimizer)
    direction = with_candidates_metric(direction, engine, candidates[:32])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from verl_gradalign.probe.direction import Direction, Shards, combined, inner, mapped, summed_gradient
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.fsdp import local_part, trainable_placements
from verl_gradalign.probe.gradient import trainable_parameters
from verl_gradalign.types import ProblemRows

__all__ = ["with_adam_metric", "with_candidates_metric"]

FLOOR = 0.1
"""with_candidates_metric: what is added to each coordinate's root mean square, as a share of their mean."""


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
    divisors: list[torch.Tensor | None] = []
    for (name, parameter), shard in zip(trainable_parameters(engine.module), direction.shards, strict=True):
        state = optimizer.state.get(parameter, {})
        if shard is not None and "exp_avg_sq" not in state:
            raise ValueError(
                f"gradalign.direction.metric=adam: {type(optimizer).__name__} keeps no second moments of {name}. "
                "Remedy: use an Adam optimizer, or set gradalign.direction.metric=none."
            )
        divisor = None
        if shard is not None:
            group = groups[id(parameter)]
            moment = local_part(state["exp_avg_sq"]).to(shard.device)
            divisor = (moment / (1 - group["betas"][1] ** float(state["step"]))).sqrt().add_(group["eps"])
        divisors.append(divisor)
    return _divided(direction, engine, tuple(divisors))


def with_candidates_metric(direction: Direction, engine: GradientEngine, problems: Sequence[ProblemRows]) -> Direction:
    """Return v / (rms + a tenth of its mean), normalised, with rms over the problems' gradients. Collective.

    One backward pass for each problem. Without problems, or if their gradients are zero or not finite, the direction
    is returned as it is. Its `norm` stays that of the plain v.
    """
    if direction.is_degenerate or not problems:
        return direction
    total: Shards | None = None
    for problem in problems:
        square = mapped(torch.square, summed_gradient(engine, [problem]))
        total = square if total is None else combined([(1.0, total), (1.0, square)])
    assert total is not None
    rms = mapped(lambda shard: (shard / len(problems)).sqrt(), total)
    whole = {placement.identity: placement.shape.numel() for placement in trainable_placements(engine.module)}
    mean = inner(engine, rms, mapped(torch.ones_like, rms)) / sum(whole.values())
    if not (math.isfinite(mean) and mean > 0):
        return direction
    return _divided(direction, engine, mapped(lambda shard: shard + FLOOR * mean, rms))


def _divided(direction: Direction, engine: GradientEngine, divisors: Shards) -> Direction:
    shards = tuple(
        None if shard is None else shard if divisor is None else shard / divisor.to(shard.device)
        for shard, divisor in zip(direction.shards, divisors, strict=True)
    )
    norm = math.sqrt(inner(engine, shards, shards))
    return replace(direction, shards=mapped(lambda shard: shard / norm, shards))
