# SPDX-License-Identifier: Apache-2.0
"""The exact estimator that any engine can run: one ordinary backward pass per problem."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verl_gradalign.probe.direction import Direction, all_reduce_sum
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.gradient import drop_gradients
from verl_gradalign.types import ProblemRows, ProblemScores


class BackwardEstimator:
    """Each problem's gradient by a backward pass over all ranks, reduced to two numbers and dropped.

    The compute of an update over the same tokens, plus the gathers and the reduce-scatter of the whole model for
    every problem: fine for long problems on one node, slow for short ones across nodes.
    """

    is_exact = True
    gives_norm = True
    gives_response_derivative = False

    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return dot and norm of every problem. Collective.

        Units: gradients of the problem's own loss (`objective.token_coefficients`), whatever the number of ranks.
        Raises: RuntimeError if the direction belongs to another model or sharding.
        """
        totals_P2 = torch.zeros(len(problems), 2, dtype=torch.float64)
        for i, problem in enumerate(problems):
            drop_gradients(engine.module)
            engine.backward([problem])
            direction.check_fits(engine.module)
            totals_P2[i] = direction.dot_and_square(engine.module)
        drop_gradients(engine.module)
        totals_P2 = all_reduce_sum(totals_P2, engine)
        return ProblemScores(
            uid=tuple(problem.uid for problem in problems),
            dot_P=totals_P2[:, 0] * engine.gradient_scale,
            norm_P=totals_P2[:, 1].sqrt() * engine.gradient_scale,
            num_tokens_P=torch.tensor([problem.num_tokens for problem in problems], dtype=torch.int64),
            response_derivative_PR=None,
            direction_norm=direction.norm,
        )
