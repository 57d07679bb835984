# SPDX-License-Identifier: Apache-2.0
"""The reference estimator: one ordinary backward pass for each problem, on all ranks together.

Exact on whatever the engine can train, at the compute of an update over the same tokens plus one round of parameter
communication for each problem (two for one whose halves are distinguished). It cannot distinguish responses.

    scores = BackwardEstimator().score(engine, candidates, direction)

Shape legend: P problems.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from torch import nn

from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import Direction, Shards, dot_with_gradient, squared_gradient_norm, take_gradient
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.gradient import clear_gradients, require_no_gradients
from verl_gradalign.types import ProblemRows, ProblemScores


class BackwardEstimator:
    """Per-problem `engine.backward`, then the dot product and the norm of the gradient shards."""

    is_exact = True
    gives_norm = True
    gives_response_derivative = False
    needs_whole_problems = False

    def __init__(self, config: ProbeConfig | None = None) -> None:
        pass

    def check(self, module: nn.Module) -> None:
        """Whatever the engine can train, this can score."""

    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return the scores of `problems` along `direction`. Collective: every rank calls it, problems in one order.

        The gradients are None afterwards. A degenerate direction gives dot products of zero and the true norms.

        Units: dot products and norms are of the gradient of sum_t c_t log pi(y_t), gradient scale removed. A gradient
            that overflowed gives nan or inf for its problem only.
        Raises: RuntimeError if gradients are present on entry, or if the direction does not fit the module.
        """
        require_no_gradients(engine.module)
        device = next(engine.module.parameters()).device
        sum_P3 = torch.zeros(len(problems), 3, dtype=torch.float64, device=device)
        for index, problem in enumerate(problems):
            first: Shards | None = None
            if problem.is_split:
                engine.backward([problem.half(0)])
                sum_P3[index, 0] = dot_with_gradient(engine, direction)
                # The norm is that of both halves together, so the first one's gradient waits for the second's.
                first = take_gradient(engine.module)
                problem = problem.half(1)
            engine.backward([problem])
            sum_P3[index, 1] = dot_with_gradient(engine, direction)
            sum_P3[index, 2] = squared_gradient_norm(engine, first)
            clear_gradients(engine.module)
        # Once for all problems: a reduction for each would make all ranks wait for each other as often.
        if engine.shard_group is not None:
            torch.distributed.all_reduce(sum_P3, group=engine.shard_group)
        sum_P3 = sum_P3.cpu()
        half_dot_P2 = sum_P3[:, :2] * engine.gradient_scale
        is_split_P = torch.tensor([problem.is_split for problem in problems], dtype=torch.bool)
        return ProblemScores(
            uid=tuple(problem.uid for problem in problems),
            dot_P=half_dot_P2.sum(dim=1),
            norm_P=sum_P3[:, 2].sqrt() * engine.gradient_scale,
            num_tokens_P=torch.tensor([problem.num_tokens for problem in problems], dtype=torch.int64),
            response_derivative_PR=None,
            direction_norm=direction.norm,
            half_dot_P2=half_dot_P2.masked_fill(~is_split_P.unsqueeze(1), torch.nan),
        )
