# SPDX-License-Identifier: Apache-2.0
"""Directional derivatives by two forward passes, at theta + eps v and theta - eps v: any engine, no gradients, no norm.

The passes are the engine's own, with its micro-batches and log-probs; here parameters are moved and sums subtracted.

d_t = (log pi_{theta + eps v}(y_t) - log pi_{theta - eps v}(y_t)) / (2 eps), with an error of order eps^2 and a noise
of the log-probs' rounding over eps.

    scores = FiniteDifferenceEstimator(ProbeConfig(relative_step=1e-3)).score(engine, candidates, direction)

Shape legend: R rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from verl_gradalign.probe.direction import Direction, require_same_shards
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.score_estimator import ScoreEstimator
from verl_gradalign.probe.fsdp import local_part, reshard
from verl_gradalign.probe.gradient import trainable_parameters
from verl_gradalign.probe.passes import ProblemSums, rows_together
from verl_gradalign.probe.ranks import summed
from verl_gradalign.types import ProblemRows, ProblemScores


class FiniteDifferenceEstimator(ScoreEstimator):
    """Central differences with a step of `relative_step` times |theta|, over the trainable parameters."""

    def check(self, module: nn.Module) -> None:
        """Raise ValueError, naming the parameter, if a trainable one is stored in half precision."""
        require_full_precision(module)

    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return the scores of `problems` along `direction`. Collective: every rank calls it, problems in one order.

        Gives every response's derivative, whatever its advantage. The parameters are restored bit for bit.

        Units: dot products are of the gradient of sum_t c_t log pi(y_t).
        Raises: RuntimeError if the direction does not fit the module; ValueError for half-precision parameters, or
            if a problem exceeds the budget.
        """
        step = self._config.relative_step * _parameter_norm(engine)
        batch = rows_together(engine, problems)
        with perturbation(engine.module, direction) as move:
            # All rows at one step, then all at the other: each move reshards the model and rewrites its parameters.
            move(step)
            above_2R = engine.row_sums(batch.rows)
            move(-step)
            below_2R = engine.row_sums(batch.rows)
        sums = ProblemSums(problems)
        sums.add_rows(batch, *(above_2R - below_2R) / (2 * step))
        return replace(sums.reduce(engine, direction.norm), norm_P=None, diagnostics={"step": step})


def _parameter_norm(engine: GradientEngine) -> float:
    """Return |theta| of the trainable parameters over all shards. Collective."""
    parameters = [parameter for _, parameter in trainable_parameters(engine.module)]
    squares = [local_part(parameter).detach().double().square().sum() for parameter in parameters]
    total = torch.stack(squares).sum().to(engine.device)
    return math.sqrt(summed(total, engine.shard_group).item())


@contextmanager
def perturbation(module: nn.Module, direction: Direction) -> Iterator[Callable[[float], None]]:
    """Yield `move(step)`, which sets the parameters to theta + step * v / |v|; restore theta bit for bit on exit.

    Holds a second copy of this rank's trainable shards.

    Raises: RuntimeError if the direction does not fit the module's shards; ValueError as `require_full_precision`.
    """
    reshard(module)
    require_same_shards(module, direction)
    require_full_precision(module)
    locals_ = [local_part(parameter).detach() for _, parameter in trainable_parameters(module)]
    # Clones: taking the step back by arithmetic would not give the same bits.
    originals = [local.clone() for local in locals_]

    def move(step: float) -> None:
        # A pass leaves the root unsharded, computing with a copy that this would not change.
        reshard(module)
        for local, original, shard in zip(locals_, originals, direction.shards, strict=True):
            if shard is not None:
                # From the original, not from where the last move ended: no rounding adds up.
                torch.add(original, shard.to(original), alpha=step, out=local)

    try:
        yield move
    finally:
        reshard(module)
        for local, original in zip(locals_, originals, strict=True):
            local.copy_(original)
        reshard(module)


def require_full_precision(module: nn.Module) -> None:
    """Raise ValueError, naming the parameter, if a trainable one is stored in half precision."""
    for name, parameter in trainable_parameters(module):
        if parameter.dtype in (torch.bfloat16, torch.float16):
            remedy = "Remedy: store parameters in float32 (actor.fsdp_config.model_dtype=fp32, of VeOmni "
            remedy += "actor.veomni.mixed_precision=true)"
            trouble = f"{name} is stored in {parameter.dtype}, where a small step is lost to rounding"
            raise ValueError(f"{trouble}. {remedy}, or set gradalign.estimator=ghost or backward")
