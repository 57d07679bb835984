# SPDX-License-Identifier: Apache-2.0
"""The reference estimator: one ordinary backward pass for each problem, on all ranks together.

Exact on whatever the engine can train, at the compute of an update over the same tokens plus one round of parameter
communication for each problem (two for one whose halves are distinguished). It cannot distinguish responses.

    scores = BackwardEstimator().score(engine, candidates, direction)

Shape legend: P problems.
"""

from collections.abc import Sequence

import torch

from verl_gradalign.probe.direction import Direction, Shards, local_inner, require_same_shards, take_gradient
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.score_estimator import ScoreEstimator
from verl_gradalign.probe.gradient import require_no_gradients
from verl_gradalign.probe.passes import problem_scores
from verl_gradalign.probe.ranks import summed
from verl_gradalign.types import ProblemRows, ProblemScores


class BackwardEstimator(ScoreEstimator):
    """Per-problem `engine.backward`, then the dot product and the norm of the gradient shards; works on every model."""

    is_exact = True
    gives_norm = True
    gives_response_derivative = False
    needs_whole_problems = False

    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return the scores of `problems` along `direction`. Collective: every rank calls it, problems in one order.

        The gradients are None afterwards. A degenerate direction gives dot products of zero and the true norms.

        Units: dot products and norms are of the gradient of sum_t c_t log pi(y_t), gradient scale removed. A gradient
            that overflowed gives nan or inf for its problem only.
        Raises: RuntimeError if gradients are present on entry, or if the direction does not fit the module.
        """
        require_no_gradients(engine.module)
        require_same_shards(engine.module, direction)
        device = engine.device
        sum_P3 = torch.zeros(len(problems), 3, dtype=torch.float64, device=device)
        for index, problem in enumerate(problems):
            whole: Shards | None = None
            for column, part in enumerate([problem.half(0), problem.half(1)] if problem.is_split else [problem]):
                engine.backward([part])
                gradient = take_gradient(engine.module)
                sum_P3[index, column] = local_inner(gradient, direction.shards, device)
                # The norm is that of both halves together, so the first one's gradient waits for the second's.
                whole = gradient if whole is None else _added(whole, gradient)
            assert whole is not None
            sum_P3[index, 2] = local_inner(whole, whole, device)
        # Once for all problems: a reduction for each would make all ranks wait for each other as often.
        sum_P3, scale = summed(sum_P3, engine.shard_group).cpu(), engine.gradient_scale
        return problem_scores(problems, sum_P3[:, :2] * scale, sum_P3[:, 2].sqrt() * scale, None, direction.norm)


def _added(total: Shards, other: Shards) -> Shards:
    """Return the sum, in `total`'s tensors where both have one: a third gradient of the model's size would not fit."""
    return tuple(b if a is None else a if b is None else a.add_(b) for a, b in zip(total, other, strict=True))
