# SPDX-License-Identifier: Apache-2.0
"""Logs of runs that never were, with known truth: what reports are tested and measured on.

Of every problem the truth is known: `clean` problems have a positive alignment, `mislabelled` ones a negative, and of
`coin flips` it is zero. What a step measures of it has the noise that its standard error says.

    truth = write_log(folder, LogPlan(num_steps=60))

Shape legend: P problems of the pool, C candidates of a step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from verl_gradalign.log.selection_log import EXTRA, FORMAT, METADATA_KEY, METRICS, PICKS, SAMPLES, SCHEMA

CLEAN, MISLABELLED, COIN_FLIP = "clean", "mislabelled", "coin flip"
ALIGNMENT = {CLEAN: 0.12, MISLABELLED: -0.12, COIN_FLIP: 0.0}
SPREAD = 0.02
"""Between clean problems."""
ERROR = 0.06
"""Standard error of one measured cosine."""
STAGES = {"rollout": 21.0, "direction": 1.4, "scores": 9.0, "selection": 11.6, "logging": 0.2, "update": 12.5}


@dataclass(frozen=True)
class LogPlan:
    """What a log is to hold."""

    num_steps: int = 60
    num_candidates: int = 64
    num_problems: int = 400
    mislabelled: float = 0.05
    coin_flips: float = 0.05
    sources: Sequence[str] = ("dapo", "gsm8k", "webinstruct", "math", "countdown")
    columns: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"topic": ("algebra", "geometry", "counting")})
    num_responses: int = 16
    error_freedom: int = 15
    """Degrees of freedom of a standard error: 1 where it is taken from two halves of a group."""
    num_samples: int = 16
    num_other_metrics: int = 0
    steps_per_part: int = 10
    planned_steps: int | None = None
    reliability: float = 0.62
    random_scores: bool = False
    floor: float | None = None
    """Schedule forecast, with this share of the picks drawn uniformly; all are trained on. None: schedule step."""
    forecast_error: float = 0.02
    """Standard deviation of a forecast about the truth."""
    seed: int = 0
    version: str | None = None
    prompt: str = "Problem {id}: what is {id} + {id}?"
    response: str = "I add {id} and {id}, which makes {sum}."


def truth_of(plan: LogPlan) -> np.ndarray:
    """Return each problem's kind (P,)."""
    draw_P = np.random.default_rng([plan.seed, 1]).random(plan.num_problems)
    return np.where(
        draw_P < plan.mislabelled,
        MISLABELLED,
        np.where(draw_P < plan.mislabelled + plan.coin_flips, COIN_FLIP, CLEAN),
    )


def write_log(folder: str | Path, plan: LogPlan) -> np.ndarray:
    """Write a run's log and return the truth about its problems (P,)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind_P = truth_of(plan)
    metadata = {METADATA_KEY: json.dumps(about(plan)).encode()}
    pool = Pool.of(plan, kind_P)
    for first in range(1, plan.num_steps + 1, plan.steps_per_part):
        steps = range(first, min(first + plan.steps_per_part, plan.num_steps + 1))
        tables = [step_tables(plan, pool, step) for step in steps]
        for name, parts in zip(("selection", "samples", "metrics"), zip(*tables, strict=True), strict=True):
            write_part(folder, name, steps[0], steps[-1], pa.concat_tables(parts), metadata)
    zero = {name: values[0] for name, values in accuracies(plan).items()}
    write_part(folder, "metrics", 0, 0, metric_rows(0, zero), metadata)
    return kind_P


def write_part(
    folder: Path, table: str, first: int, last: int, rows: pa.Table, metadata: Mapping[bytes, bytes]
) -> Path:
    """Write a part under the name that the log's own writer gives it."""
    steps = f"{first:08d}" if first == last else f"{first:08d}-{last:08d}"
    path = folder / f"{table}-{steps}.parquet"
    pq.write_table(rows.replace_schema_metadata(dict(metadata)), path)
    return path


def about(plan: LogPlan) -> dict[str, Any]:
    """Return the metadata of every part."""
    from importlib.metadata import version

    return {
        "format": FORMAT,
        "versions": {"verl": "0.9.1", "verl-gradalign": plan.version or version("verl-gradalign"), "torch": "2.13.0"},
        "created": "2026-11-25T08:00:00+00:00",
        "config": {
            "trainer": {"total_training_steps": plan.planned_steps or plan.num_steps},
            "data": {"train_files": [], "train_batch_size": plan.num_candidates // 4},
            "actor_rollout_ref": {"rollout": {"n": plan.num_responses}, "model": {"path": "Qwen/Qwen2.5-1.5B"}},
            "algorithm": {"adv_estimator": "grpo"},
            "gradalign": {
                "score": "random" if plan.random_scores else "cosine",
                "schedule": "step" if plan.floor is None else "forecast",
                "forecast": {"floor": plan.floor},
                "estimator": "ghost",
                "oversample": 4.0,
                "validation": {"files": ["trusted.parquet"], "n": 16},
                "direction": {"refresh_interval": 1},
                "probe": {"canary_threshold": 0.05},
                "log": {"sample_chars": 4000, "max_gb": 8.0},
            },
        },
    }


@dataclass(frozen=True)
class Pool:
    """The problems."""

    alignment_P: np.ndarray
    difficulty_P: np.ndarray
    labels: dict[str, tuple[np.ndarray, Sequence[str]]]

    @classmethod
    def of(cls, plan: LogPlan, kind_P: np.ndarray) -> Pool:
        random = np.random.default_rng([plan.seed, 2])
        labels = {"data_source": plan.sources, **{EXTRA + name: values for name, values in plan.columns.items()}}
        code_of = {name: random.integers(0, len(values), plan.num_problems) for name, values in labels.items()}
        source = code_of["data_source"] / max(1, len(plan.sources) - 1)
        clean = ALIGNMENT[CLEAN] + 0.06 * (source - 0.5) + SPREAD * random.standard_normal(plan.num_problems)
        fixed = np.vectorize(ALIGNMENT.get)(kind_P)
        return cls(
            np.where(kind_P == CLEAN, clean, fixed),
            random.random(plan.num_problems),
            {name: (code_of[name], values) for name, values in labels.items()},
        )


def step_tables(plan: LogPlan, pool: Pool, step: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Return the selection, samples and metrics of one step."""
    random = np.random.default_rng([plan.seed, 3, step])
    picks: dict[str, np.ndarray] = {}
    if plan.floor is None:
        id_C = random.choice(plan.num_problems, min(plan.num_candidates, plan.num_problems), replace=False)
    else:
        id_C, picks = picks_of(plan, pool, random)
    progress = step / plan.num_steps
    rate_C = np.clip(pool.difficulty_P[id_C] + 0.3 * progress - 0.2, 0, 1)
    num_right_C = random.binomial(plan.num_responses, rate_C)
    is_live_C = (num_right_C > 0) & (num_right_C < plan.num_responses)
    norm_C = 2 + 3 * random.random(len(id_C))
    cosine_C = pool.alignment_P[id_C] + ERROR * random.standard_normal(len(id_C))
    # An error that is estimated scatters about the true one.
    error_C = ERROR * np.sqrt(random.chisquare(plan.error_freedom, len(id_C)) / plan.error_freedom)
    score_C = np.where(is_live_C, random.random(len(id_C)) if plan.random_scores else cosine_C, np.nan)
    num_kept = len(id_C) // 4
    kept_C = np.zeros(len(id_C), dtype=bool)
    kept_C[np.argsort(-np.nan_to_num(score_C, nan=-9))[:num_kept]] = True
    reason_C = np.where(kept_C, "top", np.where(is_live_C, "low_score", "dead"))
    if picks:
        kept_C, reason_C = np.ones(len(id_C), dtype=bool), picks["pick"]
        picks["observed"] = np.nan_to_num(score_C)
    unmeasured_C = ~is_live_C | plan.random_scores
    columns = {
        "step": np.full(len(id_C), step),
        "problem_id": id_C,
        "score": score_C,
        "dot": np.where(unmeasured_C, np.nan, cosine_C * norm_C),
        "norm": np.where(unmeasured_C, np.nan, norm_C),
        "dot_error": np.where(unmeasured_C, np.nan, error_C * norm_C),
        "error_freedom": np.where(unmeasured_C, np.nan, plan.error_freedom),
        "success_rate": num_right_C / plan.num_responses,
        "num_responses": np.full(len(id_C), plan.num_responses),
        "response_tokens": 300 + 200 * random.random(len(id_C)) + 60 * kept_C,
        "kept": kept_C,
        "reason": reason_C,
        **picks,
    }
    columns |= {name: pa.array(values).take(pa.array(code_P[id_C])) for name, (code_P, values) in pool.labels.items()}
    schema = pa.schema(
        [*SCHEMA, *(PICKS if picks else ()), *((name, pa.string()) for name in pool.labels if name.startswith(EXTRA))]
    )
    arrays = [pa.array(columns[f.name], f.type, from_pandas=True) for f in schema]
    evidence_C = np.where(is_live_C, cosine_C / error_C, np.inf)
    sampled_C = np.argsort(evidence_C)[: plan.num_samples]
    return (
        pa.Table.from_arrays(arrays, schema=schema),
        sample_rows(plan, step, id_C[sampled_C]),
        metric_rows(step, step_metrics(plan, step, columns, random)),
    )


def picks_of(plan: LogPlan, pool: Pool, random: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the problems that a forecast picks from a shortlist four times as long, and what it forecast of them."""
    assert plan.floor is not None
    shortlist = random.choice(plan.num_problems, min(4 * plan.num_candidates, plan.num_problems), replace=False)
    forecast = pool.alignment_P[shortlist] + plan.forecast_error * random.standard_normal(len(shortlist))
    num_uniform = round(plan.floor * plan.num_candidates)
    best = num_uniform + np.argsort(-forecast[num_uniform:])[: plan.num_candidates - num_uniform]
    places = np.concatenate([np.arange(num_uniform), best])
    return shortlist[places], {
        "pick": np.where(np.arange(len(places)) < num_uniform, "uniform", "forecast"),
        "forecast_mean": forecast[places],
        "forecast_deviation": np.full(len(places), plan.forecast_error),
    }


def sample_rows(plan: LogPlan, step: int, problem_ids: Sequence[int]) -> pa.Table:
    """Return a best and a worst response of each problem."""
    rows = []
    for problem_id in map(int, problem_ids):
        words = {"id": problem_id, "sum": 2 * problem_id}
        base = {
            "step": step,
            "problem_id": problem_id,
            "prompt": plan.prompt.format(**words),
            "answer": str(2 * problem_id),
        }
        for reward in (1.0, 0.0):
            words["sum"] += int(1 - reward)
            rows.append({**base, "response": plan.response.format(**words), "reward": reward, "num_tokens": 12})
    return pa.Table.from_pylist(rows, schema=SAMPLES)


def accuracies(plan: LogPlan) -> dict[str, np.ndarray]:
    """Return held-out accuracies by step, step 0 first."""
    steps = np.arange(plan.num_steps + 1) / plan.num_steps
    noise = np.random.default_rng([plan.seed, 4]).normal(0, 0.006, (2, plan.num_steps + 1))
    return {
        "val-core/aime24/acc/mean@8": 0.21 + 0.16 * (1 - np.exp(-2.5 * steps)) + noise[0],
        "val-core/math500/acc/mean@1": 0.55 + 0.14 * (1 - np.exp(-3.0 * steps)) + noise[1],
    }


def step_metrics(plan: LogPlan, step: int, columns: Mapping[str, Any], random: np.random.Generator) -> dict[str, float]:
    """Return a step's metrics, by their names in every logger."""
    stage_s = {name: seconds * random.uniform(0.9, 1.15) for name, seconds in STAGES.items()}
    step_s = stage_s["rollout"] + stage_s["selection"] + stage_s["update"] + 2.5
    score_C, kept_C = columns["score"], columns["kept"]
    values = {
        **{f"gradalign/seconds/{name}": seconds for name, seconds in stage_s.items()},
        "gradalign/seconds/share_of_step": stage_s["selection"] / step_s,
        "gradalign/cost/share_of_step": (stage_s["selection"] + 0.7 * stage_s["rollout"]) / step_s,
        "gradalign/cost/unused_rollouts": 0.7,
        "gradalign/tokens/generated": 320_000.0,
        "gradalign/tokens/trained": 96_000.0,
        "gradalign/candidates": float(len(kept_C)),
        "gradalign/score/mean": float(np.nanmean(score_C)),
        "gradalign/score/kept_mean": float(np.nanmean(score_C[kept_C])),
        "gradalign/validation/groups": 64.0,
        "gradalign/validation/live": 41.0,
        "timing_s/step": step_s,
        "critic/score/mean": float(0.4 + 0.3 * step / plan.num_steps + random.normal(0, 0.02)),
        "response_length/mean": float(np.mean(columns["response_tokens"])),
    }
    if plan.floor is not None:
        lift = 1.6 + random.normal(0, 0.05)
        values |= {
            "gradalign/forecast/lift": lift,
            "gradalign/forecast/lift_low": lift - 0.3,
            "gradalign/forecast/lift_high": lift + 0.4,
            "gradalign/forecast/spearman": 0.4,
            "gradalign/forecast/floor": plan.floor,
            "gradalign/forecast/explained_features": 0.3,
            "gradalign/forecast/explained_problems": 0.1,
            "gradalign/responses/generated": 1100.0,
            "gradalign/responses/trusted": 100.0,
            "gradalign/cost/trusted_share": 0.1,
        }
    if not plan.random_scores:
        values |= {
            "gradalign/reliability/scores": float(np.clip(random.normal(plan.reliability, 0.08), -1, 1)),
            "gradalign/reliability/direction": float(np.clip(random.normal(0.81, 0.04), -1, 1)),
            "gradalign/reliability/fallback": 0.0,
            "gradalign/direction/norm": float(0.5 + 0.2 * random.random()),
            "gradalign/direction/age": 0.0,
            "gradalign/direction/cosine_previous": float(random.normal(0.55, 0.08)),
            "gradalign/direction/degenerate": float(step % 23 == 0),
            "gradalign/probe/oversized": 0.0,
        }
        if step % 10 == 1:
            values["gradalign/probe/canary/relative_error"] = float(random.uniform(1e-4, 1e-3))
    values |= {name: float(series[step]) for name, series in accuracies(plan).items()} if step % 10 == 0 else {}
    return values | {f"actor/other_{number}": float(step) for number in range(plan.num_other_metrics)}


def metric_rows(step: int, metrics: Mapping[str, float]) -> pa.Table:
    """Return a step's rows of the metrics table."""
    return pa.table(
        [pa.array([step] * len(metrics)), pa.array(list(metrics)), pa.array(list(metrics.values()))], schema=METRICS
    )
