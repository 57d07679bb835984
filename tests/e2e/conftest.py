# SPDX-License-Identifier: Apache-2.0
"""Real verl runs on the CPU platform, each started once and shared by the tests that read what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_gradalign.experiments.metrics_file import read_metrics
from verl_gradalign.log.selection_log import read_selection_log

TIMEOUT_S = 400
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """A finished (or refused) run of verl's own entry point."""

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

    def run(self, name: str, *overrides: str, num_ranks: int = 1, may_fail: bool = False) -> Run:
        """Run verl's own entry point to its end, in a folder of the name; see `command`."""
        folder = self.root / name
        folder.mkdir()
        command, environment = self.command(folder, *overrides, num_ranks=num_ranks)
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        output = done.stdout + done.stderr
        (folder / "run.log").write_text(output, encoding="utf-8")
        assert may_fail or done.returncode == 0, output[-6000:]
        return Run(folder, done.returncode, output)

    def command(self, folder: Path, *overrides: str, num_ranks: int = 1) -> tuple[list[str], dict[str, str]]:
        """Return `python -m verl.trainer.main_ppo` on the CPU with the quickstart regime, and its environment."""
        environment = {
            **os.environ,
            "VERL_PLATFORM": "cpu",
            "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_ranks)),
            "OMP_WAIT_POLICY": "PASSIVE",
            # Ray's workers import agent loops and rewards of these tests by name.
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
            "TOKENIZERS_PARALLELISM": "false",
            # TransferQueue asks for 8 threads per message, and says in the log for every message that there are fewer.
            "TQ_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }
        command = [
            *(sys.executable, "-m", "verl.trainer.main_ppo", "+platform=cpu", "+regime=quickstart"),
            f"data.train_files={self.files['pool']}",
            f"data.val_files={self.files['test']}",
            f"actor_rollout_ref.model.path={self.model}",
            f"trainer.n_gpus_per_node={num_ranks}",
            f"trainer.default_local_dir={folder}",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            f"hydra.run.dir={folder / 'hydra'}",
            # Every process more imports torch and verl once more, ten seconds of a core.
            "actor_rollout_ref.rollout.agent.num_workers=1",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            *overrides,
        ]
        return command, environment


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Task files and a model brought to a middling success rate, as in the demonstration."""
    from verl_gradalign.data.tasks import write_task_files
    from verl_gradalign.toy.model import build_tiny_model
    from verl_gradalign.toy.warmup import warm_up

    root = tmp_path_factory.mktemp("e2e")
    files = write_task_files(root / "data", num_pool=600, num_trusted=24, num_test=64, seed=0)
    # Fewer steps than the demonstration's: the habit is there, the skill is not yet complete.
    warm_up(build_tiny_model(root / "untrained"), root / "model", num_steps=600)
    return Workplace(root, files, root / "model")


def gradalign(score: str, files: dict[str, Path], **keys: object) -> list[str]:
    """Return the overrides that turn gradalign on."""
    trusted = f"gradalign.validation.files={files['trusted']}"
    overrides = [f"+gradalign={score}", trusted, "gradalign.poll_interval_s=0.2"]
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


@pytest.fixture(scope="session")
def cosine_run(workplace: Workplace) -> Run:
    """Six steps on one rank, chosen by cosine, validated before, with everything logged that can be."""
    log = {"columns": "[corrupted,family]", "pages_interval": 3, "steps_per_part": 4}
    return workplace.run(
        "cosine",
        *gradalign("cosine", workplace.files, **{f"log__{key}": value for key, value in log.items()}),
        "trainer.total_training_steps=6",
        "trainer.val_before_train=true",
        # verl bootstraps best-of-n for n above 1, which takes longer than these six steps.
        "actor_rollout_ref.rollout.val_kwargs.n=1",
        "trainer.logger=[console,file,wandb,tensorboard]",
    )
