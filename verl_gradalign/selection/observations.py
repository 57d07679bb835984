# SPDX-License-Identifier: Apache-2.0
"""What a step's measurements tell a forecast: each problem's score, and how well it is known.

    forecaster.observe(step, observations(candidates, measurements, score_of("dot"), config.score_options))

Shape legend: P problems of a step, L live ones.
"""

from __future__ import annotations

import numpy as np

from verl_gradalign.config import ScoreOptions
from verl_gradalign.selection.candidates import Candidates
from verl_gradalign.selection.reliability import score_errors
from verl_gradalign.selection.scores import Score
from verl_gradalign.types import Measurements, Observations


def observations(candidates: Candidates, m: Measurements | None, score: Score, options: ScoreOptions) -> Observations:
    """Return the scores of all candidates, with standard errors.

    A dead group's score is 0: nothing is to be learnt from it now, which is worth knowing. A failed group's, and one
    that is not finite, are nan.

    Args:
        m: of the live candidates, in their order; None: nothing was measured, as in a step without a direction.
    """
    value_P = np.where(candidates.is_live_P | candidates.is_failed_P, np.nan, 0.0)
    error_P = np.full(len(candidates), np.nan)
    if m is not None and score.rank is not None:
        value_L = score.rank(m, options).double().numpy()
        is_finite_L = np.isfinite(value_L)
        value_P[candidates.is_live_P] = np.where(is_finite_L, value_L, np.nan)
        error_P[candidates.is_live_P] = np.where(is_finite_L, score_errors(m, score, options).numpy(), np.nan)
    return Observations(candidates.problem_id_P, value_P, error_P, candidates.response_tokens_P)
