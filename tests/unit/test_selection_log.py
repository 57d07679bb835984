# SPDX-License-Identifier: Apache-2.0
"""The selection log: what is written is what is read, also while a run goes on."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_gradalign.report.selection_log import SCHEMA, SelectionLog, read_selection_log


def row(step, problem_id, **changes):
    values = {
        "step": step,
        "problem_id": problem_id,
        "data_source": "tasks/sums",
        "score": 0.25,
        "dot": -1.5,
        "norm": 6.0,
        "dot_error": 0.5,
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
