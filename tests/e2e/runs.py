# SPDX-License-Identifier: Apache-2.0
"""How the tests start verl, and what they read of a run that has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from verl_gradalign.cpu.series import BEGINS
from verl_gradalign.experiments.launches import cpu_environment as shared_environment
from verl_gradalign.experiments.metrics_file import read_metrics
from verl_gradalign.log.selection_log import read_selection_log

TIMEOUT_S = 500
# verl looks for a free port and binds it seconds later, before anything is trained: the launch beside it may be faster.
PORT_TAKEN = "EADDRINUSE"
# Two launches on two cores: starting is mostly imports, on one thread of several processes.
NUM_PLACES = 2
# verl's default, which launches of their own have: runs of the series are compared with theirs.
ROLLOUT_SEED = 42
REPOSITORY = Path(__file__).resolve().parents[2]
# One call generates what a step asks for: as verl's own agent loop does (test_series.py), with fewer processes.
BATCHED = [
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_gradalign.cpu.batched_rollout.BatchedRollout",
    "reward.num_workers=0",
]
OWN_LOOP = ["~actor_rollout_ref.rollout.agent.agent_loop_manager_class", "reward.num_workers=1"]

# A rollout beside the training rank, on a logical GPU of its own, and two updates a step.
SEPARATE = [
    "trainer.v1.separate_async.parameter_sync_step=2",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.rollout.nnodes=1",
    "actor_rollout_ref.rollout.checkpoint_engine.backend=gloo",
    "ray_kwargs.ray_init.num_gpus=2",
]


@dataclass(frozen=True)
class Run:
    """A finished (or refused) run of verl's own entry point, or of a series."""

    folder: Path
    returncode: int
    output: str

    @property
    def steps(self) -> list[dict[str, float]]:
        """Metrics of every training step, in order."""
        return [m for _, m in read_metrics(self.folder / "metrics.jsonl") if "timing_s/step" in m]

    @property
    def log(self) -> list[dict]:
        """The selection log, as rows."""
        return self.table.to_pylist()

    @property
    def table(self) -> pa.Table:
        return read_selection_log(self.folder / "gradalign")

    def trained_rows(self, step: int) -> list[dict]:
        """What verl itself says it trained on in a step (trainer.rollout_data_dir)."""
        lines = (self.folder / "rollouts" / f"{step}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Workplace:
    """Data and a warmed-up model, shared by the session."""

    root: Path
    files: dict[str, Path]
    model: Path

    def corrupted(self) -> np.ndarray:
        """Whether each row of the pool has a coin-flip reward."""
        return np.array([info["corrupted"] for info in pq.read_table(self.files["pool"])["extra_info"].to_pylist()])

    def run(self, name: str, *overrides: str, num_ranks: int = 1, may_fail: bool = False, batched: bool = True) -> Run:
        """Run verl's own entry point to its end, in a folder of the name; see `command`."""
        folder = self.root / name
        folder.mkdir()
        command, environment = self.command(folder, *overrides, num_ranks=num_ranks, batched=batched)
        run = partial(subprocess.run, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
        done = run(command, check=False)
        if PORT_TAKEN in done.stdout + done.stderr:
            done = run(command, check=False)
        output = done.stdout + done.stderr
        (folder / "run.log").write_text(output, encoding="utf-8")
        assert may_fail or done.returncode == 0, output[-6000:]
        return Run(folder, done.returncode, output)

    def command(
        self, folder: Path, *overrides: str, num_ranks: int = 1, batched: bool = True
    ) -> tuple[list[str], dict[str, str]]:
        """Return `python -m verl.trainer.main_ppo` on the CPU with the quickstart regime, and its environment."""
        environment = {**cpu_environment(), "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
        own = [*self.overrides(folder, batched=batched), f"trainer.n_gpus_per_node={num_ranks}"]
        return [sys.executable, "-m", "verl.trainer.main_ppo", *own, *overrides], environment

    def overrides(self, folder: Path, batched: bool = True) -> list[str]:
        """Return the overrides that all runs of the tests have."""
        return [
            *("+platform=cpu", "+regime=quickstart"),
            f"data.train_files={self.files['pool']}",
            f"data.val_files={self.files['test']}",
            f"actor_rollout_ref.model.path={self.model}",
            f"trainer.default_local_dir={folder}",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            f"hydra.run.dir={folder / 'hydra'}",
            # Every process more imports torch and verl once more, ten seconds of a core.
            "actor_rollout_ref.rollout.agent.num_workers=1",
            # verl bootstraps best-of-n for n above 1, which takes longer than these runs.
            "actor_rollout_ref.rollout.val_kwargs.n=1",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            *(BATCHED if batched else ()),
        ]

    def series(self, name: str, runs: Mapping[str, Sequence[str]], may_fail: Sequence[str] = ()) -> dict[str, Run]:
        """Run verl with each of the overrides, one after the other in one set of processes; see `cpu.series`.

        The names of runs are folders; runs that share a folder (`whole`, `whole@2`) are launches of one run.
        """
        root = self.root / name
        members = []
        for run, overrides in runs.items():
            folder = root / run.partition("@")[0]
            folder.mkdir(parents=True, exist_ok=True)
            members.append(
                {
                    "folder": str(root / run),
                    "done": str(root / f"{run}.done"),
                    "seed": ROLLOUT_SEED,
                    "overrides": [*self.overrides(folder), *overrides],
                    "may_fail": run in may_fail,
                }
            )
        plan = root / "series.json"
        plan.write_text(json.dumps(members), encoding="utf-8")
        command = [sys.executable, "-m", "verl_gradalign.cpu.series", str(plan)]
        log = root / "series.log"
        # One file for both: Ray prints what workers warn of to stderr, and it belongs to the run that it was said in.
        with log.open("wb") as file:
            done = subprocess.run(
                command,
                env=cpu_environment(),
                cwd=root,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=3 * TIMEOUT_S,
                check=False,
            )
        output = log.read_text(encoding="utf-8", errors="replace")
        assert done.returncode == 0, output[-6000:]
        return {run: self._member(root, run, output) for run in runs}

    def _member(self, root: Path, run: str, output: str) -> Run:
        own = output.partition(f"{BEGINS}{root / run}\n")[2].partition(BEGINS)[0]
        failure = root / run / "failed.txt"
        error = failure.read_text(encoding="utf-8") if failure.exists() else ""
        return Run(root / run, int(bool(error)), own + error)


def cpu_environment() -> dict[str, str]:
    """Return the environment of a launch that shares the cores with another."""
    return {
        **os.environ,
        **shared_environment(),
        # Ray's workers import agent loops and rewards of these tests by name.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
        "WANDB_MODE": "offline",
    }


def gradalign(score: str, files: dict[str, Path], **keys: object) -> list[str]:
    """Return the overrides that turn gradalign on."""
    trusted = f"gradalign.validation.files={files['trusted']}"
    overrides = [f"+gradalign={score}", trusted, "gradalign.poll_interval_s=0.02"]
    return overrides + [f"gradalign.{key.replace('__', '.')}={value}" for key, value in keys.items()]


def kill_all(process: subprocess.Popen) -> None:
    """Kill a run and every process it started, as a lost machine would."""
    root = psutil.Process(process.pid)
    for victim in [*root.children(recursive=True), root]:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def kill_at_marker(process: subprocess.Popen, marker: Path, log: Path) -> None:
    """Wait for the moment that `interruption.py` marks, then kill every process of the run."""
    deadline = time.monotonic() + TIMEOUT_S
    while not marker.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-5000:]
        time.sleep(0.05)
    kill_all(process)
