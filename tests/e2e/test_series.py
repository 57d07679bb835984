# SPDX-License-Identifier: Apache-2.0
"""Comparisons of miniatures: runs that share processes are what they would be alone, and nothing done is done again."""

import csv
import json
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.e2e.comparisons import command, compare
from tests.e2e.runs import TIMEOUT_S, Run, Workplace, kill_all
from verl_gradalign.experiments.metrics_file import read_metrics
from verl_gradalign.experiments.plan import DONE
from verl_gradalign.log.selection_log import read_selection_log

pytestmark = pytest.mark.e2e

# Rounding, which updates carry on; see test_resume.py.
RTOL, ATOL_COSINE = 1e-3, 1e-4


def texts(folder: Path, step: int) -> list[tuple[str, str, float]]:
    lines = (folder / str(step)).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((row["input"], row["output"], row["score"]) for row in map(json.loads, lines))


def test_a_run_of_a_series_in_batches_is_what_verls_own_agent_loop_gives_alone(compared: Path, alone: Path) -> None:
    """The same problems kept, the same responses trained on, the same test, after another run in the same processes."""
    in_series = compared / "runs" / "cosine" / "seed-4"
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


def test_the_table_and_the_figures_tell_what_was_trained_on(compared: Path) -> None:
    with (compared / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["step"]) for row in rows] == [
        (method, "4", step) for method in ("random", "cosine") for step in ("0", "1", "2")
    ]
    pool = pq.read_table(compared / "data" / "seed-4" / "pool.parquet")["extra_info"].to_pylist()
    log = read_selection_log(compared / "runs" / "cosine" / "seed-4" / "gradalign").to_pylist()
    kept = [pool[row["problem_id"]]["family"] == "rotation" for row in log if row["step"] == 1 and row["kept"]]
    first = next(row for row in rows if row["method"] == "cosine" and row["step"] == "1")
    assert float(first["share"]) == sum(kept) / 4
    assert float(first["tokens"]) > 32 * 16 and 0 < float(first["reliability/direction"]) <= 1
    assert all(row["tested"] for row in rows if row["step"] in "02")
    assert len(list(compared.glob("*.png"))) == 4 and "| cosine |" in (compared / "summary.md").read_text()


@pytest.mark.nightly
def test_a_killed_comparison_goes_on_and_repeats_nothing(compared: Path, workplace: Workplace) -> None:
    """With verl's own filter_groups added, on verl's own trainer."""
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("metrics.jsonl")}
    added = compared / "runs" / "filter_groups" / "seed-4"
    process = subprocess.Popen(command(compared, workplace.model, "random,cosine,filter_groups"))
    deadline = time.monotonic() + TIMEOUT_S
    while not (added / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    kill_all(process)
    assert not (added / DONE).exists()
    compare(compared, workplace.model, "random,cosine,filter_groups")
    assert (added / DONE).exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with (compared / "results.csv").open() as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"random", "cosine", "filter_groups"}


def test_other_settings_than_those_of_the_runs_that_are_there_are_refused(compared: Path, workplace: Workplace) -> None:
    changed = [*command(compared, workplace.model, "random"), "data.train_batch_size=2"]
    done = subprocess.run(changed, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 2 and "choose another --output" in done.stderr


@pytest.mark.nightly
def test_tuned_runs_of_one_series_have_their_own_learning_rates_and_one_budget(
    tmp_path: Path, workplace: Workplace
) -> None:
    what = ["--methods=random,trusted_mixed", "--rates=2e-4,4e-4", "--seeds=1", "--budget-responses=512", "--jobs=1"]
    where = [f"--output={tmp_path / 'out'}", f"--policy={workplace.model}", "data.val_max_samples=200"]
    launch = [sys.executable, "-m", "verl_gradalign.cli", "compare", "imbalance_mini", "--tune", *what, *where]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=2 * TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    paths = sorted((tmp_path / "out" / "runs").rglob("metrics.jsonl"))
    assert len(paths) == 6
    for path in paths:
        steps = [metrics for _, metrics in read_metrics(path) if "timing_s/step" in metrics]
        assert [metrics["experiment/num_responses"] for metrics in steps] == [256, 512]
        assert {f"lr-{metrics['actor/lr']:g}" for metrics in steps} == {path.parent.parent.name}
    assert "| trusted_mixed |" in (tmp_path / "out" / "summary.md").read_text()
    assert done.stdout.startswith("to do: 6 runs of 512 responses: about ")


@pytest.mark.nightly
@pytest.mark.parametrize(("unit", "amount"), [("tokens", 4000), ("seconds", 12)])
def test_runs_end_with_the_step_in_which_their_budget_of_tokens_or_seconds_is_spent(
    tmp_path: Path, workplace: Workplace, unit: str, amount: int
) -> None:
    """Beside a batch four times as large, whose mini-batch the shared processes are not started with."""
    what = ["--methods=random,random_large_batch", "--rates=4e-4", "--seeds=1", f"--budget-{unit}={amount}", "--jobs=1"]
    where = [f"--output={tmp_path / 'out'}", f"--policy={workplace.model}", "data.val_max_samples=200"]
    launch = [sys.executable, "-m", "verl_gradalign.cli", "compare", "imbalance_mini", "--tune", *what, *where]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for method, num_of_step in (("random", 256), ("random_large_batch", 1024)):
        (path,) = (tmp_path / "out" / "runs" / method).rglob("metrics.jsonl")
        steps = [metrics for _, metrics in read_metrics(path) if "timing_s/step" in metrics]
        assert [m["experiment/num_responses"] for m in steps] == [num_of_step * (i + 1) for i in range(len(steps))]
        seconds = list(accumulate(m["timing_s/step"] for m in steps))
        spent = {"tokens": [m["experiment/num_tokens"] for m in steps], "seconds": seconds}[unit]
        # Measured twice, a few microseconds apart.
        assert spent[-1] >= amount and all(s < amount + 0.01 for s in spent[:-1])
        assert "timing_s/testing" in steps[-1]


@pytest.mark.nightly
def test_the_order_of_a_series_shows_in_none_of_its_runs(
    series: dict[str, Run], reversed_series: dict[str, Run]
) -> None:
    """What one run leaves in the processes would be found by another one."""
    assert set(series) == set(reversed_series) and list(series) != list(reversed_series)
    for name, run in series.items():
        assert run.returncode == reversed_series[name].returncode, name
    # Launches of one run share its folder.
    for name in sorted({name.partition("@")[0] for name in series}):
        folders = [runs["random"].folder.with_name(name) / "gradalign" for runs in (series, reversed_series)]
        assert folders[0].exists() == folders[1].exists() == (name != "stop"), name
        logs = [read_selection_log(folder).to_pylist() for folder in folders if folder.exists()]
        for ours, theirs in zip(*logs, strict=True):
            assert {k: v for k, v in ours.items() if not isinstance(v, float)} == {
                k: v for k, v in theirs.items() if not isinstance(v, float)
            }, name
            for column, value in ours.items():
                if isinstance(value, float):
                    assert theirs[column] == pytest.approx(value, rel=RTOL, abs=ATOL_COSINE), (name, column)
