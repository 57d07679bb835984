# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: its log, its metrics in every logger, and the report that is made of them."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.e2e.runs import Run, Workplace
from tests.wandb_files import history
from verl_gradalign.experiments.metrics_file import read_metrics
from verl_gradalign.log.parts import parts_of
from verl_gradalign.log.selection_log import METADATA_KEY
from verl_gradalign.metrics import PREFIX, metric_of

pytestmark = pytest.mark.e2e

STEPS = range(1, 7)
# Of a step of this toy, on a busy machine; the bar for real steps is 1% (tests/benchmarks/logging_cost.py).
MAX_SHARE_OF_LOGGING = 0.05


def rows_of(run: Run, table: str) -> list[dict]:
    return [row for part in parts_of(run.folder / "gradalign", table) for row in pq.read_table(part.path).to_pylist()]


def test_every_metric_of_a_run_is_in_the_catalogue(cosine_run: Run) -> None:
    for metrics in cosine_run.steps:
        own = [name.removeprefix(PREFIX) for name in metrics if name.startswith(PREFIX)]
        assert len(own) > 50
        assert [name for name in own if metric_of(name) is None] == []


def test_the_log_holds_the_metrics_that_verl_logged(cosine_run: Run) -> None:
    logged: dict[int, dict[str, float]] = {}
    for step, metrics in read_metrics(cosine_run.folder / "metrics.jsonl"):
        logged.setdefault(step, {}).update(metrics)
    kept = rows_of(cosine_run, "metrics")
    assert {row["step"] for row in kept} == {0, *STEPS}
    for row in kept:
        value = logged[row["step"]][row["name"]]
        assert (row["value"] is None and np.isnan(value)) or row["value"] == value
    assert {row["name"] for row in kept} >= {"timing_s/step", "gradalign/kept", "critic/score/mean"}


def test_tensorboard_and_wandb_hold_what_the_file_holds(cosine_run: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events_file,) = cosine_run.folder.parent.glob("tensorboard_log/**/events.*")
    events = EventAccumulator(str(events_file))
    events.Reload()
    wandb = history(cosine_run.folder.parent)
    for step, metrics in enumerate(cosine_run.steps, start=1):
        for name in (name for name in metrics if name.startswith(PREFIX) and not np.isnan(metrics[name])):
            assert wandb[step][name] == pytest.approx(metrics[name])
            (value,) = (event.value for event in events.Scalars(name) if event.step == step)
            assert value == pytest.approx(metrics[name], rel=1e-6)


def test_wandb_shows_problems_and_figures_at_the_interval(cosine_run: Run) -> None:
    wandb = history(cosine_run.folder.parent)
    assert [step for step in STEPS if "gradalign/problems/_type" in wandb[step]] == [3, 6]
    for name in ("score_against_success", "composition"):
        assert wandb[6][f"gradalign/figures/{name}/format"] == "png"


def test_columns_of_extra_info_are_in_the_log_and_in_the_composition(cosine_run: Run, workplace: Workplace) -> None:
    corrupted = workplace.corrupted()
    for row in cosine_run.log:
        assert row["extra_info.corrupted"] == str(bool(corrupted[row["problem_id"]]))
    for step, metrics in enumerate(cosine_run.steps, start=1):
        rows = [row for row in cosine_run.log if row["step"] == step]
        for group, members in (("pool", rows), ("kept", [row for row in rows if row["kept"]])):
            share = np.mean([row["extra_info.corrupted"] == "True" for row in members])
            assert metrics.get(f"gradalign/composition/corrupted/True/{group}", 0) == pytest.approx(share)


def test_texts_are_those_of_the_problems_and_of_their_responses(cosine_run: Run, workplace: Workplace) -> None:
    pool = pq.read_table(workplace.files["pool"]).to_pylist()
    samples = rows_of(cosine_run, "samples")
    assert {row["step"] for row in samples} == set(STEPS)
    for row in samples:
        problem = pool[row["problem_id"]]
        assert (row["prompt"], row["answer"]) == (
            problem["prompt"][0]["content"],
            problem["reward_model"]["ground_truth"],
        )
        # A clean problem's response is right exactly if it is rewarded: the text belongs to the reward.
        if not problem["extra_info"]["corrupted"]:
            assert row["reward"] == float(row["response"][1:] == row["answer"])


def test_costs_add_up(cosine_run: Run) -> None:
    for step, m in enumerate(cosine_run.steps, start=1):
        of = {name.removeprefix(PREFIX): value for name, value in m.items() if name.startswith(PREFIX)}
        rows = [row for row in cosine_run.log if row["step"] == step]
        candidates = sum(row["response_tokens"] * row["num_responses"] for row in rows)
        trained = sum(row["response_tokens"] * row["num_responses"] for row in rows if row["kept"])
        assert of["tokens/generated"] == pytest.approx(candidates + of["tokens/trusted"])
        assert of["tokens/trained"] == pytest.approx(trained)
        assert of["cost/unused_rollouts"] == pytest.approx(1 - of["tokens/trained"] / of["tokens/generated"])
        # verl's `gen` begins once the problems have been sent.
        assert m["timing_s/gen"] <= of["seconds/rollout"] + of["seconds/selection"] < m["timing_s/step"]
        assert 0 < of["seconds/share_of_step"] < of["cost/share_of_step"] < 1
        assert -1 <= of.get("direction/cosine_previous", 0) <= 1
    assert "gradalign/direction/cosine_previous" not in cosine_run.steps[0]
    assert all("gradalign/direction/cosine_previous" in m for m in cosine_run.steps[1:])


def test_logging_takes_little_of_a_step(cosine_run: Run) -> None:
    # Steps 4 and 1 carry the pages of step 3, and what is loaded once.
    shares = [m["gradalign/seconds/logging"] / m["timing_s/step"] for m in cosine_run.steps]
    assert np.median(shares) < MAX_SHARE_OF_LOGGING, shares


def test_parts_were_merged_while_the_run_went_on_and_say_what_run_they_are_of(cosine_run: Run) -> None:
    parts = parts_of(cosine_run.folder / "gradalign", "selection")
    assert [(part.first, part.last) for part in parts] == [(1, 4), (5, 5), (6, 6)]
    for part in parts:
        about = json.loads(pq.read_schema(part.path).metadata[METADATA_KEY])
        assert about["versions"]["verl"].startswith("0.9")
        assert about["config"]["gradalign"]["score"] == "cosine"


def test_the_report_is_made_of_what_the_run_left(cosine_run: Run, tmp_path) -> None:
    page = tmp_path / "report.html"
    command = [sys.executable, "-m", "verl_gradalign.cli", "report", str(cosine_run.folder), "--output", str(page)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout)["runs"]
    assert page.stat().st_size < 5_000_000 and "<script" not in page.read_text(encoding="utf-8")
    assert run["num_rows"] == len(cosine_run.log)
