# SPDX-License-Identifier: Apache-2.0
"""A folder in which the files that the documentation speaks of are there."""

import json
import re
import shutil
import sys

import pyarrow.parquet as pq
import pytest

from tests.benchmarks.report_logs import LogPlan, write_log
from tests.docs.documents import ROOT, commands_of, documentation, python_blocks
from tests.unit.test_prepare_sources import ROWS
from verl_gradalign.data.sources import SOURCES
from verl_gradalign.data.tasks import write_task_files
from verl_gradalign.toy.model import build_tiny_model

LOG = LogPlan(num_steps=12, num_candidates=16, num_problems=40, num_samples=2)
# A step of the documentation's schedules draws at most as many candidates.
NUM_PROBLEMS = 2000
NUM_ROWS_OF_A_SOURCE = 40
STAND_IN = f"""#!{sys.executable} -SE
import json, os, sys
with open(os.environ["ARGUMENTS"], "w") as file:
    json.dump(sys.argv[1:], file)
"""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """Data in verl's schema under the documentation's names, logs of runs, published data sets, files of examples."""
    folder = tmp_path_factory.mktemp("docs")
    files = write_task_files(folder, num_pool=NUM_PROBLEMS, num_trusted=24, num_test=24)
    files["pool"].rename(folder / "train.parquet")
    trusted = pq.read_table(files["trusted"])
    for name, rows in (("amc", trusted.slice(0, 12)), ("code", trusted.slice(12))):
        pq.write_table(rows, folder / f"{name}.parquet")
    for place in _data_spoken_of():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "train.parquet", folder / place)
    for place in _logs_spoken_of():
        write_log(folder / place, LOG)
    build_tiny_model(folder / "tiny")
    for name in SOURCES:
        _write_source(folder / "sources" / name, name)
    (folder / "my_scores.py").write_text(_block("own_score.md", "def promising"), encoding="utf-8")
    (folder / "my_rules.py").write_text(_block("layer_rule.md", "@register_layer_rule"), encoding="utf-8")
    python = folder / "python"
    python.write_text(STAND_IN, encoding="utf-8")
    python.chmod(0o755)
    return folder


@pytest.fixture
def place(workplace, monkeypatch):
    """The same, as the current directory."""
    monkeypatch.chdir(workplace)
    return workplace


def _logs_spoken_of():
    """Return the folders of logs that are reported on or read, as the documentation writes them."""
    texts = [page.read_text(encoding="utf-8") for page in documentation()]
    read = {name for text in texts for name in re.findall(r'read_selection_log\("([^"]+)"\)', text)}
    commands = [c.text for page in documentation() for c in commands_of(page) if not c.is_inline]
    reported = {
        f"{word}/gradalign"
        for text in commands
        if text.startswith("verl-gradalign report")
        for word in text.split()[2:]
        if "/" in word and not word.startswith("-") and not word.endswith((".html", ".json"))
    }
    return read | reported


def _data_spoken_of():
    """Return the data files that Python blocks read."""
    texts = [block for page in documentation() for block in python_blocks(page)]
    return {name for text in texts for name in re.findall(r'"([^"]+/[^"/]+\.parquet)"', text)}


def _write_source(folder, name):
    """Write rows in a published data set's own columns, each with a question of its own."""
    row, (question, _) = ROWS[name]
    rows = []
    for number in range(NUM_ROWS_OF_A_SOURCE):
        if name == "countdown":
            rows.append(json.dumps({**row, "target": 10 + number}))
            continue
        start = json.dumps(question.split("\n")[0])[1:-1]
        rows.append(json.dumps(row).replace(start, f"{name} {number}: {start}"))
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        marked = [text.replace(f"{name} ", f"{name} {split} ") for text in rows]
        path.write_text("\n".join(marked) + "\n", encoding="utf-8")


def _block(page, words):
    (block,) = [text for text in python_blocks(ROOT / "recipes/how_to" / page) if words in text]
    return block
