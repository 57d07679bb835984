# SPDX-License-Identifier: Apache-2.0
"""The kit for the first hour on a GPU: nothing is lost, limits hold, bad input is refused before anything runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from tests.unit import bench_parts
from verl_gradalign.bench.kit import PRELOADED, run
from verl_gradalign.bench.page import page_of
from verl_gradalign.bench.plan import USUAL_MINUTES, Plan
from verl_gradalign.bench.registry import NAMES, PARTS, Part
from verl_gradalign.cli import app
from verl_gradalign.toy.model import build_tiny_model

ROOT = Path(__file__).parents[2]
LONG_S = 60.0
INTERRUPTED = """
import sys
from pathlib import Path
from tests.unit.test_bench import kit
kit(Path(sys.argv[1]), "measures", "hangs", "fails")
"""
runner = CliRunner()


def part(name, limit_s=LONG_S):
    return Part(name, f"what {name} does", f"{bench_parts.__name__}:{name}", 1, limit_s, 1)


# These parts need none of what real ones share.
PRELOADED.clear()


def kit(output, *names, minutes=USUAL_MINUTES, limit_s=LONG_S):
    return run(Plan(output, minutes, is_dry_run=True), 2, lambda line: None, [part(name, limit_s) for name in names])


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ends(records):
    return {r["part"]: (r["status"], r.get("reason", "")) for r in records if r.get("event") == "ends"}


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_record_is_on_disk_as_soon_as_it_is_measured(tmp_path):
    result = kit(tmp_path, "looks_at_its_lines")
    seen = [record["num_lines"] for record in result.records if record.get("table") == "seen"]
    assert seen == [0, 3]  # the kit, the part that begins, and the first record
    assert lines_of(result.lines) == list(result.records)


def test_parts_that_fail_or_die_take_nothing_along(tmp_path):
    result = kit(tmp_path, "fails", "dies", "says_no", "measures")
    assert ends(result.records) == {
        "fails": ("failed", "RuntimeError: the third product was nan"),
        "dies": ("failed", "its process ended by signal 9, see its log"),
        "says_no": ("skipped", "there is no such device"),
        "measures": ("done", ""),
    }
    assert [record["value"] for record in result.records if "table" in record] == [2, 3, 1.5, None]
    log = (tmp_path / result.lines.stem / "fails.log").read_text(encoding="utf-8")
    assert "what it said before" in log and "Traceback" in log
    assert result.has_failures and not result.is_interrupted


def test_a_part_that_hangs_is_ended_at_its_limit_with_all_that_it_started(tmp_path):
    result = kit(tmp_path, "hangs", "measures", limit_s=10)
    assert ends(result.records)["hangs"] == ("stopped", "its time was over; what it had measured stays")
    (record,) = [record for record in result.records if record.get("value") == 4]
    assert not is_alive(record["mine"]) and not is_alive(record["other"])
    assert ends(result.records)["measures"] == ("done", "")
    assert not result.has_failures


def test_what_the_time_does_not_reach_is_skipped_out_of_time(tmp_path):
    result = kit(tmp_path, "hangs", "measures", minutes=0.1)
    assert ends(result.records) == {
        "hangs": ("stopped", "its time was over; what it had measured stays"),
        "measures": ("skipped", "out of time"),
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_it_has_lost_nothing(tmp_path, number):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], env=environment, cwd=tmp_path)
    deadline, started = time.monotonic() + LONG_S, []
    while not started and time.monotonic() < deadline:
        time.sleep(0.1)
        text = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.jsonl"))
        started = re.findall(r'"mine": (\d+), "other": (\d+)', text)
    process.send_signal(number)
    process.wait(LONG_S)
    (lines,), (page,) = tmp_path.glob("*.jsonl"), tmp_path.glob("*.md")
    records = lines_of(lines)
    assert [record["value"] for record in records if "table" in record] == [1.5, None, 4]
    text = page.read_text(encoding="utf-8")
    assert text == page_of(records)
    if number == signal.SIGKILL:
        assert "Not through yet: written while hangs ran, or it was killed then." in text
        for pid in map(int, started[0]):  # nobody was left to end them
            os.kill(pid, signal.SIGKILL)
    else:
        assert "**Interrupted**" in text and ends(records)["hangs"] == ("interrupted", "")
        assert "| fails | not begun |" in text
        assert not any(is_alive(int(pid)) for pid in started[0])


def test_the_page_begins_with_the_claims_and_holds_every_table(tmp_path):
    result = kit(tmp_path, "measures", "does_not_hold")
    page = result.page.read_text(encoding="utf-8")
    assert "1 hold, 1 do not, 1 are open" in page
    assert "| does_not_hold | it is six \\| or seven | **no** |" in page
    assert page.index("## Claims") < page.index("## Parts") < page.index("### numbers")
    assert "| value | holds |\n| --- | --- |\n| 1.5 | yes |\n|  | open |" in page
    assert "A dry run" in page and "say nothing of a GPU" in page
    assert result.has_failures  # a claim does not hold


def test_on_a_gpu_parts_start_anew_and_end_the_same(tmp_path):
    result = run(Plan(tmp_path), 1, lambda line: None, [part("measures"), part("dies")])
    assert ends(result.records)["measures"] == ("done", "") and ends(result.records)["dies"][0] == "failed"
    assert "A dry run" not in result.page.read_text(encoding="utf-8")


def test_files_are_named_by_their_date(tmp_path):
    result = kit(tmp_path)
    assert re.fullmatch(r"bench-\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.jsonl", result.lines.name)
    assert result.page.name == result.lines.with_suffix(".md").name


def invoke(*arguments):
    return runner.invoke(app, ["bench", *map(str, arguments)])


@pytest.fixture
def model(tmp_path):
    return build_tiny_model(tmp_path / "model", hidden_size=32, num_layers=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "quickness"], "--only quickness: unknown; known are environment, exactness, .* write for example"),
        (["--only", ","], "--only names no part. Remedy: leave it out"),
        (["--only", "model"], "--only model: .* none was given. Remedy: add --model FOLDER"),
        (["--minutes", "0"], "--minutes 0.0: must be above 0. Remedy: leave it out for 40"),
        (["--minutes", "-3"], "--minutes -3.0: must be above 0"),
        (["--minutes", "nan"], "--minutes nan: must be above 0"),
        (["--minutes", "inf"], "--minutes inf: must be above 0"),
        (["--model", "nowhere"], "--model nowhere: is no folder. Remedy: give a folder that transformers'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(tmp_path, arguments, message):
    output = tmp_path / "out"
    result = invoke("--dry-run", "--output", output, *arguments)
    assert result.exit_code == 2 and re.search(message, result.output), result.output
    assert not output.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model / "config.json").unlink(), "has no config.json"),
        (lambda model: (model / "config.json").write_text("{"), "its config.json is no JSON"),
        (lambda model: (model / "config.json").write_text("{}"), "its config.json names no model_type"),
        (lambda model: (model / "model.safetensors").unlink(), "has no weights"),
        (lambda model: [path.unlink() for path in model.glob("*token*")], "has no tokenizer"),
    ],
)
def test_a_model_folder_that_verl_could_not_load_is_refused_and_the_remedy_helps(tmp_path, model, spoil, message):
    spoil(model)
    result = invoke("--dry-run", "--model", model, "--output", tmp_path / "out")
    assert result.exit_code == 2 and f"--model {model}: {message}" in result.output, result.output
    assert not (tmp_path / "out").exists()
    Plan(tmp_path / "out", model=build_tiny_model(model, hidden_size=32, num_layers=1))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("--dry-run", "--output", tmp_path / "file")
    assert result.exit_code == 2 and f"--output {tmp_path / 'file'}: is a file. Remedy: give a folder" in result.output
    result = invoke("--dry-run", "--output", tmp_path / "file" / "out")
    assert result.exit_code == 2 and "cannot be written (Not a directory). Remedy: give a folder" in result.output
    result = invoke("--dry-run", "--output", "/proc/bench")
    assert result.exit_code == 2 and "cannot be written" in result.output


def test_without_an_accelerator_the_dry_run_is_offered(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    result = invoke("--output", tmp_path)
    assert result.exit_code == 2 and "sees no accelerator here" in result.output and "add --dry-run" in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_time_is_said_before_it_starts_and_what_cannot_run(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("verl_gradalign.bench.kit.run", lambda *_: told.append("ran") or sys.exit(0))
    result = invoke("--dry-run", "--output", tmp_path)
    assert re.search(r"12 parts on a CPU, at tiny shapes, about \d min .*, 40 at most", result.output)
    assert "will be skipped: model (no --model FOLDER was given)" in result.output and told == ["ran"]


def test_every_part_is_there_and_all_fit_the_usual_time():
    assert len(set(NAMES)) == len(NAMES)
    for each in PARTS:
        module, _, name = each.function.partition(":")
        assert callable(getattr(import_module(module), name)), each.name
        assert 0 < each.expected_s < each.limit_s
    assert sum(each.expected_s for each in PARTS) <= 60 * USUAL_MINUTES


def test_more_time_is_shared_out_and_less_takes_nothing_from_the_first(tmp_path):
    exactness = PARTS[1]
    assert Plan(tmp_path, 80).limit_s(exactness) == 2 * exactness.limit_s
    assert Plan(tmp_path, 10).limit_s(exactness) == exactness.limit_s


def test_a_part_without_its_packages_is_skipped_by_name(tmp_path):
    needy = Part(
        "needy", "nothing", "nowhere:run", 1, 2, 1, packages=("torch", "not_there"), gpu_packages=("nor_this",)
    )
    assert needy.missing(True, False) == "not installed: not_there"
    assert needy.missing(False, False) == "not installed: not_there, nor_this"
    assert Plan(tmp_path, is_dry_run=True).missing(PARTS[0]) is None
