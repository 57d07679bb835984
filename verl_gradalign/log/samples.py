# SPDX-License-Identifier: Apache-2.0
"""Texts of the problems that a person would want to see: prompt, answer, a best and a worst response.

Shape legend: P candidates.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from verl_gradalign.log.selection_log import SAMPLES
from verl_gradalign.selection.groups import Group

ReadResponses = Callable[[list[str]], Sequence[Any]]
"""Gives the token ids of some keys, while the step's rows are still there."""


class Problems(Protocol):
    """What is known of the train files' problems; `prompts.PromptTable`."""

    def text(self, problem_id: int) -> tuple[str, str]:
        """Return a problem's prompt and the ground truth of its reward."""

    def values(self, column: str) -> Sequence[str]:
        """Return every problem's data_source, or value of a key of extra_info, as text."""

    def read_labels(self, columns: Sequence[str]) -> None:
        """Read the keys of extra_info that `label` is asked for."""

    def label(self, column: str, problem_id: int) -> str:
        """Return a value of the problem's extra_info as text."""


def choose_samples(
    wanted: int, score_P: np.ndarray, dot_P: np.ndarray, norm_P: np.ndarray, error_P: np.ndarray
) -> list[int]:
    """Return the positions of at most `wanted` candidates: three quarters those whose alignment is least to be trusted
    (lowest dot in standard errors, else lowest score), the others in turn the best scored and the most uncertain."""
    known = np.flatnonzero(np.isfinite(score_P))
    if wanted == 0 or not len(known):
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        evidence_P, doubt_P = dot_P / error_P, error_P / norm_P
    evidence_P = np.where(np.isfinite(evidence_P), evidence_P, score_P)
    suspects = known[np.argsort(evidence_P[known], kind="stable")]
    best = known[np.argsort(-score_P[known], kind="stable")]
    doubtful = known[np.argsort(-np.nan_to_num(doubt_P[known]), kind="stable")]
    num_suspects = wanted - wanted // 4
    others = [place for pair in zip(best, doubtful, strict=True) for place in pair]
    ordered = [*suspects[:num_suspects], *others[: wanted - num_suspects], *suspects[num_suspects:]]
    return [int(place) for place in dict.fromkeys(ordered)][:wanted]


def sample_columns(
    step: int,
    groups: Sequence[Group],
    chosen: Sequence[int],
    read_responses: ReadResponses,
    text: Callable[[int], tuple[str, str]],
    decode: Callable[[Any], str],
    max_chars: int,
) -> dict[str, list[Any]]:
    """Return the selection log's `samples` of a step: of each chosen group its best and its worst response.

    `text`: see `Problems.text`.
    """
    shown = [(groups[place], index) for place in chosen for index in best_and_worst(groups[place].rewards)]
    # A session's last output is the one that its reward is of.
    keys = [list({key.rsplit("_", 1)[0]: key for key in group.keys}.values())[index] for group, index in shown]
    rows = []
    for (group, index), response in zip(shown, read_responses(keys) if keys else [], strict=True):
        problem_id = group.problem.problem_id
        texts = [part[:max_chars] for part in (*text(problem_id), decode(response))]
        rows.append((step, problem_id, *texts, group.rewards[index], len(response)))
    return {name: [row[place] for row in rows] for place, name in enumerate(SAMPLES.names)}


def best_and_worst(rewards: Sequence[float]) -> list[int]:
    """Return the positions of the highest and the lowest reward; of one if all are equal, of none without any."""
    return list(dict.fromkeys((int(np.argmax(rewards)), int(np.argmin(rewards))))) if rewards else []
