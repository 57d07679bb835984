# SPDX-License-Identifier: Apache-2.0
"""A run that ended or was killed at any moment, and is started again, continues as if nothing had happened."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.e2e.runs import Run
from tests.e2e.series_runs import NUM_STEPS, SCHEDULES
from verl_gradalign.experiments.metrics_file import read_metrics

pytestmark = pytest.mark.e2e

# Two processes compute the same float32 passes with rounding of their own (memory is aligned otherwise), and updates
# carry it on: measured 2e-8 of a cosine after two steps.
RTOL, ATOL_COSINE = 1e-3, 1e-4
OF_THE_MACHINE = ("seconds", "share_of_step", "/perf/", "canary")  # the canary's error is rounding
# A direction that is made anew in every step is not saved, so after a resume there is none to compare the first with.
OF_AN_UNSAVED_DIRECTION = "gradalign/direction/cosine_previous"
SAVES_ITS_DIRECTION = ("step", "forecast")
UNTIMED = ("gradalign/", "actor/", "critic/", "response_length/", "training/rollout_probs_diff_mean")


def launches_of(folder: Path) -> list[dict[int, dict[str, float]]]:
    """Metrics by step, of each launch of a run."""
    launches = sorted(folder.parent.glob(f"{folder.name}@[0-9]*"))
    files = [path / "metrics.jsonl" if path.is_dir() else path for path in launches] or [folder / "metrics.jsonl"]
    lines = [[m for _, m in read_metrics(path) if "timing_s/step" in m] for path in files if path.exists()]
    return [{int(m["training/global_step"]): m for m in of_launch} for of_launch in lines]


def by_step(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics by step; of a step that was repeated, the last."""
    return {step: m for launch in launches_of(folder) for step, m in launch.items()}


def first_refreshes(folder: Path, unbroken: dict[int, dict[str, float]]) -> set[int]:
    """The step of each resumed launch that makes its first direction while the unbroken run has one to compare with."""
    found = (
        next((step for step in sorted(launch) if OF_AN_UNSAVED_DIRECTION in unbroken[step]), None)
        for launch in launches_of(folder)[1:]
    )
    return {step for step in found if step is not None}


# Launch and schedule. Paused: ended after so many steps, and resumed in the same processes.
CASES = [
    *(pytest.param(("series", schedule), id=f"paused {schedule}") for schedule in SCHEDULES),
    pytest.param(("killed_step", "step"), id="killed step"),
    # Every moment of every schedule: twelve kills, fifteen launches.
    *(
        pytest.param((f"killed_everywhere_{s}", s), id=f"killed everywhere {s}", marks=pytest.mark.nightly)
        for s in SCHEDULES
    ),
]


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, series: dict[str, Run]) -> tuple[str, Run, Run]:
    """The unbroken run of a schedule, and one that was interrupted several times."""
    launch, schedule = request.param
    whole = series[f"whole_{schedule}"]
    if launch == "series":
        return schedule, whole, Run(whole.folder.with_name(f"paused_{schedule}"), 0, "")
    return schedule, whole, request.getfixturevalue(launch)


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
    schedule, unbroken, resumed = pair
    ours, theirs = by_step(unbroken.folder), by_step(resumed.folder)
    assert list(ours) == sorted(theirs) == list(range(1, NUM_STEPS + 1))
    unmeasured = set() if schedule in SAVES_ITS_DIRECTION else first_refreshes(resumed.folder, ours)
    for step, metrics in ours.items():
        names = [n for n in metrics if n.startswith(UNTIMED) and not any(word in n for word in OF_THE_MACHINE)]
        assert len(names) > 30
        if step in unmeasured:
            assert OF_AN_UNSAVED_DIRECTION not in theirs[step]
            names.remove(OF_AN_UNSAVED_DIRECTION)
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
    every = {1, 2, 3, 4, 5, 6}
    assert scored == {"step": every, "round": {1, 3, 5}, "staged": {2, 4, 5}, "forecast": every}[schedule]
    if schedule == "staged":
        rows = [row for row in unbroken.log if row["reason"] in ("top", "filler")]
        released = [{row["problem_id"] for row in rows if row["step"] == step} for step in (2, 4, 5)]
        assert [len(problems) for problems in released] == [5, 5, 5] and len(set().union(*released)) == 15
    if schedule == "round":
        for first in (1, 3, 5):
            kept = {r["problem_id"] for r in unbroken.log if r["step"] == first and r["kept"]}
            later = {r["problem_id"] for r in unbroken.log if r["step"] == first + 1}
            assert len(kept) == 8 and later < kept


def test_another_configuration_or_data_file_is_refused_before_any_worker_starts(series: dict[str, Run]) -> None:
    run = series["paused_step@other"]
    assert run.returncode != 0
    assert "gradalign.oversample was 2.0, is 3.0" in run.output and "data.train_files was" in run.output
    assert "Remedy: delete the file" in run.output and "actor and ref model engine initialized" not in run.output


def test_a_checkpoint_without_the_selections_state_starts_it_afresh_with_a_warning(series: dict[str, Run]) -> None:
    run = series["stateless"]
    (metrics,) = run.steps
    assert "has no selection state" in run.output and metrics["training/global_step"] == 2
    assert metrics["gradalign/direction/age"] == 0


def test_nothing_half_written_is_left(pair: tuple[str, Run, Run]) -> None:
    folder = pair[2].folder
    assert not list(folder.rglob("*.unfinished"))
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(NUM_STEPS)
