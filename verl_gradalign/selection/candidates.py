# SPDX-License-Identifier: Apache-2.0
"""All candidates of a step as one table: what was rolled out, measured and ranked. The choice and the log read it.

Shape legend: P candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from verl_gradalign.selection.groups import Group
from verl_gradalign.types import Measurements

MEASURED = ("dot_P", "norm_P", "dot_error_P", "error_freedom_P")


@dataclass(frozen=True)
class Candidates:
    """One entry per candidate and column; float64 columns are nan where nothing is known."""

    problem_id_P: np.ndarray
    """Row in the train files, int64: ties are broken by it, never by the order of arrival."""
    data_source_P: Sequence[str]
    is_failed_P: np.ndarray
    """At least one of its responses could not be generated, or has no reward to learn from."""
    failure_P: Sequence[str]
    """Why it failed, if it did (`selection.groups`)."""
    is_live_P: np.ndarray
    """At least one of its responses has a non-zero advantage."""
    success_rate_P: np.ndarray
    num_responses_P: np.ndarray
    """int64."""
    response_tokens_P: np.ndarray
    """Mean length of its responses."""
    dot_P: np.ndarray
    """<g, v / |v|>."""
    norm_P: np.ndarray
    """|g|."""
    dot_error_P: np.ndarray
    """Standard error of dot."""
    error_freedom_P: np.ndarray
    """Degrees of freedom that the error is estimated with."""
    score_P: np.ndarray
    """What it is ranked by; nan for a dead or failed group, and in a step without a direction."""

    def __len__(self) -> int:
        return len(self.problem_id_P)

    def of_live(self, **values_L: Any) -> Candidates:
        """Return the table with columns filled in from values of the live candidates, in their order."""
        columns: dict[str, Any] = {name: np.full(len(self), np.nan) for name in values_L}
        for name, column_P in columns.items():
            column_P[self.is_live_P] = values_L[name]
        return replace(self, **columns)

    def measured(self, m: Measurements) -> Candidates:
        """Return the table with what was measured of the live candidates."""
        return self.of_live(**{name: getattr(m, name) for name in MEASURED})

    def failing(self, which_P: np.ndarray, failure: str) -> Candidates:
        """Return the table in which these candidates, too, have failed, for this reason."""
        failures = [failure if fails else known for fails, known in zip(which_P, self.failure_P, strict=True)]
        return replace(self, is_failed_P=self.is_failed_P | which_P, failure_P=failures)


def tabulate(groups: Sequence[Group], success_threshold: float) -> Candidates:
    """Return the candidates' table, in the groups' order, without anything measured yet."""
    num_P = np.array([len(g.rewards) for g in groups], dtype=np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 where nothing was generated
        tokens_P = np.array([g.num_response_tokens if g.rewards else 0 for g in groups]) / num_P
    return Candidates(
        problem_id_P=np.array([g.problem.problem_id for g in groups], dtype=np.int64),
        data_source_P=[g.problem.data_source for g in groups],
        is_failed_P=np.array([g.is_failed for g in groups], dtype=bool),
        failure_P=[g.failure for g in groups],
        is_live_P=np.array([g.is_live for g in groups], dtype=bool),
        success_rate_P=np.array([g.success_rate(success_threshold) for g in groups], dtype=np.float64),
        num_responses_P=num_P,
        response_tokens_P=tokens_P,
        **dict.fromkeys((*MEASURED, "score_P"), np.full(len(groups), np.nan)),
    )
