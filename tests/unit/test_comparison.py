# SPDX-License-Identifier: Apache-2.0
"""Summaries of runs, against a run folder whose numbers are known."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.test_selection_log import columns, row
from verl_gradalign.experiments.metrics_file import RunSummary, held_out_accuracy, read_metrics, summarise_run
from verl_gradalign.log.selection_log import SelectionLog

POOL_CORRUPTED = [True, False, True, False]


def log_row(step, problem_id, kept):
    return row(step, problem_id, kept=kept, reason="top" if kept else "low_score")


def training(step_s, share, **more):
    return {"timing_s/step": step_s, "gradalign/seconds/share_of_step": share} | more


@pytest.fixture
def pool(tmp_path):
    path = tmp_path / "pool.parquet"
    pq.write_table(pa.table({"extra_info": [{"corrupted": flag} for flag in POOL_CORRUPTED]}), path)
    return path


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        (0, {"val-core/a/acc/mean@4": 0.1, "val-core/b/acc/mean@4": 0.3, "val-aux/a/reward/mean@4": 9.0}),
        (1, training(100.0, 0.9)),  # the first step warms up and is left out of the times
        (2, training(4.0, 0.2)),
        (3, training(6.0, 0.4)),
        (3, {"val-core/a/acc/mean@4": 0.5, "val-core/b/acc/mean@4": 0.7}),  # verl logs a step in several lines
        (4, training(5.0, 0.3)),
    ]
    text = "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    log = SelectionLog(folder / "gradalign")
    log.write(1, columns([log_row(1, 0, True), log_row(1, 1, True), log_row(1, 2, False), log_row(1, 3, True)]))
    log.write(2, columns([log_row(2, 0, False), log_row(2, 2, False), log_row(2, 2, False), log_row(2, 1, True)]))
    return folder


def test_the_summary_has_the_known_answers(run_dir, pool):
    summary = summarise_run(run_dir, pool)
    assert summary == RunSummary(
        num_steps=4,
        accuracy_before=pytest.approx(0.2),
        accuracy_after=pytest.approx(0.6),
        corrupted_pool=pytest.approx(5 / 8),
        corrupted_trained=pytest.approx(1 / 4),
        step_s=5.0,
        selection_share=pytest.approx(0.3),
    )


def test_a_cut_last_line_is_tolerated(run_dir, pool):
    whole = summarise_run(run_dir, pool)
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text(metrics.read_text(encoding="utf-8") + '{"step": 5, "data": {"timing_s/st', encoding="utf-8")
    assert summarise_run(str(run_dir), str(pool)) == whole
    assert [step for step, _ in read_metrics(metrics)] == [0, 1, 2, 3, 3, 4]


def test_a_last_line_cut_inside_a_character_is_tolerated(run_dir, pool):
    whole = summarise_run(run_dir, pool)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 5, "data": {"val-core/\u00e4'.encode()[:-1])
    assert summarise_run(run_dir, pool) == whole


def test_a_run_of_one_step_is_timed_by_that_step(run_dir, pool):
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 1, "data": training(3.0, 0.5)}), encoding="utf-8")
    summary = summarise_run(run_dir, pool)
    assert (summary.num_steps, summary.step_s, summary.selection_share) == (1, 3.0, 0.5)
    assert summary.accuracy_before is None and summary.accuracy_after is None


def test_accuracy_is_none_without_validation():
    assert held_out_accuracy(training(1.0, 0.1)) is None


@pytest.mark.parametrize("missing", ["metrics.jsonl", "gradalign"])
def test_a_run_without_metrics_or_log_is_an_error(run_dir, pool, missing):
    (run_dir / missing).rename(run_dir / "elsewhere")
    with pytest.raises(FileNotFoundError):
        summarise_run(run_dir, pool)
