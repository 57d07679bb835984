# SPDX-License-Identifier: Apache-2.0
"""Each data set's own columns become a question and an answer, in every format; what cannot be read is named."""

import csv
import json
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl_gradalign.data.rewards import compute_score
from verl_gradalign.data.sources import DAPO_AFTER, DAPO_BEFORE, SOURCES, ReadProblem
from verl_gradalign.data.splits import load_pool, normalise_question

AOPS = "https://artofproblemsolving.com/wiki/index.php/"
# One row in each data set's own columns, and what is read from it.
ROWS = {
    "gsm8k": (
        {"question": "How many?", "answer": "6 * 200 = <<6*200=1200>>1,200\n#### 1,200"},
        ("How many?", "1200"),
    ),
    "math": (
        {"problem": "Find $x$.", "level": "Level 5", "type": "Algebra", "solution": "So $\\boxed{\\frac{1}{2}}$."},
        ("Find $x$.", "\\frac{1}{2}"),
    ),
    "math500": (
        {
            "problem": "Convert.",
            "solution": "$\\boxed{(3, 0)}$",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        ("Convert.", "\\left( 3, \\frac{\\pi}{2} \\right)"),
    ),
    "dapo": (
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": f"{DAPO_BEFORE}In triangle $ABC$?{DAPO_AFTER}"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        },
        ("In triangle $ABC$?", "34"),
    ),
    "webinstruct": (
        {"id": 1, "question": "Which?", "answer": "$15$", "answer_type": "Integer", "category": "Physics",
         "difficulty": "University"},
        ("Which?", "15"),
    ),
    "amc22": ({"id": 0, "problem": "What is it?", "answer": 142.0, "url": f"{AOPS}2022_AMC_12A_Problems/Problem_1"},
              ("What is it?", "142")),
    "amc23": ({"question": "Cities?", "answer": "27"}, ("Cities?", "27")),
    "aime24": (
        {"id": 60, "problem": "Walk.", "solution": "s", "answer": "204", "url": f"{AOPS}2024_AIME_I", "year": "2024"},
        ("Walk.", "204"),
    ),
    "aime25": ({"problem": "Bases.", "answer": "70", "id": "0"}, ("Bases.", "70")),
    "mmlu_pro": (
        {"question_id": 70, "question": "Typical?", "options": ["Fear", "Buzz"], "answer": "B", "answer_index": 1,
         "cot_content": "", "category": "business", "src": "ori"},
        ("Typical?\nA. Fear\nB. Buzz\nAnswer with the letter of the right option.", "B"),
    ),
    "countdown": (
        {"target": 98, "nums": [44, 19, 35]},
        (
            "Using each of the numbers 19, 35, 44 exactly once, write an expression that equals 98. "
            "Use only + - * / and parentheses.",
            '{"numbers": [19, 35, 44], "target": 98}',
        ),
    ),
}  # fmt: skip
RIGHT_RESPONSES = {"gsm8k": "#### 1200", "countdown": "\\boxed{44 + 19 + 35}"}
FLAT = sorted(set(ROWS) - {"dapo", "mmlu_pro", "amc22"})  # csv has neither lists nor numbers


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n"
        path.write_text(text, encoding="utf-8")
    return path


def read(path, name="amc23", split="train", **options):
    return load_pool(SOURCES[name], split, str(path), **options)


def test_every_source_is_covered():
    assert set(ROWS) == set(SOURCES)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(name, suffix) for name in ROWS for suffix in (".jsonl", ".json", ".parquet")] + [(name, ".csv") for name in FLAT],
)
def test_a_row_of_every_source_is_read_from_every_format_and_its_answer_is_rewarded(name, suffix, tmp_path):
    row, (question, truth) = ROWS[name]
    (problem,) = read(write(tmp_path / f"in{suffix}", [row]), name).problems
    assert (problem.question, problem.truth, problem.source) == (question, truth, name)
    source = SOURCES[name]
    response = RIGHT_RESPONSES.get(name, f"\\boxed{{{truth}}}")
    assert compute_score(source.data_source, response, truth)["score"] == 1.0
    assert compute_score(source.data_source, "\\boxed{-1}", truth)["score"] == 0.0
    assert source.prompt(question).startswith(question)


def test_later_editions_of_dapo_are_read():
    plain = {"prompt": "In triangle?", "solution": "34", "reward_model": {"ground_truth": "34"}}
    without = {"prompt": "In triangle?", "answer": 34}
    for row in (plain, without):
        assert SOURCES["dapo"].read(row_of(row)) == ReadProblem("In triangle?", "34")


def row_of(values):
    from verl_gradalign.data.rows import Row

    return Row("here, line 1", values)


def test_maths_folders_of_one_object_per_file_are_read(tmp_path):
    for split, number in (("train", 1), ("train", 2), ("test", 1)):
        row = {"problem": f"{split} {number}", "solution": "\\boxed{1}", "level": "Level 1", "type": "Algebra"}
        path = tmp_path / split / "algebra" / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(row), encoding="utf-8")
    assert [p.question for p in read(tmp_path, "math", "train").problems] == ["train 1", "train 2"]
    assert [p.question for p in read(tmp_path, "math", "test").problems] == ["test 1"]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (["train.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
         "train", ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
        (["amc-train.jsonl", "amc_test.jsonl"], "train", ["amc-train.jsonl"]),
        (["trainings.jsonl", "b.jsonl"], "test", ["b.jsonl", "trainings.jsonl"]),
        (["a.jsonl", ".cache/train.jsonl", "dataset_infos.json"], "test", ["a.jsonl"]),
    ],
)  # fmt: skip
def test_a_folder_gives_the_files_of_the_split(names, split, chosen, tmp_path):
    for name in names:
        write(tmp_path / name, [{"problem": name, "answer": "1"}])
    assert [p.question for p in read(tmp_path, split=split).problems] == chosen


def test_a_year_is_kept_where_rows_tell_it(tmp_path):
    rows = [
        {"problem": f"{year} {n}", "answer": float(n), "url": f"{AOPS}{year}_AMC_12B_Problems/Problem_{n}"}
        for year in (2022, 2023)
        for n in range(1, 4 + year - 2022)
    ]
    path = write(tmp_path / "train.parquet", rows)
    pools = {name: read(path, name) for name in ("amc22", "amc23")}
    assert [len(pool.problems) for pool in pools.values()] == [3, 4]
    assert pools["amc22"].left_out["rows_of_other_years"] == 4
    with pytest.raises(ValueError, match="holds no problems of 2024 for aime24: none of its 7 rows is usable"):
        read(path, "aime24")
    with pytest.raises(ValueError, match=r"line 1 has no year in its year or url \('here'\)"):
        read(write(tmp_path / "x.jsonl", [{"problem": "p", "answer": "1", "url": "here"}]), "amc22")


def test_duplicates_are_counted_and_the_first_stays(tmp_path):
    questions = ["What is  $x+1$?", "what is \\(x + 1\\)?", "What is x-1?", "What is $x+1$?"]
    rows = [{"problem": question, "answer": str(n)} for n, question in enumerate(questions)]
    pool = read(write(tmp_path / "in.jsonl", rows))
    assert [problem.truth for problem in pool.problems] == ["0", "2"]
    assert pool.num_rows == 4
    assert (pool.left_out["duplicates_removed"], pool.left_out["duplicates_with_another_answer"]) == (2, 2)


def test_questions_that_differ_in_what_counts_stay_apart():
    texts = ["1 2", "12", "1+2", "1-2", "\\frac{1}{2}", "max 40 91", "max 409 1"]
    assert len({normalise_question(text) for text in texts}) == len(texts)


GOOD = b'{"problem": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("in.jsonl", GOOD + b"{", "in.jsonl, line 2 is not JSON .*mend it"),
        ("in.jsonl", GOOD + b"7", "in.jsonl, line 2 is not a JSON object"),
        ("in.jsonl", GOOD + b'{"problem": "p"}', "line 2 lacks a column 'solution' .columns: problem.; rename"),
        ("in.jsonl", GOOD + b'{"problem": "p", "answer": " "}', "in.jsonl, line 2 has an empty 'answer'; fill it in"),
        ("in.jsonl", GOOD + b'{"problem": "p", "answer": null}', "line 2 has an empty 'answer'"),
        ("in.jsonl", GOOD + b'{"problem": "p", "answer": []}', "line 2 has 'answer' of type list; give text"),
        ("in.jsonl", GOOD + b'{"problem": "p", "solution": "1"}', "line 2 has no answer in .*add a column answer"),
        ("in.jsonl", GOOD + '{"problem": "é"}'.encode("latin-1"), "in.jsonl, line 2 is not UTF-8 .*save the file as"),
        ("in.jsonl", GOOD.decode().encode("utf-16"), "in.jsonl, line 1 is not UTF-8"),
        ("in.jsonl", b"", "holds no problems for amc23: it has no rows"),
        ("in.json", b"[" + GOOD + b", {]", "in.json is not JSON"),
        ("in.json", b"[" * 100_000, "in.json is not JSON"),
        ("in.json", b'"text"', "in.json holds neither a JSON object nor a list"),
        ("in.json", b"[" + GOOD + b", 7]", "in.json, row 2 is not a JSON object"),
        ("in.csv", "problem,answer\np,1\né,1\n".encode("latin-1"), "in.csv, line 3 is not UTF-8"),
        ("in.csv", b"problem,answer\np,1\np,1,000\n", "in.csv, row 2, has more or fewer cells .*quote cells"),
        ("in.csv", b'problem,answer\n"p,1\n', "in.csv, near line 1, is not CSV .*mend the line"),
        ("in.parquet", GOOD, "in.parquet, after row 0, is not a readable parquet file .*download it again"),
        ("in.txt", GOOD, "in.txt ends in '.txt'; give a file in one of the formats .jsonl"),
    ],
)  # fmt: skip
def test_unusable_files_are_refused_with_file_row_and_remedy(name, contents, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_parquet_file_broken_in_the_middle_is_refused(tmp_path):
    path = write(tmp_path / "in.parquet", [{"problem": f"{n} " * 50, "answer": "1"} for n in range(2000)])
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a readable parquet file"):
        read(path)


def test_a_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf\n" + GOOD + b"\n")
    assert len(read(tmp_path / "in.jsonl").problems) == 1


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b'{"problem": "q", "answer": ""}\n' * 7)
    pool = read(path, skip_bad_rows=True)
    assert (len(pool.problems), pool.left_out["bad_rows_skipped"], len(pool.first_reasons)) == (1, 7, 5)
    assert "line 2 has an empty 'answer'" in pool.first_reasons[0]


def test_places_that_hold_nothing_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .jsonl, .json, .parquet, .csv file"):
        read(tmp_path / "empty")
    write(tmp_path / "split/train.jsonl", [{"problem": "p", "answer": "1"}])
    with pytest.raises(ValueError, match="has files of train but none of test; give the file of test itself"):
        read(tmp_path / "split", split="test")
    with pytest.raises(ValueError, match="is no file, folder or hub id"):
        read(tmp_path / "nowhere")


def test_the_hub_is_asked_with_the_sources_config_and_its_failure_explained(monkeypatch):
    calls = []

    class Table(list):
        _fingerprint = "abc"

    def load_dataset(hub_id, config, split):
        calls.append((hub_id, config, split))
        if hub_id == "no/where":
            raise ConnectionError("unreachable")
        return Table([ROWS["gsm8k"][0]])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    pool = load_pool(SOURCES["gsm8k"], "test")
    assert pool.files == {"openai/gsm8k": "abc"}
    assert pool.problems[0].place == "openai/gsm8k (test), row 1"
    load_pool(SOURCES["gsm8k"], "train", "someone/gsm8k")
    assert calls == [("openai/gsm8k", "main", "test"), ("someone/gsm8k", None, "train")]
    with pytest.raises(ValueError, match="no/where is not here, .*ConnectionError: unreachable.*--from NAME=FOLDER"):
        load_pool(SOURCES["gsm8k"], "train", "no/where")


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("mmlu_pro", {"question": "q", "options": "A", "answer": "A"}, "has no list of 2 to 26 options"),
        ("mmlu_pro", {"question": "q", "options": ["x", "y"], "answer": "C"}, "not the letter of an option"),
        ("countdown", {"nums": [1, 2]}, "lacks a column 'target'"),
        ("countdown", {"nums": "some", "target": 3}, "is not a Countdown problem"),
        ("dapo", {"prompt": [{"role": "system", "content": "s"}], "answer": "1"}, "has an empty 'prompt'"),
        ("dapo", {"prompt": "p", "reward_model": {"style": "rule"}}, "lacks a column 'ground_truth'"),
        ("gsm8k", {"question": "q", "answer": "12"}, 'no answer after "####"; end the answer'),
    ],
)
def test_rows_that_a_source_cannot_read_are_named(name, row, message):
    with pytest.raises(ValueError, match=f"here, line 1 .*{message}"):
        SOURCES[name].read(row_of(row))
