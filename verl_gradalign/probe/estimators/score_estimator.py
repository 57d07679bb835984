# SPDX-License-Identifier: Apache-2.0
"""What every estimator has: flags that say what it gives, a check of the model, and the scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import nn

from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.types import ProblemRows, ProblemScores


class ScoreEstimator(ABC):
    """Base of the estimators. The configuration's defaults are taken where none is given."""

    is_exact = False
    """True if the scores differ from autograd's by floating-point rounding only."""
    gives_norm = False
    """True if `ProblemScores.norm_P` is given (cosine needs it)."""
    gives_response_derivative = True
    """True if `ProblemScores.response_derivative_PR` is given."""
    needs_whole_problems = True
    """True if all rows of a problem must lie on one rank."""

    def __init__(self, config: ProbeConfig | None = None) -> None:
        self._config = config or ProbeConfig()

    def check(self, module: nn.Module) -> None:  # noqa: B027  (most models need no check)
        """Raise ValueError, naming the layers and the remedy, if it cannot work on this model."""

    @abstractmethod
    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return the scores of `problems` along `direction`. Collective: every rank calls it, problems in one order."""
