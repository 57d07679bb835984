# SPDX-License-Identifier: Apache-2.0
"""Scores dealt out to other problems: the control that costs what a score costs, and knows nothing.

    gradalign.score=verl_gradalign.experiments.shuffled_scores:dot

The live problems of a step exchange their scores, in an order that their numbers alone decide.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import Tensor

from verl_gradalign.config import ScoreOptions
from verl_gradalign.selection.scores import SCORES, Score
from verl_gradalign.types import Measurements

Rank = Callable[[Measurements, ScoreOptions], Tensor]


def _shuffled(score: Score) -> Score:
    rank = score.rank
    assert rank is not None, "a score that ranks nothing has nothing to shuffle"

    def shuffled(m: Measurements, options: ScoreOptions) -> Tensor:
        score_P = rank(m, options)
        return score_P[np.random.default_rng(m.problem_id_P.tolist()).permutation(len(score_P))]

    return replace(score, rank=shuffled)


dot = _shuffled(SCORES["dot"])
confident_cosine = _shuffled(SCORES["confident_cosine"])
