# SPDX-License-Identifier: Apache-2.0
"""Values of rows are repaired and counted by name, or refused with file and row; whatever is kept is graded right.

A longer fuzz: FUZZ_EXAMPLES=20000 pytest tests/unit/test_prepare_values.py -k whatever
"""

import json
import os
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from verl_gradalign.cli import app
from verl_gradalign.data.prepare import PreparationPlan, prepare
from verl_gradalign.data.rewards import compute_score
from verl_gradalign.data.sources import SOURCES
from verl_gradalign.data.splits import load_pool
from verl_gradalign.data.values import REPAIRS, as_answer, as_text

ASKED = {"role": "user", "content": "How many legs have 3 spiders?"}
SCENE = {"role": "system", "content": "Answer briefly."}
EARLIER = [{"role": "user", "content": "How many has one?"}, {"role": "assistant", "content": "8"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(path, name="amc23", **options):
    """The rows of a train file prepared from a file of one source, and the manifest's entry for that source."""
    output = path.parent / "out"
    manifest = prepare(PreparationPlan((name,), origins={name: str(path)}, **options), output)
    return pq.read_table(output / "train.parquet").to_pylist(), manifest["sources"][0]


def refusal(path, name="amc23"):
    with pytest.raises(ValueError) as refused:
        prepared(path, name)
    assert not (path.parent / "out").exists()
    return str(refused.value)


def answered(answer):
    return {"problem": "What is it?", "answer": answer}


@pytest.mark.parametrize(
    ("answer", "truth", "repair"),
    [
        (26, "26", "numbers_written_as_text"),
        (26.0, "26", "numbers_written_as_text"),
        (17.50, "17.5", "numbers_written_as_text"),
        (-0.0, "0", "numbers_written_as_text"),
        (1e23, "100000000000000000000000", "numbers_written_as_text"),
        (True, "True", "booleans_written_as_text"),
        (False, "False", "booleans_written_as_text"),
        ("False", "False", None),
        ("yes", "yes", None),
        ("$9$", "9", "dollar_signs_removed"),
        ("350\\$", "350", "dollar_signs_removed"),
        ("\\$350", "\\$350", None),
        ("$\\boxed{9}$", "9", "boxes_removed"),
        ("so $x = \\boxed{9}$.", "9", "boxes_removed"),
        ("\u200b9\ufeff", "9", "invisible_characters_removed"),
        ("9\x00", "9", "invisible_characters_removed"),
        ("3/4", "3/4", None),
        ("[1, 2)", "[1, 2)", None),
        ("\\infty", "\\infty", None),
        ("\\text{None}", "\\text{None}", None),
    ],
)
def test_an_answer_is_repaired_and_the_repair_counted(answer, truth, repair, tmp_path):
    rows, pool = prepared(write(tmp_path / "in.jsonl", answered(answer)))
    assert [row["reward_model"]["ground_truth"] for row in rows] == [truth]
    assert repair is None or pool["repaired"][repair] == 1
    assert set(pool["repaired"]) <= set(REPAIRS) and (repair is not None or pool["repaired"] == {})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (float("nan"), "has an empty 'answer' (nan)"),
        (None, "has an empty 'answer'"),
        ("NaN", "has an empty 'answer' ('NaN', as a missing value is written)"),
        ("null", "has an empty 'answer'"),
        ("None", "has an empty 'answer'"),
        ("\t", "has an empty 'answer'"),
        ("$$", "has an empty 'answer' ('$$' says nothing)"),
        ("\\$", "has an empty 'answer'"),
        ("\\boxed{}", "has an empty 'answer'"),
        ("\\boxed{\\,}", "has an empty 'answer'"),
        ("$nan$", "has an empty 'answer' ('$nan$' says that it is missing)"),
        ("...", "has an empty 'answer'"),
        (float("inf"), "has an infinite 'answer' (inf)"),
        (["9"], "has 'answer' of type list; give text or a number, one to a problem"),
        (["9", "nine"], "of type list"),
        ({"value": 9}, "of type dict"),
        ('["9", "nine"]', "a list or an object as text"),
        ("['9']", "a list or an object as text"),
        ("3 * 3 = 9\n#### 9", "a whole solution or several answers"),
        ("\\boxed{8} or \\boxed{9}", "a whole solution or several answers"),
        ("\\frac{1}{2", "has the truth '\\\\frac{1}{2', which scores 0 as '\\\\boxed{\\\\frac{1}{2}'; mend the answer"),
        ("9 \ud83d", "has an unpaired surrogate '\\ud83d' as character 3 of 'answer'"),
    ],
)
def test_an_answer_that_cannot_be_graded_is_refused_with_its_place_or_left_out_and_counted(answer, message, tmp_path):
    path = write(tmp_path / "in.jsonl", answered("26") | {"problem": "Another?"}, answered(answer))
    refused = refusal(path)
    assert refused.startswith(f"{path}, line 2 has ") and message in refused
    refused.encode("utf-8")  # can be printed
    assert refused.endswith("or leave such rows out with --skip-bad-rows")
    rows, pool = prepared(path, skip_bad_rows=True)
    assert len(rows) == 1 and pool["bad_rows_skipped"] + pool["ungraded_problems_skipped"] == 1
    assert message in pool["first_reasons"][0]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16(), pa.decimal128(9, 3), pa.float64()])
def test_numbers_of_every_precision_are_the_ones_that_were_written(kind, tmp_path):
    column = (
        pa.array([Decimal("12.300")], kind) if pa.types.is_decimal(kind) else pa.array([np.float64(12.3)]).cast(kind)
    )
    table = pa.table({"problem": ["What is it?"], "answer": column, "seen": pa.array([[{"x": 1.5}]])})
    pq.write_table(table, tmp_path / "in.parquet")
    rows, _ = prepared(tmp_path / "in.parquet")
    assert rows[0]["reward_model"]["ground_truth"] == "12.3"


def test_digits_beyond_binary_fractions_are_kept(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"problem": "What?", "answer": 12345678901234567.25}\n', encoding="utf-8")
    rows, _ = prepared(tmp_path / "in.jsonl")
    assert rows[0]["reward_model"]["ground_truth"] == "12345678901234567.25"


def test_numpy_values_and_bytes_are_read():
    assert as_text(np.int64(7), "answer")[0] == as_text(b"7", "answer")[0] == "7"
    assert as_answer(np.bool_(False), "answer")[0] == "False"
    with pytest.raises(ValueError, match="bytes that are not UTF-8"):
        as_text(b"\xff", "answer")


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"problem": "What?", "answer": "1", "answer": "2"}', encoding="utf-8")
    assert "line 1 is not JSON (the key 'answer' is there twice)" in refusal(tmp_path / "in.jsonl")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("#### 1,5", "where a comma separates no thousands"),
        ("#### 12 apples or 13", "has several numbers as its answer ('12 apples or 13')"),
        ("#### $", "has an empty 'answer'"),
        ("#### nan", "has an empty 'answer'"),
    ],
)
def test_an_answer_of_gsm8k_is_one_number(answer, message, tmp_path):
    assert message in refusal(write(tmp_path / "in.jsonl", {"question": "How many?", "answer": answer}), "gsm8k")


@pytest.mark.parametrize(
    ("prompt", "before", "repairs"),
    [
        ("How many legs have 3 spiders?", [], []),
        ([ASKED], [], []),
        ([SCENE, ASKED], [SCENE], ["system_turns_kept"]),
        ([*EARLIER, ASKED], EARLIER, ["prompts_of_several_turns_kept_whole"]),
        ([SCENE, *EARLIER, ASKED], [SCENE, *EARLIER], ["system_turns_kept", "prompts_of_several_turns_kept_whole"]),
        (json.dumps([*EARLIER, ASKED]), EARLIER, ["json_text_read", "prompts_of_several_turns_kept_whole"]),
        (str([SCENE, ASKED]), [SCENE], ["json_text_read", "system_turns_kept"]),
        ([{"role": "user", "content": [{"type": "text", "text": ASKED["content"]}]}], [], ["text_parts_joined"]),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_prompt_is_kept_whole_and_its_last_turn_is_what_is_asked(prompt, before, repairs, suffix, tmp_path):
    row = {"prompt": prompt, "reward_model": {"ground_truth": "24"}}
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "in.parquet")
    else:
        write(tmp_path / "in.jsonl", row)
    rows, pool = prepared(tmp_path / f"in.{suffix}", "dapo")
    *context, last = rows[0]["prompt"]
    assert context == before and pool["repaired"] == dict.fromkeys(repairs, 1)
    assert last == {"role": "user", "content": SOURCES["dapo"].prompt(ASKED["content"])}


def test_the_same_question_in_another_conversation_is_another_problem(tmp_path):
    other = [{"role": "user", "content": "How many has an ant?"}, {"role": "assistant", "content": "6"}]
    path = write(
        tmp_path / "in.jsonl",
        *({"prompt": [*turns, ASKED], "answer": truth} for turns, truth in ((EARLIER, "24"), (other, "18"))),
    )
    rows, pool = prepared(path, "dapo")
    assert len(rows) == 2 and pool["duplicates_removed"] == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([ASKED, EARLIER[1]], "ends with a message of the assistant"),
        ([SCENE], "has an empty 'prompt': none of its 1 messages is the user's"),
        ([], "has an empty 'prompt'"),
        (None, "has an empty 'prompt'"),
        (True, "has 'prompt' of type bool"),
        ([{"role": "user", "content": None}], "has an empty 'prompt.content'"),
        ([{"from": "human", "value": "How many?"}], "with from, value; write each message as an object with role"),
        ([{"role": "User", "content": "How many?"}], "a message of role 'User'; use one of system"),
        ([ASKED | {"tool_calls": [{"name": "add"}]}], "a message with tool_calls, which would be lost"),
        (["How many?"], "a message that is str"),
        ('[{"role": "user", "content": "How', "looks like a chat and is no list of messages in JSON"),
        ([{"role": "user", "content": "half a sign: \udc00"}], "has an unpaired surrogate '\\udc00' as character 14"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}],
            "of type image.*verl-gradalign hold-out",
        ),
    ],
)
def test_a_prompt_that_is_no_question_is_refused(prompt, message, tmp_path):
    refused = refusal(write(tmp_path / "in.jsonl", {"prompt": prompt, "answer": "24"}), "dapo")
    assert refused.startswith(f"{tmp_path}/in.jsonl, line 1 has ")
    assert message in refused or re.search(message, refused)


def test_what_is_shown_besides_text_is_not_dropped(tmp_path):
    row = {"problem": "How wide is it?", "answer": "3", "images": [{"path": "a.png"}]}
    assert "asks about what is in its column 'images'" in refusal(write(tmp_path / "in.jsonl", row))
    rows, _ = prepared(write(tmp_path / "in.jsonl", row | {"images": []}))
    assert len(rows) == 1


def test_a_reward_model_may_be_json_text_and_must_be_an_object(tmp_path):
    row = {"prompt": "How many?", "reward_model": json.dumps({"ground_truth": 24}), "answer": "25"}
    rows, pool = prepared(write(tmp_path / "in.jsonl", row), "dapo")
    assert rows[0]["reward_model"]["ground_truth"] == "24" and pool["repaired"]["json_text_read"] == 1
    other = tmp_path / "other"
    other.mkdir()
    assert "'reward_model' of type str" in refusal(write(other / "in.jsonl", row | {"reward_model": "rule"}), "dapo")


def test_countdown_takes_whole_numbers_and_solvable_targets_only(tmp_path):
    for row, message in [
        ({"nums": [2.5, 4], "target": 10}, "is not a Countdown problem"),
        ({"nums": [1, 2], "target": 50}, "a truth that no right answer was found for"),
    ]:
        assert message in refusal(write(tmp_path / "in.jsonl", row), "countdown")


def test_one_that_is_not_graded_is_replaced_by_the_next_in_the_same_order(tmp_path):
    good = [{"problem": f"What is {n}?", "answer": str(n)} for n in range(40)]
    bad = [row | {"answer": "\\frac{1}{"} if n % 4 == 0 else row for n, row in enumerate(good)]
    for name, rows in (("good", good), ("bad", bad)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "in.jsonl", *rows)
    questions = {}
    for name in ("good", "bad"):
        path = tmp_path / name / "in.jsonl"
        plan = PreparationPlan(("amc23:20",), origins={"amc23": str(path)}, skip_bad_rows=True)
        manifest = prepare(plan, path.parent / "out")
        rows = pq.read_table(path.parent / "out/train.parquet").to_pylist()
        questions[name] = {row["prompt"][0]["content"] for row in rows}
    assert len(questions["bad"]) == 20
    ungraded = {SOURCES["amc23"].prompt(f"What is {n}?") for n in range(0, 40, 4)}
    assert questions["good"] - ungraded <= questions["bad"] and not questions["bad"] & ungraded
    assert 0 < manifest["sources"][0]["ungraded_problems_skipped"] <= 10


def test_a_reward_function_of_ones_own_decides(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(data_source, solution_str, ground_truth, extra_info=None, **more):\n"
        "    return float(solution_str.endswith('{%s}' % ground_truth) and ground_truth.isdigit())\n",
        encoding="utf-8",
    )
    path = write(tmp_path / "in.jsonl", answered("9"), answered("3/4") | {"problem": "And this?"})
    with pytest.raises(ValueError, match=r"line 2 has the truth '3/4', which scores 0"):
        prepared(path, reward=f"{tmp_path}/mine.py:score")
    assert len(prepared(path)[0]) == 2
    with pytest.raises(ValueError, match="--reward .*cannot be loaded .*write FILE.py:FUNCTION"):
        prepare(PreparationPlan(("amc23",), reward=f"{tmp_path}/mine.py:other"), tmp_path / "other")


def test_the_command_prints_every_count(tmp_path):
    from typer.testing import CliRunner

    path = write(tmp_path / "in.jsonl", answered(9), answered(9), answered(8), answered("$") | {"problem": "New?"})
    done = CliRunner().invoke(
        app,
        ["prepare", "--train", "amc23", "--from", f"amc23={path}", "--skip-bad-rows", "--output", f"{tmp_path}/out"],
    )
    assert done.exit_code == 0, done.output
    printed = dict(re.findall(r"│ (\w+) +│ +(\d+) │$", done.output, re.MULTILINE))
    assert printed == {
        "duplicates_removed": "2",
        "duplicates_with_another_answer": "1",
        "bad_rows_skipped": "1",
        "numbers_written_as_text": "3",
    }


NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
MARKS = [
    *("$", "\\$", "\\boxed{", "}", "{", "####", "nan", "None", "\\frac", "1", "02", ",", ".", "-", "\u2212", "[", "]"),
    *('"', "'", "\\text{", " ", "\n", "\u200b", "\ud800", "x", "A", "yes", "%", "^", "\\,", "role", "content"),
]
texts = st.lists(st.sampled_from(MARKS), max_size=7).map("".join) | st.text(max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=2) | st.dictionaries(texts, v, max_size=2), max_leaves=3)
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": values})
prompts = values | st.lists(turns, min_size=1, max_size=3)


@settings(deadline=None, max_examples=NUM_EXAMPLES)
@example("dapo", [{"\ud800": None}], None, False)
@example("dapo", [{"role": "user", "content": "1 + 1?", "\ud800": "x"}], "2", False)
@given(st.sampled_from(["amc23", "gsm8k", "dapo", "webinstruct"]), prompts, values, st.booleans())
def test_whatever_stands_in_a_row_it_is_refused_by_place_or_graded_by_its_own_truth(
    tmp_path_factory, name, question, answer, is_marked
):
    answer = f"#### {answer}" if name == "gsm8k" and is_marked and isinstance(answer, str) else answer
    row = {"prompt": question, "reward_model": {"ground_truth": answer}}
    row = row if name == "dapo" else {"problem": question, "question": question, "answer": answer}
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    write(path, row)
    try:
        (problem,) = load_pool(SOURCES[name], "train", str(path)).problems
        prepared = prepare_one(path, name)
    except ValueError as refused:
        assert str(refused).startswith(f"{path}, line 1 "), refused
        str(refused).encode("utf-8")
        return
    truth, source = problem.truth, SOURCES[name]
    score = lambda response: compute_score(source.data_source, response, truth)["score"]  # noqa: E731
    assert score(source.answer_form.format(truth)) == 1.0
    assert score("") == score(source.answer_form.format("")) == score(source.answer_form.format("65537")) == 0.0
    assert truth.casefold() not in ("nan", "none", "null", "") and problem.question.strip("\u200b \n")
    assert prepared["prompt"][-1]["content"] == source.prompt(problem.question)
    if isinstance(question, str) and name != "dapo":
        assert problem.question in question
    if isinstance(question, list):
        assert len(prepared["prompt"]) == len(question)


def prepare_one(path, name):
    """The row that is made of a file of one."""
    output = path.parent / "fuzzed"
    for old in output.glob("*"):
        old.unlink()
    prepare(PreparationPlan((name,), origins={name: str(path)}), output)
    (row,) = pq.read_table(output / "train.parquet").to_pylist()
    return row
