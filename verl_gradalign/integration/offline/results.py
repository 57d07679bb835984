# SPDX-License-Identifier: Apache-2.0
"""From everything that was measured to what is kept: the files that an offline scoring leaves.

scores.parquet: a row for every problem of the pool; selected.parquet: the kept rows of the pool's files as they are;
summary.json; and the selection log in gradalign/, which `verl-gradalign report` reads. The choice is the one that a
step of training would make among the whole pool.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from omegaconf import DictConfig
from verl.utils import hf_tokenizer

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.files import replace_file, without_nan
from verl_gradalign.integration.offline.store import OF_POOL, Measured, ScoringStore, joined_scores, uid_of
from verl_gradalign.integration.offline.task import ScoringTask, num_kept
from verl_gradalign.integration.prompts import UNKNOWN_SOURCE, ground_truth, prompt_text
from verl_gradalign.integration.run_identity import about_run
from verl_gradalign.log.columns import log_columns, selection_metrics
from verl_gradalign.log.parts import replace_table
from verl_gradalign.log.samples import choose_samples, sample_columns
from verl_gradalign.log.selection_log import METADATA_KEY, SelectionLog
from verl_gradalign.metrics import named
from verl_gradalign.selection.chooser import Chooser
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.versions import installed_versions

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
    groups, columns, metrics = choose(config, measured, store.failed() or [], task.keep, len(pool))
    about = about_run(verl_config)
    log = SelectionLog(output / "gradalign", about=about)
    samples = _samples(groups, columns, store, pool, config, verl_config)
    if samples["step"]:
        log.write_samples(STEP, samples)
    log.write_metrics(STEP, metrics)
    log.write(STEP, columns)
    scores = scores_table(columns, pool).replace_schema_metadata({METADATA_KEY: json.dumps(about, default=str)})
    replace_table(scores, output / "scores.parquet")
    replace_table(pool.filter(scores["kept"]), output / "selected.parquet")
    aggregates = {"problems": "kept_count", "kept": "kept_sum", "success_rate": "success_rate_mean"}
    of_each = [tuple(name.rsplit("_", 1)) for name in aggregates.values()]
    by_source = scores.group_by("data_source", use_threads=False).aggregate(of_each)
    summary = {
        "score": task.score,
        "keep": task.keep,
        "problems": len(scores),
        "scored": len(scores) - scores["score"].null_count,
        "kept": pc.sum(scores["kept"]).as_py(),
        "by_reason": dict(Counter(scores["reason"].to_pylist())),
        "by_source": {
            of["data_source"]: {name: of[aggregate] for name, aggregate in aggregates.items()}
            for of in by_source.to_pylist()
        },
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
) -> tuple[list[Group], dict[str, np.ndarray], dict[str, float]]:
    """Return all candidates in the pool's order, the selection log's columns of them, and the choice's metrics."""
    groups = [group for part in measured for group in part.groups]
    nothing: dict[str, Any] = {"keys": (), "num_tokens": 0, "rewards": (), "is_failed": True, "is_live": False}
    groups += [Group(problem=problem, **nothing) for problem in failed if problem.trusted_set is None]
    scores = joined_scores(measured)
    chooser = Chooser(config, num_rows)
    for part in measured:
        if not math.isnan(part.half_cosine):
            chooser.note_direction(part.half_cosine)
    choice = chooser.choose(groups, scores, num_kept(keep, len(groups)), STEP)
    columns = log_columns(STEP, choice.candidates, choice.selection)
    of_direction: Mapping[str, float] = next((p.metrics for p in measured if "direction/norm" in p.metrics), {})
    metrics = {
        **{k: v for k, v in of_direction.items() if not k.startswith(("seconds/", "probe/"))},
        **choice.metrics,
        **selection_metrics(choice.candidates, choice.selection),
    }
    order = np.argsort(columns["problem_id"], kind="stable")
    ordered = {name: np.asarray(values)[order] for name, values in columns.items()}
    return [groups[i] for i in order], ordered, named(metrics)


def scores_table(columns: Mapping[str, Any], pool: pa.Table) -> pa.Table:
    """Return a row for every problem of the pool: its columns, or only why there are none."""
    place_P = np.full(len(pool), -1)
    place_P[columns["problem_id"]] = np.arange(len(columns["problem_id"]))
    known = {name: columns[name] for name in SCORES.names if name in columns}
    arrays = {name: pa.array(values, SCORES.field(name).type, from_pandas=True) for name, values in known.items()}
    rows = pa.table(arrays).take(pa.array(place_P, mask=place_P < 0))
    sources = pool["data_source"].to_pylist() if "data_source" in pool.column_names else [UNKNOWN_SOURCE] * len(pool)
    ratio = pc.divide(rows["dot"], rows["norm"])
    return pa.table(
        {
            **{name: rows[name] for name in rows.column_names},
            "problem_id": np.arange(len(pool)),
            "data_source": [str(source) for source in sources],
            "cosine": pc.if_else(pc.equal(rows["norm"], 0), 0.0, ratio),
            "num_responses": pc.fill_null(rows["num_responses"], 0),
            "kept": pc.fill_null(rows["kept"], False),
            "reason": pc.fill_null(rows["reason"], LEFT_OUT),
        },
        schema=SCORES,
    )


def _samples(
    groups: Sequence[Group],
    columns: Mapping[str, np.ndarray],
    store: ScoringStore,
    pool: pa.Table,
    config: GradAlignConfig,
    verl_config: DictConfig,
) -> dict[str, list[Any]]:
    """Return the selection log's `samples`: of some problems, chosen as in training, the best and the worst response.

    `columns` are the selection log's.
    """
    wanted = config.log.sample_problems
    chosen = choose_samples(wanted, columns["score"], columns["dot"], columns["norm"], columns["dot_error"])
    problem_ids = pc.field("problem_id").isin([groups[place].problem.problem_id for place in chosen])
    responses = {
        f"{uid_of(None, row['problem_id'])}_{row['session']}_{row['output']}": row["response"]
        for row in store.rollouts(OF_POOL & problem_ids).to_pylist()
    }
    model = verl_config.actor_rollout_ref.model
    tokenizer = hf_tokenizer(model.get("tokenizer_path") or model.path, trust_remote_code=model.trust_remote_code)
    prompt_key = verl_config.data.get("prompt_key", "prompt")

    def texts(problem_id: int) -> tuple[str, str]:
        row = pool.slice(problem_id, 1).to_pylist()[0]
        return prompt_text(row[prompt_key]), ground_truth(row)

    return sample_columns(
        STEP,
        groups,
        chosen,
        lambda keys: [responses[key] for key in keys],
        texts,
        lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=True)),
        config.log.sample_chars,
    )
