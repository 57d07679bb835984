# SPDX-License-Identifier: Apache-2.0
"""A run killed at any moment and started again goes on as if nothing had happened."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import TIMEOUT_S, Run, Workplace, gradalign, kill_all
from verl_gradalign.experiments.metrics_file import read_metrics

pytestmark = pytest.mark.e2e

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
}
# The moments at which each run is killed; the next one resumes. Scoring and update count calls since the start. Every
# launch costs a minute, so by default every moment is met in one schedule or two, and every schedule in one or more.
EVERYWHERE = {
    "step": ["rollout 2", "scoring 2", "update 2", "checkpoint 5"],
    "round": ["rollout 2", "scoring 1", "update 2", "checkpoint 5"],
    "staged": ["rollout 2", "scoring 1", "update 2", "checkpoint 5"],
}
KILLS = {
    "step": ["rollout 2", "update 2", "checkpoint 5"],
    "round": ["scoring 2"],
    "staged": ["rollout 2", "checkpoint 5"],
}
if os.environ.get("GRADALIGN_KILL_EVERYWHERE"):
    KILLS = EVERYWHERE
# Two processes compute the same float32 passes with rounding of their own (memory is aligned otherwise), and updates
# carry it on: measured 2e-8 of a cosine after two steps.
RTOL, ATOL_COSINE = 1e-3, 1e-4
OF_THE_MACHINE = ("seconds", "share_of_step", "/perf/", "canary")  # the canary's error is rounding
UNTIMED = ("gradalign/", "actor/", "critic/", "response_length/", "training/rollout_probs_diff_mean")


@pytest.fixture(scope="module")
def settled(workplace: Workplace) -> list[str]:
    """Overrides of a run that repeats itself: no coin flips, and sampling in float64, which rounding cannot tip."""
    rows = pq.read_table(workplace.files["pool"]).to_pylist()
    for row in rows:
        row["extra_info"]["corrupted"] = False
    path = workplace.root / "clean_pool.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(workplace.files["pool"])), path)
    return [
        f"data.train_files={path}",
        "actor_rollout_ref.rollout.dtype=float64",
        "trainer.save_freq=1",
        "trainer.max_actor_ckpt_to_keep=2",
        f"trainer.total_training_steps={NUM_STEPS}",
    ]


def start(workplace: Workplace, folder: Path, overrides: list[str], interrupt_at: str = "") -> subprocess.Popen:
    """Start (or go on with) the run of a folder."""
    marker = folder / "marker"
    marker.unlink(missing_ok=True)
    command, environment = workplace.command(folder, *overrides)
    # verl begins the file anew whenever it is started.
    launch = len(list(folder.glob("metrics-*.jsonl")))
    environment["VERL_FILE_LOGGER_PATH"] = str(folder / f"metrics-{launch}.jsonl")
    if interrupt_at:
        environment["VERL_USE_EXTERNAL_MODULES"] = "tests.e2e.interruption"
        environment["INTERRUPT_AT"] = f"{interrupt_at} {marker}"
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    with (folder / "run.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)


def kill_at_marker(process: subprocess.Popen, marker: Path) -> None:
    """Wait for the moment, then kill every process of the run."""
    deadline = time.monotonic() + TIMEOUT_S
    while not marker.exists():
        assert process.poll() is None and time.monotonic() < deadline, (marker.parent / "run.log").read_text()[-5000:]
        time.sleep(0.05)
    kill_all(process)


def finish(process: subprocess.Popen, folder: Path) -> Run:
    assert process.wait(TIMEOUT_S) == 0, (folder / "run.log").read_text(errors="replace")[-5000:]
    return Run(folder, 0, (folder / "run.log").read_text(errors="replace"))


def by_step(run: Run) -> dict[int, dict[str, float]]:
    """Metrics by step, of all launches of the run; of a step that was repeated, the last."""
    lines = [m for path in sorted(run.folder.glob("metrics-*.jsonl")) for _, m in read_metrics(path)]
    return {int(m["training/global_step"]): m for m in lines if "timing_s/step" in m}


@pytest.fixture(scope="module", params=SCHEDULES)
def pair(request: pytest.FixtureRequest, workplace: Workplace, settled: list[str]) -> tuple[str, Run, Run]:
    """The unbroken run of a schedule, and one that was killed several times, side by side."""
    schedule = request.param
    overrides = [*gradalign("cosine", workplace.files), *settled, *SCHEDULES[schedule]]
    whole, broken = (workplace.root / f"{kind}_{schedule}" for kind in ("whole", "broken"))
    for folder in (whole, broken):
        folder.mkdir()
    unbroken = start(workplace, whole, overrides)
    for moment in KILLS[schedule]:
        kill_at_marker(start(workplace, broken, overrides, moment), broken / "marker")
    resumed = finish(start(workplace, broken, overrides), broken)
    return schedule, finish(unbroken, whole), resumed


def test_the_resumed_run_selects_the_same_problems_in_the_same_order(pair: tuple[str, Run, Run]) -> None:
    _, unbroken, resumed = pair
    assert [row["step"] for row in unbroken.log] == [row["step"] for row in resumed.log]
    for ours, theirs in zip(unbroken.log, resumed.log, strict=True):
        for name, value in ours.items():
            if isinstance(value, float):
                assert theirs[name] == pytest.approx(value, rel=RTOL, abs=ATOL_COSINE), (name, ours, theirs)
            else:
                assert theirs[name] == value, (name, ours, theirs)


def test_the_resumed_runs_metrics_equal_the_unbroken_ones(pair: tuple[str, Run, Run]) -> None:
    _, unbroken, resumed = pair
    ours, theirs = by_step(unbroken), by_step(resumed)
    assert list(ours) == sorted(theirs) == list(range(1, NUM_STEPS + 1))
    for step, metrics in ours.items():
        names = [n for n in metrics if n.startswith(UNTIMED) and not any(word in n for word in OF_THE_MACHINE)]
        assert len(names) > 30
        for name in names:
            value = metrics[name]
            if math.isnan(value):
                assert math.isnan(theirs[step][name]), (step, name)
            else:
                assert theirs[step][name] == pytest.approx(value, rel=RTOL, abs=ATOL_COSINE), (step, name)


def test_what_was_trained_on_is_the_same_text(pair: tuple[str, Run, Run]) -> None:
    for step in range(1, NUM_STEPS + 1):
        texts = [sorted((r["input"], r["output"], r["score"]) for r in run.trained_rows(step)) for run in pair[1:]]
        assert texts[0] == texts[1], step


def test_every_schedule_did_what_it_is_called_for(pair: tuple[str, Run, Run]) -> None:
    schedule, unbroken, _ = pair
    scored = {row["step"] for row in unbroken.log if row["score"] is not None}
    assert scored == {"step": {1, 2, 3, 4, 5, 6}, "round": {1, 3, 5}, "staged": {2, 4, 5}}[schedule]
    if schedule == "staged":
        rows = [row for row in unbroken.log if row["reason"] in ("top", "filler")]
        released = [{row["problem_id"] for row in rows if row["step"] == step} for step in (2, 4, 5)]
        assert [len(problems) for problems in released] == [5, 5, 5] and len(set().union(*released)) == 15
    if schedule == "round":
        for first in (1, 3, 5):
            kept = {r["problem_id"] for r in unbroken.log if r["step"] == first and r["kept"]}
            later = {r["problem_id"] for r in unbroken.log if r["step"] == first + 1}
            assert len(kept) == 8 and later < kept


def test_another_configuration_or_data_file_is_refused_before_any_worker_starts(
    pair: tuple[str, Run, Run], workplace: Workplace, settled: list[str]
) -> None:
    if pair[0] != "step":
        pytest.skip("once is enough: the refusal does not look at the schedule")
    folder = pair[2].folder
    overrides = [*gradalign("cosine", workplace.files), *settled, *SCHEDULES["step"]]
    changed = ["gradalign.oversample=3", f"data.train_files={workplace.files['pool']}"]
    run = workplace.run(
        "other_configuration", *overrides, *changed, f"trainer.default_local_dir={folder}", may_fail=True
    )
    assert run.returncode != 0
    assert "gradalign.oversample was 2.0, is 3.0" in run.output and "data.train_files was" in run.output
    assert "Remedy: delete the file" in run.output and "actor and ref model engine initialized" not in run.output


def test_a_checkpoint_without_the_selections_state_starts_it_afresh_with_a_warning(
    pair: tuple[str, Run, Run], workplace: Workplace, settled: list[str]
) -> None:
    if pair[0] != "step":
        pytest.skip("once is enough: there is no state to depend on the schedule")
    folder = workplace.root / "stateless"
    shutil.copytree(pair[2].folder, folder, ignore=shutil.ignore_patterns("hydra", "rollouts", "metrics-*.jsonl"))
    for state in folder.glob("global_step_*/gradalign.npz"):
        state.unlink()
    overrides = [*gradalign("cosine", workplace.files), *settled, *SCHEDULES["step"]]
    run = finish(start(workplace, folder, [*overrides, f"trainer.total_training_steps={NUM_STEPS + 1}"]), folder)
    assert "has no selection state" in run.output and list(by_step(run)) == [NUM_STEPS + 1]
    assert by_step(run)[NUM_STEPS + 1]["gradalign/direction/age"] == 0


def test_nothing_half_written_is_left(pair: tuple[str, Run, Run]) -> None:
    folder = pair[2].folder
    assert not list(folder.rglob("*.unfinished"))
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(NUM_STEPS)
