# SPDX-License-Identifier: Apache-2.0
"""The features of verl's problems, made when a shortlist needs them, and kept: what `forecast.features` names.

    features = ProblemFeatures(config, pool, PromptStates(tokens, workers, budget))
    forecaster.pick(step, shortlist, features.of(shortlist, step), num)

Shape legend: S problems of a shortlist, F features, D numbers measured of a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.data.identity import problem_identity
from verl_gradalign.integration.prompts import PromptTable
from verl_gradalign.selection.features import WIDE, Features, Sources, hashed_ngrams
from verl_gradalign.selection.own_features import OwnFeatures
from verl_gradalign.selection.projection import Measure, Projected

TRIED = 3
"""Problems that a user's function is tried on before the run."""

States = Callable[[Sequence[Any]], np.ndarray]


class ProblemFeatures:
    """The constant, then `source`, `prompt`, `text` and the user's functions, as far as forecast.features names them.

    Args:
        config: the `gradalign` block.
        pool: the problems of the train files.
        states: gives the policy's hidden states of chats, (chats, D). Needed by `prompt` alone.

    Raises: ValueError for an unknown column, or a function that cannot be loaded or gives no numbers.
    """

    def __init__(self, config: GradAlignConfig, pool: PromptTable, states: States | None = None) -> None:
        self._pool, own = pool, config.forecast
        columns = ("data_source", *config.log.columns) if "source" in own.features else ()
        pool.read_labels(columns[1:])
        self._sources = Sources(pool.problem_ids, {column: pool.values(column) for column in columns})
        self._projected: dict[str, Projected] = {}

        def add(name: str, measure: Measure, interval: int | None = None, is_standardised: bool = True) -> None:
            self._projected[name] = Projected(
                name, measure, pool.problem_ids, own.num_features, config.seed, interval, is_standardised
            )

        if "prompt" in own.features:
            assert states is not None, "prompt asks the policy"
            # The largest of a model's hidden numbers are so in all prompts: each counts by what differs.
            add("prompt", lambda ids: states(self._chats(ids)), own.feature_interval)
        if "text" in own.features:
            # What stands in one text of a hundred would count as much as what tells half of them apart.
            add("text", lambda ids: hashed_ngrams(list(map(_text, self._chats(ids)))), is_standardised=False)
        for name in own.features:
            if ":" in name:
                add(name, self._own(OwnFeatures(name)))

    def _chats(self, problem_ids: np.ndarray) -> list[Any]:
        return [self._pool.row(problem_id)["raw_prompt"] for problem_id in problem_ids.tolist()]

    def _own(self, function: OwnFeatures) -> Measure:
        function.try_out(
            {problem_id: self._pool.row(problem_id) for problem_id in self._pool.problem_ids[:TRIED].tolist()}
        )
        return lambda ids: np.stack([function.of(i, self._pool.row(i)) for i in ids.tolist()])

    def of(self, problem_ids: np.ndarray, step: int) -> Features:
        """Return the problems' features: the same numbers in every step, as far as the policy is not asked anew.

        Raises: ValueError, naming the problem, if a number cannot be had.
        """
        one_hot_SF = self._sources.of(problem_ids)
        projected = [each.of(problem_ids, step) for each in self._projected.values()]
        wide_F = np.full(1 + one_hot_SF.shape[1], WIDE)
        return Features(
            values_SF=np.hstack([np.ones((len(problem_ids), 1)), one_hot_SF, *projected]),
            # After the numbers: how many there are is known when they have been made once.
            prior_F=np.concatenate([wide_F, *(each.prior_K for each in self._projected.values())]),
        )

    def state(self) -> dict[str, Any]:
        """Return the projections and what is kept of each problem, for the checkpoint."""
        return {name: each.state() for name, each in self._projected.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint: a resumed run has the same numbers."""
        for name, each in self._projected.items():
            each.restore(state[name])


def _text(chat: Any) -> str:
    """Return what a chat says: case, width and white space made equal, without pictures."""
    return problem_identity(chat).partition("\n")[0]
