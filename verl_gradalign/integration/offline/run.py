# SPDX-License-Identifier: Apache-2.0
"""An offline scoring from its first check to its files: what `verl-gradalign score` calls.

    summary = run_scoring(task, command=sys.argv, watch=lambda progress: ...)

verl is started as a process of its own, with its own entry point; its output goes to state/run.log. The same call goes
on with a scoring that was interrupted, and makes the files anew at once where everything is scored.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse
from verl_gradalign.files import atomic_folder
from verl_gradalign.integration.checks import check_data, check_verl_config, read_config
from verl_gradalign.integration.compose import compose_run, composing, validate
from verl_gradalign.integration.offline.plan import own_overrides, plan_of, require_same_plan
from verl_gradalign.integration.offline.results import write_results
from verl_gradalign.integration.offline.store import Measured, ScoringStore
from verl_gradalign.integration.offline.task import Checkpoint, ScoringTask, check_task, find_checkpoint
from verl_gradalign.integration.offline.trainer import check_scoring, needs_whole_pool, trusted_names

__all__ = ["run_scoring"]

POLL_S = 0.5
TAIL_LINES = 40
# What Ray puts before a line of another process.
OF_A_WORKER = "\x1b[36m("
AN_ERROR = re.compile(r"[\w.]+(Error|Exception): ")


def run_scoring(
    task: ScoringTask, command: Sequence[str], watch: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Score what is not scored yet, write the results, and return the summary. `watch` receives the progress.

    Raises: ValueError for what cannot be scored, before anything starts; RuntimeError with the end of verl's output if
        it fails. What is done stays done.
    """
    check_task(task)
    datasets.disable_progress_bars()
    checkpoint = find_checkpoint(task.model)
    with _alone(task):
        model = task.model.resolve() if checkpoint is None else _weights_of(checkpoint, task)
        overrides = own_overrides(task, model, checkpoint)
        verl_config = _compose(overrides)
        config = _check(task, verl_config, checkpoint)
        require_same_plan(task.state, plan_of(task, verl_config))
        store = ScoringStore(task.state)
        measured = _finished(store, config)
        if measured is None:
            if checkpoint is not None:
                _merge(checkpoint, model, task.state / "run.log")
            _run(overrides, task.state, watch)
            measured = _finished(store, config)
        if measured is None:
            raise RuntimeError(f"verl ended, but not everything is scored; its output is in {task.state / 'run.log'}")
        return write_results(task, config, verl_config, measured, command)


@contextlib.contextmanager
def _alone(task: ScoringTask) -> Iterator[None]:
    """Hold the folder's lock, which verl's process takes over: it is free when the last of them has ended."""
    task.state.mkdir(parents=True, exist_ok=True)
    with (task.state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "another process is scoring into it"
            refuse("--output", task.output, why, "wait for it, or end it")
        os.set_inheritable(lock.fileno(), True)
        yield


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that verl will run with. Raises ValueError for what it does not take."""
    try:
        # verl prints while it validates; the standard output is for the result.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            composing(),
        ):
            return validate(compose_run(overrides))
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        raise ValueError(
            f"verl does not take this configuration: {error}. Remedy: mend what stands after --."
        ) from None


def _check(task: ScoringTask, verl_config: DictConfig, checkpoint: Checkpoint | None) -> GradAlignConfig:
    """Return the `gradalign` block, after the checks that the trainer makes too, when it would cost minutes."""
    config = read_config(verl_config)
    check_scoring(verl_config)
    check_verl_config(config, verl_config)
    check_data(config, verl_config)
    num_ranks = verl_config.trainer.n_gpus_per_node * verl_config.trainer.nnodes
    if checkpoint is not None and checkpoint.num_ranks != num_ranks:
        refuse(
            "--model",
            task.model,
            f"was saved by {checkpoint.num_ranks} ranks, and verl loads it on as many only, not on {num_ranks}",
            f"score on {checkpoint.num_ranks} (trainer.n_gpus_per_node, trainer.nnodes after --), or merge it with "
            f"`python -m verl.model_merger merge --backend fsdp --local_dir {checkpoint.folder} --target_dir FOLDER` "
            "and give that folder: its weights are rounded to bfloat16",
        )
    return config


def _finished(store: ScoringStore, config: GradAlignConfig) -> list[Measured] | None:
    """Return what was measured if that is everything, None if not."""
    if store.failed() is None:
        return None
    num_trusted = store.num_trusted(trusted_names(config))
    by_files = {measured.files: measured for measured in store.measured(num_trusted)}
    units = store.units(needs_whole_pool(config))
    return [by_files[unit] for unit in units] if all(unit in by_files for unit in units) else None


def _weights_of(checkpoint: Checkpoint, task: ScoringTask) -> Path:
    """Return the folder of a whole model that verl builds its actor from, before it loads the shards into it."""
    saved = checkpoint.folder / "huggingface"
    is_whole = any(saved.glob("*.safetensors")) or any(saved.glob("pytorch_model*.bin"))
    return saved if is_whole else task.state / "model"


def _merge(checkpoint: Checkpoint, model: Path, log_path: Path) -> None:
    """Have verl merge the shards into a whole model, rounded: the actor loads the exact shards afterwards."""
    if model.exists():
        return
    command = [sys.executable, "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    with atomic_folder(model) as unfinished, log_path.open("ab") as log:
        command += ["--local_dir", str(checkpoint.folder), "--target_dir", str(unfinished)]
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
        _require_success(done.returncode, log_path)


def _run(overrides: Sequence[str], state: Path, watch: Callable[[Mapping[str, Any]], None]) -> None:
    """Run verl to its end."""
    log_path, progress_path = state / "run.log", state / "progress.json"
    progress_path.unlink(missing_ok=True)
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "verl.trainer.main_ppo", *overrides],
            stdout=log,
            stderr=subprocess.STDOUT,
            # The lock is handed on, see `_alone`; files of this process are not inherited unless marked.
            close_fds=False,
        )
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            if progress_path.exists():
                watch(json.loads(progress_path.read_text(encoding="utf-8")))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    _require_success(process.returncode, log_path)
    watch(json.loads(progress_path.read_text(encoding="utf-8")))


def _require_success(returncode: int, log_path: Path) -> None:
    if returncode:
        raise RuntimeError(
            f"verl failed (exit {returncode}); its whole output is in {log_path}, and the same command resumes from "
            f"what is done\n{_end_of(log_path.read_text(errors='replace'))}"
        )


def _end_of(output: str) -> str:
    """Return verl's last lines: its own if they tell an error, as workers go on talking after it; else all of them."""
    lines = output.splitlines()
    own = [line for line in lines if not line.startswith(OF_A_WORKER)]
    is_told = any(AN_ERROR.match(line) for line in own[-TAIL_LINES:])
    return "\n".join((own if is_told else lines)[-TAIL_LINES:])
