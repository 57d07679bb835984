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
from verl_gradalign.integration.offline.store import OF_POOL, Measured, ScoringStore, joined_scores, keys_of
from verl_gradalign.integration.offline.task import ScoringTask, num_kept
from verl_gradalign.integration.prompts import UNKNOWN_SOURCE, ground_truth, prompt_text
from verl_gradalign.integration.run_identity import about_run
from verl_gradalign.log.columns import log_columns, selection_metrics
from verl_gradalign.log.parts import replace_table
from verl_gradalign.log.samples import choose_samples, sample_columns
from verl_gradalign.log.selection_log import METADATA_KEY, SCHEMA, SelectionLog
from verl_gradalign.metrics import named
from verl_gradalign.selection.chooser import Chooser
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.versions import installed_versions

STEP = 1
"""Of the selection log: there is one choice."""

LEFT_OUT = "left_out"
"""Reason of a problem that verl's data set does not hold: its prompt is too long, or data.train_max_samples is set."""

COLUMNS = "problem_id data_source score dot norm cosine dot_error success_rate num_responses kept reason".split()
SCORES = pa.schema([SCHEMA.field(name) if name in SCHEMA.names else (name, pa.float64()) for name in COLUMNS])
"""As in the selection log, problems known by their row in the pool's files. `reason` may be LEFT_OUT too."""


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
    counts = [("kept", "count"), ("kept", "sum"), ("success_rate", "mean")]
    by_source = scores.group_by("data_source", use_threads=False).aggregate(counts)
    sources = by_source["data_source"].to_pylist()
    by_source = by_source.select(["kept_count", "kept_sum", "success_rate_mean"])
    counts_of_each = by_source.rename_columns(["problems", "kept", "success_rate"]).to_pylist()
    seconds = {name: sum(m.metrics.get(f"seconds/{name}", 0.0) for m in measured) for name in ("direction", "scores")}
    summary = {
        "score": task.score,
        "keep": task.keep,
        "problems": len(scores),
        "scored": len(scores) - scores["score"].null_count,
        "kept": pc.sum(scores["kept"]).as_py(),
        "by_reason": dict(Counter(scores["reason"].to_pylist())),
        "by_source": dict(zip(sources, counts_of_each, strict=True)),
        "metrics": metrics,
        "seconds": {"rollouts": store.rollout_seconds(), **seconds},
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
    groups += [Group(p, (), 0, (), is_failed=True, is_live=False) for p in failed if p.trusted_set is None]
    chooser = Chooser(config, num_rows)
    for part in measured:
        if not math.isnan(cosine := part.metrics.get("reliability/direction_cosine", math.nan)):
            chooser.note_direction(cosine)
    choice = chooser.choose(groups, joined_scores(measured), num_kept(keep, len(groups)), STEP)
    of_direction: Mapping[str, float] = next((p.metrics for p in measured if "direction/norm" in p.metrics), {})
    metrics = {
        **{k: v for k, v in of_direction.items() if not k.startswith(("seconds/", "probe/"))},
        **choice.metrics,
        **selection_metrics(choice.candidates, choice.selection),
    }
    columns = log_columns(STEP, choice.candidates, choice.selection)
    order = np.argsort(columns["problem_id"], kind="stable")
    ordered = {name: np.asarray(values)[order] for name, values in columns.items()}
    return [groups[i] for i in order], ordered, named(metrics)


def scores_table(columns: Mapping[str, Any], pool: pa.Table) -> pa.Table:
    """Return a row for every problem of the pool: its columns, or only why there are none."""
    place_P = np.full(len(pool), -1)
    place_P[columns["problem_id"]] = np.arange(len(columns["problem_id"]))
    known = [field for field in SCORES if field.name in columns]
    arrays = {field.name: pa.array(columns[field.name], field.type, from_pandas=True) for field in known}
    rows = pa.table(arrays).take(pa.array(place_P, mask=place_P < 0))
    sources = pool["data_source"].to_pylist() if "data_source" in pool.column_names else [UNKNOWN_SOURCE] * len(pool)
    ratio = pc.divide(rows["dot"], rows["norm"])
    return pa.table(
        {
            **{name: rows[name] for name in arrays},
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
    """Return the selection log's `samples`: the best and the worst response of problems chosen as in training."""
    model, prompt_key = verl_config.actor_rollout_ref.model, verl_config.data.get("prompt_key", "prompt")
    tokenizer = hf_tokenizer(model.get("tokenizer_path") or model.path, trust_remote_code=model.trust_remote_code)
    known = (columns[name] for name in ("score", "dot", "norm", "dot_error"))
    chosen = choose_samples(config.log.sample_problems, *known)

    def read_responses(keys: list[str]) -> list[Any]:
        is_chosen = pc.field("problem_id").isin([groups[place].problem.problem_id for place in chosen])
        rows = store.rollouts(OF_POOL & is_chosen)
        of_key = dict(zip(keys_of(rows), rows["response"].to_pylist(), strict=True))
        return [of_key[key] for key in keys]

    def texts(problem_id: int) -> tuple[str, str]:
        row = pool.slice(problem_id, 1).to_pylist()[0]
        return prompt_text(row[prompt_key]), ground_truth(row)

    def decode(token_ids: Any) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return sample_columns(STEP, groups, chosen, read_responses, texts, decode, config.log.sample_chars)
