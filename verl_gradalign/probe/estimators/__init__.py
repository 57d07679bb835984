# SPDX-License-Identifier: Apache-2.0
"""Estimators of per-problem alignment, by name.

An estimator turns problems and a direction into `ProblemScores`. Add one by writing a subclass of `ScoreEstimator` and
naming it in `ESTIMATORS`.
"""

from verl_gradalign.probe.estimators.backward import BackwardEstimator
from verl_gradalign.probe.estimators.finite_difference import FiniteDifferenceEstimator
from verl_gradalign.probe.estimators.ghost import GhostEstimator
from verl_gradalign.probe.estimators.low_rank import LowRankEstimator
from verl_gradalign.probe.estimators.output_layer import OutputLayerEstimator
from verl_gradalign.probe.estimators.score_estimator import ScoreEstimator

ESTIMATORS: dict[str, type[ScoreEstimator]] = {
    "ghost": GhostEstimator,
    "backward": BackwardEstimator,
    "finite_difference": FiniteDifferenceEstimator,
    "low_rank": LowRankEstimator,
    "output_layer": OutputLayerEstimator,
}
