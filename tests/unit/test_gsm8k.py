# SPDX-License-Identifier: Apache-2.0
"""GSM8K's JSON lines become verl's rows, and malformed lines are named."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from verl_gradalign.data.prepare import write_gsm8k
from verl_gradalign.data.rewards import compute_score
from verl_gradalign.data.schema import SCHEMA
from verl_gradalign.data.sources import INSTRUCTIONS

GSM8K_FOLDER = Path(__file__).parents[2].parent / "shared/data/gsm8k"
NUM_ROWS = {"train": 7473, "test": 1319}


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines: str) -> Path:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def make_line(number: str) -> str:
    return json.dumps({"question": f"What is {number}?", "answer": f"It is {number}.\n#### {number}"})


def test_rows_hold_question_ground_truth_and_index(jsonl, tmp_path):
    path = write_gsm8k(jsonl(make_line("1,200"), "", make_line("-3")), tmp_path / "out/train.parquet", "train")
    assert pq.read_schema(path).equals(SCHEMA)
    first, second = pq.read_table(path).to_pylist()
    assert first == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"What is 1,200? {INSTRUCTIONS['last_number']}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1200"},
        "extra_info": {"index": 0, "split": "train", "family": "gsm8k", "corrupted": False},
    }
    assert second["reward_model"]["ground_truth"] == "-3"
    assert second["extra_info"]["index"] == 1


def test_max_rows_keeps_the_first_rows(jsonl, tmp_path):
    path = write_gsm8k(jsonl(*map(make_line, "12345")), tmp_path / "out.parquet", "test", max_rows=2)
    answers = [row["reward_model"]["ground_truth"] for row in pq.read_table(path).to_pylist()]
    assert answers == ["1", "2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON .*download the file again"),
        ("[1]", "is not a JSON object; write one object"),
        ('{"question": "q"}', "lacks a column 'answer' .*give the data set"),
        ('{"question": "q", "answer": ""}', "has an empty 'answer'; fill it in"),
        ('{"question": "q", "answer": 7}', "no answer after .*end the answer with"),
        ('{"question": "q", "answer": ["7"]}', "of type list; give text or a number"),
        ('{"question": "q", "answer": "seven"}', "no answer after .*end the answer with"),
        ('{"question": "q", "answer": "seven ####"}', "no answer after .*end the answer with"),
    ],
)
def test_a_malformed_line_is_named_with_its_remedy(jsonl, tmp_path, line, message):
    with pytest.raises(ValueError, match=f"in.jsonl, line 2 .*{message}"):
        write_gsm8k(jsonl(make_line("1"), line), tmp_path / "out.parquet", "train")
    assert not (tmp_path / "out.parquet").exists()


def test_an_empty_file_is_rejected(jsonl, tmp_path):
    with pytest.raises(ValueError, match="holds no problems"):
        write_gsm8k(jsonl(""), tmp_path / "out.parquet", "train")


def test_max_rows_below_one_is_rejected(jsonl, tmp_path):
    with pytest.raises(ValueError, match="max_rows=0"):
        write_gsm8k(jsonl(make_line("1")), tmp_path / "out.parquet", "train", max_rows=0)


@pytest.mark.skipif(not GSM8K_FOLDER.is_dir(), reason=f"GSM8K's files are not at {GSM8K_FOLDER}")
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_problem_of_gsm8k_has_an_answer_that_its_own_solution_earns(split, tmp_path):
    source = GSM8K_FOLDER / f"{split}.jsonl"
    rows = pq.read_table(write_gsm8k(source, tmp_path / "out.parquet", split)).to_pylist()
    assert len(rows) == NUM_ROWS[split]
    with source.open(encoding="utf-8") as lines:
        solutions = [json.loads(line)["answer"] for line in lines]
    for row, solution in zip(rows, solutions, strict=True):
        assert compute_score(row["data_source"], solution, row["reward_model"]["ground_truth"])["score"] == 1.0
