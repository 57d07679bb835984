# SPDX-License-Identifier: Apache-2.0
"""The runs of verl that share the processes of one series: their overrides, and the files that they need."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.e2e.runs import Workplace, gradalign

# Sampling in float64 cannot be tipped by rounding, which differs between processes and batches.
FLOAT64 = "actor_rollout_ref.rollout.dtype=float64"
TWO_STEPS = "trainer.total_training_steps=2"

NUM_STEPS = 6
SCHEDULES = {
    "step": ["gradalign.direction.refresh_interval=2", "gradalign.direction.ema=0.5", "gradalign.oversample=2"],
    "round": ["gradalign.schedule=round", "gradalign.curriculum.steps_per_round=2", "gradalign.oversample=1.5"],
    "staged": [
        "gradalign.schedule=staged",
        "gradalign.curriculum.stages=[2,4,5]",
        "gradalign.curriculum.keep=5",
        "data.train_max_samples=18",
    ],
    "forecast": [
        "gradalign.direction.train_on_trusted=false",
        "gradalign.direction.refresh_interval=4",
        "gradalign.direction.replay=2",
        "gradalign.forecast.features=[source,prompt,text]",
        "gradalign.forecast.num_features=4",
        "gradalign.forecast.rest=2",
        "gradalign.probe.rank=4",
        "gradalign.probe.canary_interval=2",
    ],
}
# The moments at which each run is killed; the next one resumes. Scoring and update count calls since the start.
KILLS = {
    "step": ["rollout 2", "scoring 2", "update 2", "checkpoint 5"],
    "round": ["rollout 2", "scoring 1", "update 2", "checkpoint 5"],
    "staged": ["rollout 2", "scoring 1", "update 2", "checkpoint 5"],
    "forecast": ["rollout 2", "update 2", "checkpoint 5"],
}
# After how many steps each run of the series ends, before it is resumed.
PAUSES = {"step": (2, 5), "round": (1, 4), "staged": (2, 4), "forecast": (2, 5)}


def scheduled(workplace: Workplace, schedule: str, num_steps: int = NUM_STEPS) -> list[str]:
    """Return the overrides of a run that repeats itself, of one schedule."""
    return [
        *gradalign("forecast" if schedule == "forecast" else "cosine", workplace.files),
        f"data.train_files={rewritten(workplace, 'pool', 'clean_pool', clean)}",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=2",
        f"trainer.total_training_steps={num_steps}",
        *SCHEDULES[schedule],
    ]


def made(path: Path, write: Callable[[Path], object]) -> Path:
    """Return the path, written at most once and all at once: launches side by side may need the same file."""
    if not path.exists():
        unfinished = path.with_suffix(f".{threading.get_native_id()}")
        write(unfinished)
        unfinished.replace(path)
    return path


def rewritten(workplace: Workplace, file: str, name: str, change: Callable[[dict], None]) -> Path:
    """Return a copy of one of the files, each row changed in place."""

    def write(path: Path) -> None:
        rows = pq.read_table(workplace.files[file]).to_pylist()
        for row in rows:
            change(row)
        pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(workplace.files[file])), path)

    return made(workplace.root / f"{name}.parquet", write)


def clean(row: dict) -> None:
    """No coin flips: a repeated rollout would throw them again."""
    row["extra_info"]["corrupted"] = False


def unanswerable(row: dict) -> None:
    """Every answer is marked wrong."""
    row["reward_model"]["ground_truth"] = "no such answer"


def trusted_sets(workplace: Workplace) -> str:
    """Return two trusted sets, of which the second's rewards need another reward function."""
    rows = pq.read_table(workplace.files["trusted"]).to_pylist()
    sets = []
    for name, members in (("good", rows[:16]), ("strange", rows[16:])):
        for row in members:
            row["data_source"] = row["data_source"] if name == "good" else "somebody/elses"
        table = pa.Table.from_pylist(members, schema=pq.read_schema(workplace.files["trusted"]))
        path = made(workplace.root / f"{name}.parquet", partial(pq.write_table, table))
        sets.append(f"{{name: {name}, files: ['{path}'], weight: 2.0, n: 4}}")
    return f"gradalign.validation.sets=[{', '.join(sets)}]"


REWARD = """
import os
from verl_gradalign.data.rewards import compute_score as score

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    {odd}
    return score(data_source, solution_str, ground_truth, extra_info, **kwargs)
"""
ODD_REWARDS = {
    # Every third problem of the pool raises; of the others some rewards are not finite.
    "failing": """if extra_info['split'] == 'pool':
        if extra_info['index'] % 3 == 0:
            raise RuntimeError(f'this reward always fails, at niceness {os.nice(0)}')
        if extra_info['index'] % 4 == 1:
            return {1: float('nan'), 2: float('inf')}.get(len(solution_str) % 3, 1.0)""",
    "missing": """if not solution_str:
        raise ValueError('there is no answer to grade')
    if extra_info['split'] == 'pool' and extra_info['index'] % 7 < 2:
        return (float('nan'), None)[extra_info['index'] % 7]""",
    "broken": "raise ValueError('the grader is broken')",
}


def odd_reward(workplace: Workplace, name: str) -> str:
    """Return the override that names one of the reward functions above."""
    text = REWARD.replace("{odd}", ODD_REWARDS[name])
    path = made(workplace.root / f"{name}_reward.py", lambda path: path.write_text(text))
    return f"reward.custom_reward_function.path={path}"


def anonymous_pool(workplace: Workplace) -> Path:
    """Return a small clean pool whose rows have all the same index."""
    rows = pq.read_table(workplace.files["pool"]).to_pylist()[:24]
    for row in rows:
        row["extra_info"] = {"corrupted": False, "index": 7}
    info = pa.field("extra_info", pa.struct([("corrupted", pa.bool_()), ("index", pa.int64())]))
    fields = [info if f.name == "extra_info" else f for f in pq.read_schema(workplace.files["pool"])]
    table = pa.Table.from_pylist(rows, schema=pa.schema(fields))
    return made(workplace.root / "anonymous.parquet", partial(pq.write_table, table))


def series_runs(workplace: Workplace) -> dict[str, list[str]]:
    """Return the overrides of every run that can share its processes with others, by name."""
    files = workplace.files
    lost = {"trusted": rewritten(workplace, "trusted", "unanswerable", unanswerable)}
    without_files = [o for o in gradalign("confident_cosine", files, oversample=3) if "validation.files" not in o]
    log = {"columns": "[corrupted,family]", "pages_interval": 3, "steps_per_part": 4}
    runs = {
        "cosine": [
            *gradalign("cosine", files, **{f"log__{key}": value for key, value in log.items()}),
            "trainer.total_training_steps=6",
            "trainer.val_before_train=true",
            "trainer.logger=[console,file,wandb,tensorboard]",
        ],
        "random": [*gradalign("random", files), TWO_STEPS],
        "grpo": [
            *gradalign("correlation", files, oversample=3),
            "algorithm.norm_adv_by_std_in_grpo=false",
            "gradalign.reliability.min_reliability=0.999",
            "gradalign.reliability.fallback=accuracy_greedy",
            TWO_STEPS,
        ],
        "rloo": [
            *without_files,
            trusted_sets(workplace),
            "gradalign.direction.aggregation=per_problem_unit",
            "algorithm.adv_estimator=rloo",
            "algorithm.rollout_correction.bypass_mode=false",
            "algorithm.rollout_correction.rollout_is=sequence",
            TWO_STEPS,
        ],
        "reinforce": [
            *gradalign("lower_bound", files, oversample=2),
            "algorithm.adv_estimator=reinforce_plus_plus",
            "gradalign.direction.metric=candidates",
            "gradalign.direction.metric_problems=4",
            TWO_STEPS,
        ],
        "dapo": [
            *gradalign("learnalign", files, oversample=2),
            "algorithm.filter_groups.enable=true",
            "algorithm.filter_groups.metric=reward",
            # Two responses agree in every other group or so: that some of 16 groups are filtered is sure.
            "actor_rollout_ref.rollout.n=2",
            TWO_STEPS,
        ],
        "once": [
            *gradalign("learnalign", files, schedule="once"),
            f"data.train_files={anonymous_pool(workplace)}",
            "gradalign.curriculum.warmup_steps=1",
            "gradalign.curriculum.warmup_problems=8",
            "gradalign.curriculum.keep=6",
            "gradalign.curriculum.n=12",
            "trainer.total_training_steps=4",
        ],
        # Kept trusted responses serve the other schedules too.
        "kept": [
            *gradalign("cosine", files, oversample=2, direction__rolling="true", direction__refresh_interval=4),
            TWO_STEPS,
        ],
        # Chosen by forecast, measured in a pass before the update, with trusted groups in the batch.
        "forecast_before": [
            *gradalign("cosine", files, schedule="forecast", forecast__floor=0.25, direction__train_on_trusted="true"),
            "gradalign.direction.refresh_interval=12",
            "gradalign.validation.n=8",
            TWO_STEPS,
        ],
        # The whole direction, held for two steps, in the update's backward pass.
        "forecast_held": [
            *gradalign("correlation", files, schedule="forecast", measure="update", direction__refresh_interval=2),
            "gradalign.direction.rolling=false",
            "gradalign.direction.replay=1",
            "trainer.total_training_steps=3",
        ],
        # No trusted set: which problems are half solved is forecast.
        "difficulty": [
            *gradalign("accuracy_greedy", {"trusted": ""}, schedule="forecast", forecast__features="[source,text]"),
            "gradalign.forecast.per=token",
            TWO_STEPS,
        ],
        "degenerate": [*gradalign("cosine", lost, oversample=2), TWO_STEPS],
        "stop": [*gradalign("cosine", lost, oversample=1, direction__on_degenerate="stop"), TWO_STEPS],
        "failing": [
            *gradalign("dot", files, oversample=2, validation__n=4),
            odd_reward(workplace, "failing"),
            TWO_STEPS,
        ],
        "broken": [*gradalign("cosine", files), odd_reward(workplace, "broken"), TWO_STEPS],
    }
    for schedule, pauses in PAUSES.items():
        runs[f"whole_{schedule}"] = scheduled(workplace, schedule)
        for part, num_steps in enumerate((*pauses, NUM_STEPS)):
            runs[f"paused_{schedule}@{part}"] = scheduled(workplace, schedule, num_steps)
    runs["stateless@0"] = ["trainer.save_freq=1", "trainer.total_training_steps=1"]
    runs["stateless"] = scheduled(workplace, "step", 2)
    changed = ["gradalign.oversample=3", f"data.train_files={files['pool']}"]
    runs["paused_step@other"] = [*scheduled(workplace, "step"), *changed]
    return {name: [FLOAT64, f"trainer.experiment_name={name}", *overrides] for name, overrides in runs.items()}


MAY_FAIL = ("stop", "broken", "paused_step@other")
