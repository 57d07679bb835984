# SPDX-License-Identifier: Apache-2.0
"""A report is made of whatever a run left, and says what is missing of it."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.benchmarks.report_logs import LogPlan, write_log
from verl_gradalign.log.parts import parts_of
from verl_gradalign.log.selection_log import METADATA_KEY, SelectionLog, read_selection_log
from verl_gradalign.report.reader import LogReader
from verl_gradalign.report.run import find_runs, gaps_of, read_run

PLAN = LogPlan(num_steps=30, num_candidates=24, num_problems=60, steps_per_part=10, num_samples=2)


@pytest.fixture
def folder(tmp_path):
    write_log(tmp_path / "run" / "gradalign", PLAN)
    return tmp_path / "run" / "gradalign"


def read(folder):
    (run,) = find_runs([folder])
    return read_run(run)


def part(folder, table, number=0):
    return parts_of(folder, table)[number].path


def rewrite(path, change):
    table = pq.read_table(path)
    pq.write_table(change(table), path)


def test_a_whole_run_misses_nothing_and_every_row_is_counted(folder):
    run = read(folder)
    assert run.missing == []
    table = read_selection_log(folder)
    assert run.steps.num_rows == len(table) == 30 * 24
    assert run.steps.num_kept == sum(table["kept"].to_pylist())
    rates = table["success_rate"].to_numpy()
    assert run.steps.mean("success_rate", False) == pytest.approx(rates.mean())
    cosine = (table["dot"].to_numpy() / table["norm"].to_numpy())[table["kept"].to_numpy(zero_copy_only=False)]
    assert run.steps.mean("alignment", True) == pytest.approx(np.nanmean(cosine))
    reasons = {reason: count.sum() for reason, count in run.reasons.counts(False).items()}
    assert reasons == {entry["values"]: entry["counts"] for entry in table["reason"].value_counts().to_pylist()}


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other columns", "wrong type"])
def test_a_damaged_part_is_named_and_the_others_are_read(folder, damage):
    path = part(folder, "selection", 1)
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_bytes(b"<html>503</html>" * 10)
    elif damage == "other columns":
        pq.write_table(pa.table({"a": [1]}), path)
    else:
        rewrite(path, lambda t: t.set_column(t.column_names.index("kept"), "kept", pa.array(["maybe"] * len(t))))
    run = read(folder)
    assert run.steps.num_rows == 20 * 24
    assert any("1 part of the log cannot be read whole" in line and path.name in line for line in run.missing)
    assert any("Steps 11 to 20 are missing." in line for line in run.missing)


def test_flipped_bytes_inside_a_part_never_end_the_report(folder):
    path = part(folder, "selection", 1)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    for _ in range(15):
        broken = content.copy()
        for place in random.integers(4, len(content) - 8, 40):
            broken[place] ^= 0xFF
        path.write_bytes(broken)
        assert read(folder).steps.num_rows >= 20 * 24 - 1


def test_all_parts_damaged_is_still_a_report(folder):
    for path in folder.glob("*.parquet"):
        path.write_bytes(b"PAR1")
    run = read(folder)
    assert run.steps.num_rows == 0
    assert any("No row of the selection" in line for line in run.missing)


def test_what_the_run_set_aside_is_named(folder):
    path = part(folder, "selection", 0)
    path.rename(path.with_suffix(".damaged"))
    missing = read(folder).missing
    assert any("set them aside: selection-00000001-00000010.damaged" in line for line in missing)
    assert any("The log begins at step 11" in line for line in missing)


def test_lost_steps_are_named(folder):
    part(folder, "selection", 1).unlink()
    part(folder, "metrics", 2).unlink()  # the first is step 0
    missing = read(folder).missing
    assert "Steps 11 to 20 are missing." in missing
    part(folder, "metrics", 2).unlink()
    assert any(line.startswith("The metrics of steps 11 to 29 are missing") for line in read(folder).missing)


def test_gaps_are_ranges_of_absent_steps():
    assert gaps_of([1, 2, 3]) == []
    assert gaps_of([3, 4, 8]) == [(1, 2), (5, 7)]
    assert gaps_of([]) == []
    assert gaps_of([5, 7], first=5) == [(6, 6)]


def test_an_interrupted_run_says_how_far_it_came(tmp_path):
    write_log(tmp_path / "gradalign", LogPlan(num_steps=12, num_candidates=8, num_problems=20, planned_steps=50))
    assert any("12 of 50 steps" in line for line in read(tmp_path).missing)


def test_the_first_format_without_errors_and_metadata_is_read(folder):
    for table in ("samples", "metrics"):
        for found in parts_of(folder, table):
            found.path.unlink()
    old = [
        "step",
        "problem_id",
        "data_source",
        "score",
        "dot",
        "norm",
        "success_rate",
        "num_responses",
        "kept",
        "reason",
    ]
    for found in parts_of(folder, "selection"):
        rewrite(found.path, lambda t: t.select(old).replace_schema_metadata({}))
    run = read(folder)
    assert run.steps.num_rows == 30 * 24
    said = " ".join(run.missing)
    assert "no column dot_error" in said and "no column response_tokens" in said
    assert "no table of metrics" in said and "no sample texts" in said and "configuration and versions" in said
    assert run.suspects.num_measured > 0  # from the spread between steps


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: {**about, "format": 99}, "format 99, newer than"),
        (lambda about: {**about, "versions": {"verl-gradalign": "7.0"}}, "written by verl-gradalign 7.0"),
        (lambda about: {**about, "versions": "?", "config": "?"}, "written by verl-gradalign unknown"),
        (lambda about: [1, 2], "Nothing is said of the run's configuration"),
        (lambda about: None, "Nothing is said of the run's configuration"),
    ],
)
def test_other_versions_and_strange_metadata_are_said(folder, change, said):
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[METADATA_KEY])
        pq.write_table(table.replace_schema_metadata({METADATA_KEY: json.dumps(change(about))}), path)
    run = read(folder)
    assert run.steps.num_rows == 30 * 24
    assert any(said in line for line in run.missing)


def test_parts_merged_while_they_are_read_are_read_once(tmp_path):
    log = SelectionLog(tmp_path, steps_per_part=100)
    write_log(tmp_path / "other", LogPlan(num_steps=6, num_candidates=8, num_problems=20, steps_per_part=1))
    for step, found in enumerate(parts_of(tmp_path / "other", "selection"), start=1):
        rows = pq.read_table(found.path)
        log.write(step, {name: rows[name].to_pylist() for name in rows.column_names if "." not in name})
    reader = LogReader(tmp_path)
    pieces = reader.batches("selection")
    seen = next(pieces)["step"].to_pylist()
    merging = SelectionLog(tmp_path, steps_per_part=2)
    merging._tables["selection"].merge()
    assert len(parts_of(tmp_path, "selection")) == 1
    for rows in pieces:
        seen += rows["step"].to_pylist()
    assert sorted(seen) == sorted(read_selection_log(tmp_path)["step"].to_pylist())
    assert reader.warnings() == [line for line in reader.warnings() if "cannot be read" not in line]


def test_rows_without_step_or_problem_are_counted_and_left_out(folder):
    def hollow(table):
        ids = table["problem_id"].to_pylist()
        return table.set_column(1, "problem_id", pa.array([None, None, *ids[2:]], pa.int64()))

    rewrite(part(folder, "selection", 0), hollow)
    run = read(folder)
    assert run.steps.num_rows == 30 * 24 - 2
    assert "Left out: 2 rows without step, problem or name." in run.missing


def test_values_that_are_null_or_not_finite_do_no_harm(folder):
    def spoil(table):
        number = pa.array([float("inf"), float("-inf"), float("nan"), None] * (len(table) // 4), pa.float64())
        for name in ("score", "dot", "norm", "dot_error", "success_rate", "response_tokens"):
            table = table.set_column(table.column_names.index(name), name, number)
        for name in ("kept", "reason", "data_source", "num_responses", "extra_info.topic"):
            field = table.schema.field(name)
            table = table.set_column(table.column_names.index(name), name, pa.nulls(len(table), field.type))
        return table

    rewrite(part(folder, "selection", 0), spoil)
    run = read(folder)
    assert run.steps.num_rows == 30 * 24
    assert np.isfinite(run.steps.mean("alignment", False))


def test_runs_are_found_below_a_folder_but_for_earlier_ones(tmp_path):
    for place in (
        "a/x/gradalign",
        "b/x/gradalign",
        "b/x/gradalign/earlier-1",
        "c/other_log",
        "a/global_step_5/gradalign",
    ):
        write_log(tmp_path / place, LogPlan(num_steps=2, num_candidates=4, num_problems=8))
    names = {run.name: run.folder.relative_to(tmp_path).as_posix() for run in find_runs([tmp_path])}
    assert names == {"a/x": "a/x/gradalign", "b/x": "b/x/gradalign", "c/other_log": "c/other_log"}
    both = find_runs([tmp_path / "a" / "x", tmp_path / "a" / "x" / "gradalign"])
    assert [run.name for run in both] == ["x"]


def test_a_place_without_a_log_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="does not exist. Remedy"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="holds no selection log.*Remedy.*default_local_dir"):
        find_runs([tmp_path])


def test_a_column_with_very_many_values_is_counted_in_bounded_memory(folder):
    for found in parts_of(folder, "selection"):
        rewrite(
            found.path,
            lambda t: t.append_column(
                "extra_info.id", pa.array([f"{s}-{i}" for i, s in enumerate(t["step"].to_pylist())])
            ),
        )
    tally = read(folder).columns["extra_info.id"]
    assert len(tally.values) <= 251 and "(other values)" in tally.values
    assert sum(count.sum() for count in tally.counts(False).values()) == 30 * 24


def test_a_log_that_vanishes_meanwhile_is_an_empty_report(folder):
    runs = find_runs([folder])
    shutil.rmtree(folder)
    assert read_run(runs[0]).steps.num_rows == 0
