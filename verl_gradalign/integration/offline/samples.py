# SPDX-License-Identifier: Apache-2.0
"""Texts of the problems of an offline scoring that a person would want to see, from its stored rollouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from verl_gradalign.config import LogConfig
from verl_gradalign.integration.offline.store import ScoringStore
from verl_gradalign.integration.prompts import ground_truth, prompt_text
from verl_gradalign.log.samples import best_and_worst, choose_samples
from verl_gradalign.log.selection_log import SAMPLES

__all__ = ["sample_texts"]


def sample_texts(
    step: int,
    columns: Mapping[str, Sequence[Any]],
    store: ScoringStore,
    pool: pa.Table,
    prompt_key: str,
    decode: Callable[[list[int]], str],
    config: LogConfig,
) -> dict[str, list[Any]]:
    """Return the selection log's `samples`: of some problems, chosen as in training, the best and the worst response.

    `columns` are the selection log's.
    """
    known = (np.asarray(columns[name], dtype=np.float64) for name in ("score", "dot", "norm", "dot_error"))
    chosen = [int(columns["problem_id"][place]) for place in choose_samples(config.sample_problems, *known)]
    responses = _responses(store, set(chosen))
    samples: dict[str, list[Any]] = {name: [] for name in SAMPLES.names}
    for problem_id in chosen:
        row = pool.slice(problem_id, 1).to_pylist()[0]
        for index in best_and_worst([reward for reward, _ in responses[problem_id]]):
            reward, token_ids = responses[problem_id][index]
            texts = (prompt_text(row[prompt_key]), ground_truth(row), decode(token_ids))
            values = (step, problem_id, *(text[: config.sample_chars] for text in texts), reward, len(token_ids))
            for name, value in zip(samples, values, strict=True):
                samples[name].append(value)
    return samples


def _responses(store: ScoringStore, problem_ids: set[int]) -> dict[int, list[tuple[float, list[int]]]]:
    """Return reward and token ids of each of the problems' responses: those of a session's last output."""
    last: dict[tuple[int, int], tuple[int, float, list[int]]] = {}
    for path in store.rollout_files():
        for row in store.read_rollouts(path.name, trusted=False, problem_ids=problem_ids):
            key = row["problem_id"], row["session"]
            if key not in last or last[key][0] < row["output"]:
                last[key] = row["output"], sum(row["rewards"]), row["response"]
    found: dict[int, list[tuple[float, list[int]]]] = defaultdict(list)
    for (problem_id, _), (_, reward, token_ids) in last.items():
        found[problem_id].append((reward, token_ids))
    return found
