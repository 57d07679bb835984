# SPDX-License-Identifier: Apache-2.0
"""The command line: light to import, thin, and clear where input is refused."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from verl_gradalign.cli import app
from verl_gradalign.data.prepare import REGIMES

runner = CliRunner()
SHOW_HELP = (
    "import sys\n"
    "from verl_gradalign.cli import app\n"
    "app(['--help'], standalone_mode=False)\n"
    "heavy = {'torch', 'verl', 'ray', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\n"
    "sys.exit(f'imported {heavy}' if heavy else 0)\n"
)


@pytest.fixture
def gsm8k(tmp_path):
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split, num in (("train", 12), ("test", 4)):
        lines = [
            json.dumps({"question": f"{split}: {i} apples?", "answer": f"#### {i}"}, ensure_ascii=False)
            for i in range(num)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def name_of(info):
    return info.name or info.callback.__name__.replace("_", "-")


def prepare(*arguments):
    return runner.invoke(app, ["prepare", *map(str, arguments)])


def test_help_imports_nothing_heavy():
    assert find_spec("torch") and find_spec("verl")  # they could have been imported
    done = subprocess.run([sys.executable, "-c", SHOW_HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prepare" in done.stdout


def test_waiting_openmp_threads_sleep_unless_the_environment_says_otherwise(monkeypatch):
    show = "import os, verl_gradalign.cli; print(os.environ['OMP_WAIT_POLICY'])"
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert subprocess.check_output([sys.executable, "-c", show], text=True).strip() == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert subprocess.check_output([sys.executable, "-c", show], text=True).strip() == "ACTIVE"


def test_prepare_writes_the_files_and_prints_what_is_in_them(gsm8k, tmp_path):
    result = prepare("--train", "gsm8k", "--trusted", "gsm8k:3", "--test", "gsm8k", "--from", f"gsm8k={gsm8k}",
                     "--corrupted-share", "0.5", "--output", tmp_path / "out")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "train.parquet",
        "trusted.parquet",
        "test.parquet",
        "manifest.json",
    }
    rows = pq.read_table(tmp_path / "out/train.parquet").to_pylist()
    assert len(rows) == 9 and sum(row["extra_info"]["corrupted"] for row in rows) == 4
    assert "trusted" in result.output and "held out" in result.output


def test_a_regime_is_its_arguments_and_options_replace_its_parts(gsm8k, tmp_path, monkeypatch):
    plans = []

    def note(plan, output):
        plans.append(plan)
        raise ValueError("enough")

    monkeypatch.setattr("verl_gradalign.data.prepare.prepare", note)
    for name, regime in REGIMES.items():
        prepare("--regime", name, "--output", tmp_path / "out")
        assert (plans[-1].train, plans[-1].trusted, plans[-1].test) == (regime.train, regime.trusted, regime.test)
        assert plans[-1].corrupted_share == regime.corrupted_share
        assert plans[-1].requests()
    prepare("--regime", "unreliable", "--test", "math500", "--corrupted-share", "0", "--output", tmp_path / "out")
    assert (plans[-1].train, plans[-1].test, plans[-1].corrupted_share) == (("dapo:17000",), ("math500",), 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--regime", "other"], "--regime other is unknown; use one of unreliable"),
        (["--train", "gsm8k", "--from", "gsm8k"], "is not NAME=ORIGIN"),
        (["--train", "gsm8k", "--from", "gsm8k=nowhere.jsonl"], "is no file, folder or hub id"),
        ([], "--train gsm8k"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, arguments, message):
    result = prepare(*arguments, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_file_row_is_named_whole_in_the_message(gsm8k, tmp_path):
    with (gsm8k / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n{")
    result = prepare("--train", "gsm8k", "--from", f"gsm8k={gsm8k}", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{gsm8k}/train.jsonl, line 13 is not JSON" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", sorted(map(name_of, app.registered_commands)))
def test_every_commands_help_has_examples_and_exit_codes(command):
    shown = runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert "Examples:" in shown and "Exit code" in shown
    assert shown.count(f"verl-gradalign {command}") >= 2
