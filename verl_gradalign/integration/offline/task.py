# SPDX-License-Identifier: Apache-2.0
"""What an offline scoring is asked for: checked before anything starts, and said in verl's words.

task = ScoringTask(pool=(Path("pool.parquet"),), trusted=(Path("trusted.parquet"),), model=..., output=...)
check_task(task)
overrides = verl_overrides(task, model, checkpoint=None)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from verl_gradalign.config import CurriculumConfig
from verl_gradalign.data.identity import MEDIA_KEYS, ROWS_READ_TOGETHER
from verl_gradalign.data.values import is_empty
from verl_gradalign.errors import refuse
from verl_gradalign.selection.scores import score_of

RESPONSES_PER_CHUNK = 512
SHARD = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")

# What is the same in every scoring; the user's own overrides win.
FIXED = (
    "+gradalign=base gradalign.schedule=step gradalign.oversample=1 data.val_max_samples=64 data.train_batch_size=1 "
    "algorithm.adv_estimator=grpo critic.enable=false actor_rollout_ref.actor.use_dynamic_bsz=true "
    "actor_rollout_ref.actor.ppo_mini_batch_size=1 trainer.v1.trainer_mode=gradalign_score trainer.logger=[console] "
    "trainer.resume_mode=disable trainer.val_before_train=false trainer.total_training_steps=1"
).split()


@dataclass(frozen=True)
class ScoringTask:
    """A scoring, as the command line names it."""

    pool: tuple[Path, ...]
    """Parquet files in verl's schema, scored as one; a problem is known by its row in all of them."""
    model: Path
    """Folder of a Hugging Face model, or verl's checkpoint `global_step_<n>`."""
    output: Path
    trusted: tuple[Path, ...] = ()
    score: str = "cosine"
    keep: float = 0.25
    """A share of what is rolled out, from 0 to 1, or a whole number from 2 on. May change once everything is scored."""
    responses: int = 8
    """Responses to each problem of the pool."""
    trusted_responses: int | None = None
    """Responses to each trusted problem; None: as many as to the others."""
    chunk: int | None = None
    """Problems that are stored and scored together; None: some hundreds of responses."""
    seed: int = 0
    overrides: tuple[str, ...] = ()
    """Of verl's configuration."""

    @property
    def state(self) -> Path:
        """The folder with everything that an interrupted scoring resumes from."""
        return self.output.resolve() / "state"

    @property
    def problems_per_chunk(self) -> int:
        return self.chunk or max(1, RESPONSES_PER_CHUNK // self.responses)


@dataclass(frozen=True)
class Checkpoint:
    """An actor that verl saved as one shard for each rank."""

    folder: Path
    num_ranks: int


def check_task(task: ScoringTask) -> None:
    """Raise ValueError, naming the option and the remedy, for what can be seen to be wrong at once."""
    score = score_of(task.score)
    overridden = {key.lstrip("+~"): value for key, _, value in (text.partition("=") for text in task.overrides)}
    options = {key: option for option, keys in _by_option(task, task.model).items() for key in keys}
    options["gradalign"] = "--score"
    for key in overridden:
        if key in options:
            refuse(key, overridden[key], "is set by an option of this command", f"use {options[key]} for it")
    for key, only in (("gradalign.schedule", "step"), ("gradalign.measure", "before")):
        if overridden.get(key, only) != only:
            refuse(key, overridden[key], "a pool is scored once, as it is, and nothing is trained", "leave it out")
    if score.rank is None:
        refuse("--score", task.score, "draws problems without looking at them", "use a score that ranks, e.g. cosine")
    has_trusted = bool(task.trusted) or "gradalign.validation.sets" in overridden
    if score.needs_direction and not has_trusted:
        why = f"score {task.score} needs a trusted set"
        refuse("--trusted", None, why, "name a file, or use a score without one, e.g. --score learnalign")
    if task.trusted and not score.needs_direction:
        why = f"score {task.score} does not look at a trusted set"
        refuse("--trusted", ", ".join(map(str, task.trusted)), why, "leave it out, or use --score cosine")
    for option, value in (("--responses", task.responses), ("--trusted-responses", task.trusted_responses)):
        if value is not None and value < 2:
            refuse(option, value, "must be at least 2: advantages compare responses", "use 8 or more")
    prompt_key = overridden.get("data.prompt_key", "prompt")
    num_problems = sum(_check_file("--pool", path, prompt_key) for path in task.pool)
    for path in task.trusted:
        _check_file("--trusted", path, prompt_key)
    first = pq.read_schema(task.pool[0])
    for path in task.pool[1:]:
        schema = pq.read_schema(path)
        if not schema.equals(first):  # the kept problems of all files are written as one
            different = {f.name for f in {*schema, *first} if f not in schema or f not in first}
            why = f"its columns are not those of {task.pool[0]}: {', '.join(sorted(different)) or 'another order'}"
            refuse("--pool", path, why, "write the files with one schema, or score them apart")
    CurriculumConfig(keep=task.keep)
    if num_kept(task.keep, num_problems) > num_problems:
        why = f"the pool has {num_problems} problems only"
        refuse("--keep", int(task.keep), why, "use a smaller number, or a share such as 0.25")
    if find_checkpoint(task.model) is None and not (task.model / "config.json").is_file():
        why = "is neither a folder with config.json nor one of verl's checkpoints (global_step_<n>)"
        remedy = "give one of them; a model of the hub is fetched with `hf download NAME --local-dir FOLDER`"
        refuse("--model", task.model, why, remedy)


def num_kept(keep: float, num_problems: int) -> int:
    """Return how many problems are kept of so many: at least one."""
    return max(1, round(keep * num_problems)) if keep <= 1 else int(keep)


def find_checkpoint(model: Path) -> Checkpoint | None:
    """Return verl's shards in a folder `global_step_<n>` (or in its `actor`), None if it is a model of another kind.

    Raises: ValueError if a shard is missing.
    """
    for folder in (model / "actor", model):
        found = [m for path in folder.glob("model_world_size_*.pt") if (m := SHARD.fullmatch(path.name))]
        if not found:
            continue
        num_ranks = int(found[0][1])
        missing = set(range(num_ranks)) - {int(match[2]) for match in found if int(match[1]) == num_ranks}
        if missing or not (folder / "huggingface" / "config.json").is_file():
            what = f"the shards of ranks {sorted(missing)} of {num_ranks}" if missing else "huggingface/config.json"
            refuse("--model", folder, f"lacks {what}", "copy the checkpoint again, whole")
        return Checkpoint(folder.resolve(), num_ranks)
    return None


def _check_file(option: str, path: Path, prompt_key: str) -> int:
    """Return the rows of a Parquet file; raise ValueError if it has none, or no prompts."""
    if not path.is_file():
        refuse(option, path, "no such file", "give the path of a Parquet file in verl's schema")
    try:
        metadata = pq.read_metadata(path)
    except pa.ArrowException as error:
        raise ValueError(f"{option} {path}: is not Parquet ({error}). Remedy: convert it.") from error
    names = metadata.schema.to_arrow_schema().names
    if prompt_key not in names:
        why = f"has no column {prompt_key!r}, only {', '.join(names)}"
        refuse(option, path, why, "add it, or set data.prompt_key after --")
    if not metadata.num_rows:
        refuse(option, path, "is empty", "give a file with problems")
    for media in MEDIA_KEYS.values():
        if media in names and (row := _first_filled(path, media)) is not None:
            why = f"row {row} has {media}, and scoring offline stores text only"
            refuse(option, path, why, "score problems of text, or select while training (+gradalign=...)")
    return int(metadata.num_rows)


def _first_filled(path: Path, column: str) -> int | None:
    """Return the first row, counted from 1, in which the column holds something; read in parts, as images are large."""
    start = 1
    for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS_READ_TOGETHER, columns=[column]):
        for place, value in enumerate(batch.column(0)):
            if value.is_valid and not is_empty(value.as_py()):
                return start + place
        start += len(batch)
    return None


def verl_overrides(task: ScoringTask, model: Path, checkpoint: Checkpoint | None) -> list[str]:
    """Return all overrides of verl's entry point; the user's own come last, so that they win.

    `model` is the folder that verl builds its actor from before it loads the `checkpoint` into it.
    """
    keys = {key: value for keys in _by_option(task, model).values() for key, value in keys.items()}
    keys |= {
        "data.val_files": _listed(task.pool),  # verl reads them whether it validates or not
        "hydra.run.dir": _quoted(task.state / "hydra"),
        "+scoring.folder": _quoted(task.state),
        "+scoring.chunk": task.problems_per_chunk,
        "+scoring.checkpoint": "null" if checkpoint is None else _quoted(checkpoint.folder),
    }
    if checkpoint is not None:
        # direction.metric=adam reads the optimizer's second moments.
        contents = "[model,optimizer]" if "gradalign.direction.metric=adam" in task.overrides else "[model]"
        keys["actor_rollout_ref.actor.checkpoint.load_contents"] = contents
    return [*FIXED, *(f"{key}={value}" for key, value in keys.items()), *task.overrides]


def _by_option(task: ScoringTask, model: Path) -> dict[str, dict[str, Any]]:
    """Return the keys of verl's configuration that each option of the command sets."""
    output = task.output.resolve()
    return {
        "--score": {"gradalign.score": _quoted(task.score)},
        "--seed": {"gradalign.seed": task.seed, "data.seed": task.seed},
        "--trusted": {"gradalign.validation.files": _listed(task.trusted)},
        "--trusted-responses": {"gradalign.validation.n": task.trusted_responses or "null"},
        "--pool": {"data.train_files": _listed(task.pool)},
        "--model": {"actor_rollout_ref.model.path": _quoted(model)},
        "--responses": {"actor_rollout_ref.rollout.n": task.responses},
        "--output": {"trainer.default_local_dir": _quoted(output), "gradalign.log.dir": _quoted(output / "gradalign")},
    }


def _quoted(value: str | Path) -> str:
    """Return a value that Hydra takes as it is, whatever characters it has."""
    text = str(value).replace("'", "\\'")
    return f"'{text}'"


def _listed(paths: Sequence[Path]) -> str:
    return f"[{','.join(_quoted(path.resolve()) for path in paths)}]"
