# SPDX-License-Identifier: Apache-2.0
"""Tables of candidates of which only what decides the choice is given."""

import numpy as np

from verl_gradalign.selection.candidates import Candidates
from verl_gradalign.selection.groups import FAILED


def candidates_of(problem_id_P, is_failed_P, is_live_P, score_P) -> Candidates:
    unknown_P = np.full(len(problem_id_P), np.nan)
    return Candidates(
        problem_id_P=np.asarray(problem_id_P, dtype=np.int64),
        data_source_P=["tasks"] * len(unknown_P),
        is_failed_P=np.asarray(is_failed_P, dtype=bool),
        failure_P=[FAILED] * len(unknown_P),
        is_live_P=np.asarray(is_live_P, dtype=bool),
        success_rate_P=np.full(len(unknown_P), 0.5),
        num_responses_P=np.full(len(unknown_P), 2),
        response_tokens_P=unknown_P,
        dot_P=unknown_P,
        norm_P=unknown_P,
        dot_error_P=unknown_P,
        error_freedom_P=unknown_P,
        score_P=np.asarray(score_P, dtype=np.float64),
    )
