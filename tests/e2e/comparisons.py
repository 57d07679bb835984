# SPDX-License-Identifier: Apache-2.0
"""Launches of `verl-gradalign compare`, on a miniature of two steps."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.runs import TIMEOUT_S, Workplace, cpu_environment
from verl_gradalign.experiments.plan import RunPlan, miniature_overrides
from verl_gradalign.toy.regimes import write_miniature

REGIME = "imbalance_mini"
SHORT = [
    # Sampling in float64 cannot be tipped by rounding, which differs between batches.
    "actor_rollout_ref.rollout.dtype=float64",
    "trainer.total_training_steps=2",
    "trainer.test_freq=2",
    "data.val_max_samples=40",
    "trainer.rollout_data_dir=${trainer.default_local_dir}/texts",
]


def command(output: Path, policy: Path, methods: str) -> list[str]:
    """Return the command that compares methods on one seed."""
    options = [f"--output={output}", f"--methods={methods}", "--seeds=4", "--jobs=1", f"--policy={policy}"]
    return [sys.executable, "-m", "verl_gradalign.cli", "compare", *options, REGIME, *SHORT]


def compare(output: Path, policy: Path, methods: str) -> str:
    """Run a comparison to its end, and return what it printed."""
    done = subprocess.run(
        command(output, policy, methods), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_alone(workplace: Workplace, further: Sequence[str]) -> Path:
    """Run the comparison's cosine run alone, and return its folder."""
    alone, data = workplace.root / "alone", workplace.root / "alone_data"
    alone.mkdir()
    write_miniature(REGIME, data, 4)
    overrides = miniature_overrides(RunPlan(REGIME, "cosine", 4, alone), data, workplace.model)
    environment = {**os.environ, **cpu_environment(), "VERL_FILE_LOGGER_PATH": str(alone / "metrics.jsonl")}
    launch = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides, *SHORT, *further]
    launch += ["actor_rollout_ref.rollout.seed=4", f"hydra.run.dir={alone / 'hydra'}"]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return alone
