# SPDX-License-Identifier: Apache-2.0
"""From everything that was measured to what is kept: the files that an offline scoring leaves.

scores.parquet: a row for every problem of the pool; selected.parquet: the kept rows of the pool's files as they are;
summary.json; and the selection log in gradalign/, which `verl-gradalign report` reads. The choice is the one that a
step of training would make among the whole pool.

Shape legend: P candidates.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig
from verl.utils import hf_tokenizer

from verl_gradalign.config import GradAlignConfig, LogConfig
from verl_gradalign.files import replace_file, without_nan
from verl_gradalign.integration.offline.store import Measured, ScoringStore, joined_scores
from verl_gradalign.integration.offline.task import ScoringTask, num_kept
from verl_gradalign.integration.prompts import UNKNOWN_SOURCE, ground_truth, prompt_text
from verl_gradalign.integration.run_identity import about_run, installed_versions
from verl_gradalign.log.columns import log_columns, selection_metrics
from verl_gradalign.log.parts import replace_table
from verl_gradalign.log.samples import best_and_worst, choose_samples
from verl_gradalign.log.selection_log import METADATA_KEY, SAMPLES, SelectionLog
from verl_gradalign.metrics import named
from verl_gradalign.selection.chooser import Chooser
from verl_gradalign.selection.groups import Group, Problem

__all__ = ["SCORES", "choose", "sample_texts", "scores_table", "write_results"]

STEP = 1
"""Of the selection log: there is one choice."""

LEFT_OUT = "left_out"
"""Reason of a problem that verl's data set does not hold: its prompt is too long, or data.train_max_samples is set."""

SCORES = pa.schema(
    [
        ("problem_id", pa.int64()),  # row in the pool's files
        ("data_source", pa.string()),
        ("score", pa.float64()),  # null: not scored, for the reason given
        ("dot", pa.float64()),
        ("norm", pa.float64()),
        ("cosine", pa.float64()),
        ("dot_error", pa.float64()),
        ("success_rate", pa.float64()),
        ("num_responses", pa.int64()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),  # selection.select.REASONS, or left_out
    ]
)


def write_results(
    task: ScoringTask,
    config: GradAlignConfig,
    verl_config: DictConfig,
    measured: Sequence[Measured],
    command: Sequence[str],
) -> dict[str, Any]:
    """Write all files of a finished scoring, and return the summary."""
    store, output = ScoringStore(task.state), task.output
    pool = pa.concat_tables([pq.read_table(path) for path in task.pool])
    columns, metrics = choose(config, measured, store.failed() or [], task.keep, len(pool))
    about = about_run(verl_config)
    log = SelectionLog(output / "gradalign", about=about)
    prompt_key = verl_config.data.get("prompt_key", "prompt")
    samples = sample_texts(STEP, columns, store, pool, prompt_key, _decoder(verl_config), config.log)
    if samples["step"]:
        log.write_samples(STEP, samples)
    log.write_metrics(STEP, metrics)
    log.write(STEP, columns)
    scores = scores_table(columns, pool, {METADATA_KEY: json.dumps(about, default=str).encode()})
    replace_table(scores, output / "scores.parquet")
    replace_table(pool.filter(scores["kept"]), output / "selected.parquet")
    summary = {
        "score": task.score,
        "keep": task.keep,
        **_counts(scores),
        "metrics": metrics,
        "seconds": {
            "rollouts": store.rollout_seconds(),
            "direction": sum(m.metrics.get("seconds/direction", 0.0) for m in measured),
            "scores": sum(m.metrics.get("seconds/scores", 0.0) for m in measured),
        },
        "versions": installed_versions(),
        "command": list(command),
        "created": about["created"],
        "files": {name: str(output / name) for name in ("scores.parquet", "selected.parquet", "gradalign")},
    }
    replace_file(output / "summary.json", json.dumps(without_nan(summary), indent=1))
    return summary


def choose(
    config: GradAlignConfig, measured: Sequence[Measured], failed: Sequence[Problem], keep: float, num_rows: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the selection log's columns of all candidates, in the pool's order, and the metrics of the choice."""
    groups = [group for part in measured for group in part.groups]
    groups += [_failed_group(problem) for problem in failed if problem.trusted_set is None]
    scores = joined_scores(measured)
    chooser = Chooser(config, num_rows)
    for part in measured:
        if not math.isnan(part.half_cosine):
            chooser.note_direction(part.half_cosine)
    choice = chooser.choose(groups, scores, num_kept(keep, len(groups)), STEP)
    columns = log_columns(STEP, choice.candidates, choice.selection)
    of_direction = [part.metrics for part in measured if "direction/norm" in part.metrics][:1]
    metrics = {
        **{k: v for part in of_direction for k, v in part.items() if not k.startswith(("seconds/", "probe/"))},
        **choice.metrics,
        **selection_metrics(choice.candidates, choice.selection),
    }
    order = np.argsort(columns["problem_id"], kind="stable")
    return {name: [values[i] for i in order] for name, values in columns.items()}, named(metrics)


def _decoder(verl_config: DictConfig) -> Callable[[list[int]], str]:
    model = verl_config.actor_rollout_ref.model
    tokenizer = hf_tokenizer(model.get("tokenizer_path") or model.path, trust_remote_code=model.trust_remote_code)
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=True))


def _failed_group(problem: Problem) -> Group:
    return Group(problem=problem, keys=(), num_tokens=0, rewards=(), is_failed=True, is_live=False)


def scores_table(columns: Mapping[str, Sequence[Any]], pool: pa.Table, metadata: Mapping[bytes, bytes]) -> pa.Table:
    """Return a row for every problem of the pool: its columns, or only why there are none."""
    places = {problem_id: place for place, problem_id in enumerate(columns["problem_id"])}
    sources = pool["data_source"].to_pylist() if "data_source" in pool.column_names else [UNKNOWN_SOURCE] * len(pool)
    rows = []
    for problem_id, source in enumerate(sources):
        place = places.get(problem_id)
        row: dict[str, Any] = {"problem_id": problem_id, "data_source": str(source)}
        if place is None:
            row |= {"num_responses": 0, "kept": False, "reason": LEFT_OUT}
        else:
            row |= {name: _plain(columns[name][place]) for name in SCORES.names if name in columns}
            dot, norm = row["dot"], row["norm"]
            row["cosine"] = None if dot is None or norm is None else dot / norm if norm else 0.0
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCORES.with_metadata(dict(metadata)))


def _counts(scores: pa.Table) -> dict[str, Any]:
    """Return how many problems there are, by reason and by data source."""
    rows = scores.select(["data_source", "score", "success_rate", "kept", "reason"]).to_pylist()
    by_source: dict[str, Any] = {}
    for source in dict.fromkeys(row["data_source"] for row in rows):
        members = [row for row in rows if row["data_source"] == source]
        rates = [row["success_rate"] for row in members if row["success_rate"] is not None]
        by_source[source] = {
            "problems": len(members),
            "kept": sum(row["kept"] for row in members),
            "success_rate": float(np.mean(rates)) if rates else None,
        }
    return {
        "problems": len(rows),
        "scored": sum(row["score"] is not None for row in rows),
        "kept": sum(row["kept"] for row in rows),
        "by_reason": dict(Counter(row["reason"] for row in rows)),
        "by_source": by_source,
    }


def _plain(value: Any) -> Any:
    """Return a cell as Python's own type, nan as None."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


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
