# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign report`: a file, whole or not at all, and the same numbers for machines."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.benchmarks.report_logs import LogPlan, write_log
from verl_gradalign.cli import app
from verl_gradalign.log.parts import parts_of
from verl_gradalign.report import html
from verl_gradalign.report.problem_texts import problem_texts
from verl_gradalign.report.run import find_runs, read_run

runner = CliRunner()
PLAN = LogPlan(num_steps=15, num_candidates=40, num_problems=80, mislabelled=0.2, num_samples=12)


def report(*arguments):
    return runner.invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def run_dir(tmp_path):
    write_log(tmp_path / "run" / "gradalign", PLAN)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder, what the command printed, and the page."""
    folder = tmp_path_factory.mktemp("made")
    write_log(folder / "gradalign", PLAN)
    result = report(folder, "--json", "--top", 3)
    assert result.exit_code == 0, result.output
    return folder, result, (folder / "report.html").read_text(encoding="utf-8")


def test_one_file_is_written_where_it_is_asked_for(run_dir, tmp_path):
    result = report(run_dir, "--output", tmp_path / "new" / "place.html")
    assert result.exit_code == 0 and "place.html (" in result.output.replace("\n", "")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["place.html"]
    assert [path.name for path in run_dir.iterdir()] == ["gradalign"]


def test_a_folder_as_output_is_refused_with_the_file_to_name(run_dir, tmp_path):
    result = report(run_dir, "--output", tmp_path)
    said = result.output.replace("\n", "")
    assert result.exit_code == 2 and f"--output {tmp_path}: is a folder. Remedy: name a file in it" in said
    assert not list(tmp_path.glob("*unfinished*"))


def test_the_file_needs_nothing_from_outside(made):
    _, _, page = made
    assert page.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in page and "<script" not in page
    for address in re.findall(r"""(?:src|href)="([^"]*)""", page) + re.findall(r"url\(([^)]*)", page):
        assert address.startswith(("data:", "#")), address
    assert not re.search(r"""\son\w+\s*=""", page)


def test_json_has_the_numbers_and_nothing_else_on_stdout(made):
    folder, result, _ = made
    values = json.loads(result.stdout)
    (run,) = values["runs"]
    assert values["bytes"] == (folder / "report.html").stat().st_size
    assert run["num_rows"] == 15 * 40 and run["verdict"] in ("good", "watch", "problem")
    suspects = run["suspicious"]
    assert len(suspects["problems"]) == suspects["num_suspicious"] > 3
    assert {"problem_id", "kind", "alignment", "standard_error", "low", "high"} <= set(suspects["problems"][0])
    assert suspects["problems"][0]["distance"] <= suspects["problems"][-1]["distance"]
    assert "NaN" not in result.stdout


def test_the_page_shows_prompt_answer_and_responses_of_the_worst(made):
    folder, _, page = made
    worst = read_run(find_runs([folder])[0]).suspects.table["problem_id"][0].as_py()
    assert page.count("<details>") == 3
    assert f"Problem {worst}: what is {worst} + {worst}?" in page
    assert f"which makes {2 * worst}." in page and f"which makes {2 * worst + 1}." in page
    assert "<h4>Prompt</h4>" in page
    assert "reward 1" in page and "reward 0" in page and "Look before you delete" in page


def test_a_run_of_another_schedule_has_no_section_on_forecasts(made):
    folder, result, page = made
    assert "forecast" not in page and json.loads(result.stdout)["runs"][0]["forecast"] is None


def test_of_many_runs_the_first_are_shown_in_full_and_all_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "MAX_RUNS_IN_FULL", 2)
    for number in range(4):
        write_log(tmp_path / f"run{number}" / "gradalign", LogPlan(num_steps=3, num_candidates=8, num_problems=9))
    assert report(tmp_path).exit_code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<article class="run"') == 2 and "Comparison of 4 runs" in page
    assert "run3" in page and "The first 2 runs are shown in full" in page


@pytest.mark.parametrize("exists", [True, False])
def test_a_place_without_a_log_is_one_message_and_exit_code_2(tmp_path, exists):
    place = tmp_path / "place"
    if exists:
        place.mkdir()
    result = report(place)
    assert result.exit_code == 2 and "Remedy" in result.output and "Traceback" not in result.output
    assert not (place / "report.html").exists()


def test_a_report_that_fails_leaves_the_old_file_and_no_other(run_dir, monkeypatch):
    (run_dir / "report.html").write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    assert report(run_dir).exit_code == 2
    assert (run_dir / "report.html").read_text() == "old"
    assert sorted(path.name for path in run_dir.iterdir()) == ["gradalign", "report.html"]


def test_help_has_an_example():
    assert "verl-gradalign report checkpoints" in report("--help").output


def test_texts_of_all_languages_at_full_length_stay_below_five_megabytes(tmp_path):
    plan = LogPlan(num_steps=6, num_candidates=80, num_problems=80, mislabelled=0.9, num_samples=80,
                   prompt="\U0001f600" * 100_000 + "{id}", response="\u4f60" * 100_000 + "{id}{sum}")  # fmt: skip
    write_log(tmp_path / "gradalign", plan)
    assert report(tmp_path, "--top", 60).exit_code == 0
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert "of 100," in (tmp_path / "report.html").read_text(encoding="utf-8")  # cut, and says so


def test_without_samples_prompts_are_read_from_the_train_files(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {i}?"}], "reward_model": {"ground_truth": f"A{i}"}}
        for i in range(5)
    ]
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows[3:])), encoding="utf-8")
    write_log(tmp_path / "gradalign", PLAN)
    for part in parts_of(tmp_path / "gradalign", "samples"):
        part.path.unlink()
    run = read_run(find_runs([tmp_path])[0])
    about = {"config": {"data": {"train_files": [str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")]}}}
    texts = problem_texts(run.reader, about, [1, 4, 77])
    assert (texts[1].prompt, texts[1].answer) == ("Question 1?", "A1")
    assert (texts[4].prompt, texts[4].answer) == ("Question 4?", "A4")
    assert texts[77].prompt is None
    assert texts[4].origin == str(tmp_path / "b.jsonl")


def test_a_problem_without_any_text_says_where_to_look(run_dir):
    for part in parts_of(run_dir / "gradalign", "samples"):
        part.path.unlink()
    report(run_dir)
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "The text is not in the log" in page and "There are no sample texts" in page
