# SPDX-License-Identifier: Apache-2.0
"""Comparisons of miniatures: runs that share processes are what they would be alone, and nothing done is done again."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import TIMEOUT_S, Workplace, kill_all
from verl_gradalign.experiments.compare import _cpu_environment
from verl_gradalign.experiments.metrics_file import read_metrics
from verl_gradalign.experiments.plan import DONE, RunPlan, miniature_overrides
from verl_gradalign.log.selection_log import read_selection_log

pytestmark = pytest.mark.e2e

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
    options = [f"--output={output}", f"--methods={methods}", "--seeds=4", "--jobs=1", f"--policy={policy}"]
    return [sys.executable, "-m", "verl_gradalign.cli", "compare", *options, REGIME, *SHORT]


def compare(output: Path, policy: Path, methods: str) -> str:
    done = subprocess.run(
        command(output, policy, methods), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def output(workplace: Workplace) -> Path:
    """A comparison of two methods, in one set of processes; cosine comes second."""
    folder = workplace.root / "comparison"
    compare(folder, workplace.model, "random,cosine")
    return folder


def texts(folder: Path, step: int) -> list[tuple[str, str, float]]:
    lines = (folder / str(step)).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((row["input"], row["output"], row["score"]) for row in map(json.loads, lines))


def test_a_run_of_a_series_in_batches_is_what_verls_own_agent_loop_gives_alone(
    output: Path, workplace: Workplace
) -> None:
    """The same problems kept, the same responses trained on, the same test, after another run in the same processes."""
    alone = workplace.root / "alone"
    alone.mkdir()
    overrides = miniature_overrides(RunPlan(REGIME, "cosine", 4, alone), output / "data" / "seed-4", workplace.model)
    own_loop = ["~actor_rollout_ref.rollout.agent.agent_loop_manager_class", "reward.num_workers=1"]
    environment = {**os.environ, **_cpu_environment(1), "VERL_FILE_LOGGER_PATH": str(alone / "metrics.jsonl")}
    launch = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides, *SHORT, *own_loop]
    launch += ["actor_rollout_ref.rollout.seed=4", f"hydra.run.dir={alone / 'hydra'}"]
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    in_series = output / "runs" / "cosine" / "seed-4"
    chosen = [
        sorted((row["step"], row["problem_id"], row["kept"]) for row in read_selection_log(f / "gradalign").to_pylist())
        for f in (alone, in_series)
    ]
    assert chosen[0] == chosen[1]
    for step in (1, 2):
        assert texts(alone / "texts", step) == texts(in_series / "texts", step)
    tested = [
        {(step, k): v for step, m in read_metrics(f / "metrics.jsonl") for k, v in m.items() if k.startswith("val-")}
        for f in (alone, in_series)
    ]
    assert tested[0] == tested[1] and tested[0]


def test_the_table_and_the_figures_tell_what_was_trained_on(output: Path) -> None:
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["step"]) for row in rows] == [
        (method, "4", step) for method in ("random", "cosine") for step in ("0", "1", "2")
    ]
    pool = pq.read_table(output / "data" / "seed-4" / "pool.parquet")["extra_info"].to_pylist()
    log = read_selection_log(output / "runs" / "cosine" / "seed-4" / "gradalign").to_pylist()
    kept = [pool[row["problem_id"]]["family"] == "rotation" for row in log if row["step"] == 1 and row["kept"]]
    first = next(row for row in rows if row["method"] == "cosine" and row["step"] == "1")
    assert float(first["share"]) == sum(kept) / 4
    assert float(first["tokens"]) > 32 * 16 and 0 < float(first["reliability/direction"]) <= 1
    assert all(row["tested"] for row in rows if row["step"] in "02")
    assert len(list(output.glob("*.png"))) == 4 and "| cosine |" in (output / "summary.md").read_text()


def test_a_killed_comparison_goes_on_and_repeats_nothing(output: Path, workplace: Workplace) -> None:
    """With verl's own filter_groups added, on verl's own trainer."""
    before = {path: path.stat().st_mtime_ns for path in output.rglob("metrics.jsonl")}
    added = output / "runs" / "filter_groups" / "seed-4"
    process = subprocess.Popen(command(output, workplace.model, "random,cosine,filter_groups"))
    deadline = time.monotonic() + TIMEOUT_S
    while not (added / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    kill_all(process)
    assert not (added / DONE).exists()
    compare(output, workplace.model, "random,cosine,filter_groups")
    assert (added / DONE).exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with (output / "results.csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"random", "cosine", "filter_groups"}


def test_other_settings_than_those_of_the_runs_that_are_there_are_refused(output: Path, workplace: Workplace) -> None:
    changed = [*command(output, workplace.model, "random"), "data.train_batch_size=2"]
    done = subprocess.run(changed, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 2 and "choose another --output" in done.stderr
