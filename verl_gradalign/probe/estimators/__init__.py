# SPDX-License-Identifier: Apache-2.0
"""Estimators of per-problem alignment, by name.

An estimator turns problems and a direction into `ProblemScores`. Add one by writing a class that satisfies
`ScoreEstimator` and naming it in `ESTIMATORS`.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.backward import BackwardEstimator
from verl_gradalign.probe.estimators.finite_difference import FiniteDifferenceEstimator
from verl_gradalign.probe.estimators.ghost import GhostEstimator
from verl_gradalign.probe.estimators.low_rank import LowRankEstimator
from verl_gradalign.probe.estimators.output_layer import OutputLayerEstimator
from verl_gradalign.types import ProblemRows, ProblemScores


class ScoreEstimator(Protocol):
    """The interface of estimators."""

    is_exact: bool
    """True if the scores differ from autograd's by floating-point rounding only."""
    gives_norm: bool
    """True if `ProblemScores.norm_P` is given (cosine needs it)."""
    gives_response_derivative: bool
    """True if `ProblemScores.response_derivative_PR` is given."""
    needs_whole_problems: bool
    """True if all rows of a problem must lie on one rank, within the engine's budget."""

    def __init__(self, config: ProbeConfig | None = None) -> None: ...

    def check(self, module: nn.Module) -> None:
        """Raise ValueError, naming the layers and the remedy, if it cannot work on this model."""

    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return the scores of `problems` along `direction`. Collective: every rank calls it, problems in one order."""


ESTIMATORS: dict[str, type[ScoreEstimator]] = {
    "ghost": GhostEstimator,
    "backward": BackwardEstimator,
    "finite_difference": FiniteDifferenceEstimator,
    "low_rank": LowRankEstimator,
    "output_layer": OutputLayerEstimator,
}
