# SPDX-License-Identifier: Apache-2.0
"""Texts of the problems of an offline scoring that a person would want to see, from its stored rollouts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from verl_gradalign.config import LogConfig
from verl_gradalign.integration.scoring_store import ScoringStore
from verl_gradalign.integration.texts import choose_samples
from verl_gradalign.report.selection_log import SAMPLES

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
        answer = str((row.get("reward_model") or {}).get("ground_truth", ""))
        ranked = sorted(responses[problem_id], key=lambda pair: -pair[0])
        for reward, token_ids in ranked[:1] if ranked[0][0] == ranked[-1][0] else (ranked[0], ranked[-1]):
            texts = (_text(row[prompt_key]), answer, decode(token_ids))
            values = (step, problem_id, *(text[: config.sample_chars] for text in texts), reward, len(token_ids))
            for name, value in zip(samples, values, strict=True):
                samples[name].append(value)
    return samples


def _responses(store: ScoringStore, problem_ids: set[int]) -> dict[int, list[tuple[float, list[int]]]]:
    """Return reward and token ids of each of the problems' responses: those of a session's last output."""
    last: dict[tuple[int, int], tuple[int, float, list[int]]] = {}
    for path in store.rollout_files():
        for row in store.read_rollouts(path.name, trusted=False):
            key = row["problem_id"], row["session"]
            if key[0] in problem_ids and (key not in last or last[key][0] < row["output"]):
                last[key] = row["output"], sum(row["rewards"]), row["response"]
    found: dict[int, list[tuple[float, list[int]]]] = defaultdict(list)
    for (problem_id, _), (_, reward, token_ids) in last.items():
        found[problem_id].append((reward, token_ids))
    return found


def _text(prompt: Any) -> str:
    """Return all messages of a prompt."""
    return prompt if isinstance(prompt, str) else "\n\n".join(str(message.get("content")) for message in prompt)
