# SPDX-License-Identifier: Apache-2.0
"""The selection log: what is written is what is read, also while a run goes on."""

import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.log.parts import parts_of
from verl_gradalign.log.selection_log import (
    FORMAT,
    METADATA_KEY,
    SAMPLES,
    SCHEMA,
    SelectionLog,
    read_selection_log,
)
from verl_gradalign.report.findings import summary_of
from verl_gradalign.report.html import write_report
from verl_gradalign.report.run import find_runs, read_run


def row(step, problem_id, **changes):
    values = {
        "step": step,
        "problem_id": problem_id,
        "data_source": "tasks/sums",
        "score": 0.25,
        "dot": -1.5,
        "norm": 6.0,
        "dot_error": 0.5,
        "error_freedom": 7.0,
        "success_rate": 0.5,
        "num_responses": 8,
        "response_tokens": 12.5,
        "kept": True,
        "reason": "top",
    }
    return values | changes


def columns(rows):
    return {name: [row[name] for row in rows] for name in SCHEMA.names}


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        row(1, 3),
        row(1, 4, score=None, dot=None, norm=None, success_rate=None, num_responses=0, kept=False, reason="failed"),
        row(1, 5, score=float("inf"), kept=False, reason="non_finite"),
    ]
    SelectionLog(tmp_path / "new" / "folder").write(1, columns(rows))
    table = read_selection_log(tmp_path / "new" / "folder")
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == rows


def test_steps_are_read_in_ascending_order_whatever_their_order_of_writing(tmp_path):
    log = SelectionLog(tmp_path)
    for step in (10, 2, 100_000, 1):
        log.write(step, columns([row(step, 0), row(step, 1)]))
    assert read_selection_log(str(tmp_path)).column("step").to_pylist() == [1, 1, 2, 2, 10, 10, 100_000, 100_000]


def test_a_repeated_step_replaces_its_part(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(1, columns([row(1, 0), row(1, 1)]))
    log.write(2, columns([row(2, 0)]))
    log.write(1, columns([row(1, 7)]))
    assert read_selection_log(tmp_path).column("problem_id").to_pylist() == [7, 0]


def test_a_step_without_candidates_leaves_the_log_readable(tmp_path):
    SelectionLog(tmp_path).write(1, columns([]))
    table = read_selection_log(tmp_path)
    assert table.num_rows == 0 and table.schema.equals(SCHEMA)


def test_a_part_that_was_never_finished_is_ignored(tmp_path):
    log = SelectionLog(tmp_path)
    part = log.write(1, columns([row(1, 0)]))
    part.with_name("selection-00000002.unfinished").write_bytes(b"PAR1 cut off here")
    assert read_selection_log(tmp_path).column("step").to_pylist() == [1]


def test_an_unfinished_part_is_overwritten_when_its_step_is_repeated(tmp_path):
    log = SelectionLog(tmp_path)
    (tmp_path / "selection-00000001.unfinished").write_bytes(b"PAR1 cut off here")
    log.write(1, columns([row(1, 0)]))
    assert [path.name for path in tmp_path.iterdir()] == ["selection-00000001.parquet"]


def test_the_log_can_be_read_while_a_step_is_being_written(tmp_path, monkeypatch):
    log = SelectionLog(tmp_path)
    log.write(1, columns([row(1, 0)]))
    seen = []
    write_table = pq.write_table

    def write_and_look(table, where):
        with pq.ParquetWriter(where, table.schema) as writer:
            writer.write_table(table)  # the file exists and has no footer yet
            seen.append(read_selection_log(tmp_path).column("step").to_pylist())
        write_table(table, where)
        seen.append(read_selection_log(tmp_path).column("step").to_pylist())

    monkeypatch.setattr(pq, "write_table", write_and_look)
    log.write(2, columns([row(2, 0)]))
    assert seen == [[1], [1]]
    assert read_selection_log(tmp_path).column("step").to_pylist() == [1, 2]


def test_a_failed_write_leaves_the_part_of_that_step_as_it_was(tmp_path):
    log = SelectionLog(tmp_path)
    log.write(1, columns([row(1, 0)]))
    with pytest.raises(pa.ArrowInvalid):
        log.write(1, columns([row(1, "not a number")]))
    assert read_selection_log(tmp_path).to_pylist() == [row(1, 0)]


@pytest.mark.parametrize("make_folder", [True, False])
def test_a_folder_without_a_log_is_named_in_the_error(tmp_path, make_folder):
    folder = tmp_path / "gradalign"
    if make_folder:
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match="no selection log in .*gradalign"):
        read_selection_log(folder)


def steps_of(folder):
    return read_selection_log(folder)["step"].to_pylist()


def write_steps(log, first, last):
    for step in range(first, last + 1):
        log.write_metrics(step, {"gradalign/kept": step, "timing_s/step": 2.0})
        log.write_samples(step, {name: [] for name in SAMPLES.names})
        log.write(step, columns([row(step, 10 * step), row(step, 10 * step + 1)]))


def names(folder, table):
    return [part.path.name for part in parts_of(folder, table)]


def test_parts_are_merged_and_nothing_of_them_is_lost(tmp_path):
    write_steps(SelectionLog(tmp_path, steps_per_part=3), 1, 8)
    assert names(tmp_path, "selection") == [
        "selection-00000001-00000003.parquet",
        "selection-00000004-00000006.parquet",
        "selection-00000007.parquet",
        "selection-00000008.parquet",
    ]
    assert steps_of(tmp_path) == [step for step in range(1, 9) for _ in range(2)]
    assert read_selection_log(tmp_path)["problem_id"].to_pylist()[:4] == [10, 11, 20, 21]
    assert len(names(tmp_path, "metrics")) == len(names(tmp_path, "samples")) == 4


def test_members_that_a_killed_merge_left_behind_are_not_read_twice(tmp_path):
    log = SelectionLog(tmp_path, steps_per_part=3)
    write_steps(log, 1, 2)
    left_behind = (tmp_path / "selection-00000002.parquet").read_bytes()
    write_steps(log, 3, 3)
    (tmp_path / "selection-00000002.parquet").write_bytes(left_behind)
    assert steps_of(tmp_path) == [1, 1, 2, 2, 3, 3]
    log.begin(2)
    assert steps_of(tmp_path) == [1, 1, 2, 2]


@given(
    steps_per_part=st.integers(2, 5),
    history=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=40)
def test_a_resumed_log_has_neither_gaps_nor_duplicates(steps_per_part, history):
    """Runs some steps, goes back to an earlier checkpoint, runs on, and so forth."""
    with tempfile.TemporaryDirectory() as folder:
        reached = 0
        for num_steps, back in history:
            start = max(1, reached - back) if reached else 0
            log = SelectionLog(folder, steps_per_part=steps_per_part)
            if start:
                log.begin(start)
            write_steps(log, start + 1, start + num_steps)
            reached = start + num_steps
            assert steps_of(folder) == [step for step in range(1, reached + 1) for _ in range(2)]


def test_a_run_that_was_not_resumed_sets_the_earlier_log_aside(tmp_path, caplog):
    write_steps(SelectionLog(tmp_path), 1, 3)
    log = SelectionLog(tmp_path)
    log.begin(0)
    write_steps(log, 1, 1)
    assert steps_of(tmp_path) == [1, 1]
    assert steps_of(tmp_path / "earlier-1") == [1, 1, 2, 2, 3, 3]
    assert "earlier run" in caplog.text


def test_the_log_stays_within_its_size_and_loses_the_oldest_steps_first(tmp_path, caplog):
    limit = 60_000
    log = SelectionLog(tmp_path, steps_per_part=4, max_bytes=limit)
    for step in range(1, 60):
        write_steps(log, step, step)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    kept = sorted(set(steps_of(tmp_path)))
    assert kept == list(range(kept[0], 60)) and 1 < kept[0] < 56
    assert "gradalign.log.max_gb" in caplog.text


def test_every_file_says_what_run_it_is_of(tmp_path):
    about = {"versions": {"verl": "0.9.1"}, "config": {"trainer": {"total_epochs": 3}}}
    write_steps(SelectionLog(tmp_path, about=about, steps_per_part=2), 1, 3)
    for path in tmp_path.iterdir():
        assert json.loads(pq.read_schema(path).metadata[METADATA_KEY]) == {"format": FORMAT, **about}


def test_columns_of_extra_info_are_text_columns(tmp_path):
    log = SelectionLog(tmp_path, columns=("level",))
    log.write(1, columns([row(1, 0)]) | {"extra_info.level": ["hard"]})
    SelectionLog(tmp_path).write(2, columns([row(2, 0)]))
    assert read_selection_log(tmp_path)["extra_info.level"].to_pylist() == ["hard", None]


def test_a_log_of_the_first_format_is_read_and_gone_on_with(tmp_path):
    old = pa.schema([field for field in SCHEMA if field.name not in ("dot_error", "error_freedom", "response_tokens")])
    table = pa.Table.from_pylist([{k: v for k, v in row(1, 0).items() if k in old.names}], schema=old)
    pq.write_table(table, tmp_path / "selection-00000001.parquet")
    log = SelectionLog(tmp_path, steps_per_part=2)
    log.begin(1)
    write_steps(log, 2, 2)
    assert names(tmp_path, "selection") == ["selection-00000001-00000002.parquet"]
    assert read_selection_log(tmp_path)["dot_error"].to_pylist() == [None, 0.5, 0.5]


def test_a_damaged_part_does_not_stop_the_run(tmp_path, caplog):
    log = SelectionLog(tmp_path, steps_per_part=3)
    write_steps(log, 1, 2)
    part = tmp_path / "selection-00000002.parquet"
    part.write_bytes(part.read_bytes()[:100])
    write_steps(log, 3, 3)
    assert steps_of(tmp_path) == [1, 1, 3, 3]
    assert "cannot be read" in caplog.text and part.with_suffix(".damaged").exists()


def test_a_log_that_an_earlier_version_wrote_is_read_and_reported(tmp_path):
    """Of three steps, by commit 6f7c359."""
    folder = Path(__file__).parent / "files" / "written_by_6f7c359" / "gradalign"
    table = read_selection_log(folder)
    assert sorted(set(table["step"].to_pylist())) == [1, 2, 3]
    assert sum(table["kept"].to_pylist()) > 3 and set(table["extra_info.corrupted"].to_pylist()) == {"True", "False"}
    assert all(name in table.column_names for name in ("problem_id", "score", "dot", "norm", "success_rate", "reason"))
    (run,) = [read_run(found) for found in find_runs([folder])]
    assert summary_of(run)["num_rows"] == table.num_rows and run.key("gradalign.score", None) == "random"
    samples = pq.read_table(folder / "samples-00000001.parquet").to_pylist()
    assert len(samples) == 6 and all(row["prompt"] and row["answer"] for row in samples)
    logged = {row["name"]: row["value"] for row in pq.read_table(folder / "metrics-00000001.parquet").to_pylist()}
    assert logged["gradalign/kept"] == 4.0 and run.metrics.steps == {1, 2, 3}
    page = write_report([run], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
