# SPDX-License-Identifier: Apache-2.0
"""The check that a reward function grades its rows: each kind of fault is found, and rows without fault pass."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_gradalign.data.rewards import compute_score
from verl_gradalign.data.self_grading import load_reward_function, neighbours, self_graded


def row(truth, source="math_dapo", **info):
    return {"data_source": source, "reward_model": {"ground_truth": truth}, "extra_info": info}


def faults(function, *rows):
    return [(fault.position, fault.message) for fault in self_graded(rows, function)]


def equals(data_source, solution_str, ground_truth, extra_info=None, **more):
    return float(solution_str == str(ground_truth))


@pytest.mark.parametrize(
    ("truth", "source"),
    [
        ("34", "math_dapo"),
        ("\\frac{3}{4}", "math_dapo"),
        ("2\\sqrt{3}", "HuggingFaceH4/MATH-500"),
        ("B", "TIGER-Lab/MMLU-Pro"),
        ("yes", "TIGER-Lab/WebInstruct-verified"),
        ("\\infty", "math_dapo"),
        ("0/5", "math_dapo"),
        ("1200", "openai/gsm8k"),
        ("baed", "gradalign/tasks/reversal"),
        ('{"numbers": [3, 5, 7], "target": 26}', "countdown"),
    ],
)
def test_a_row_that_is_graded_has_no_fault_whatever_its_answers_form(truth, source):
    assert faults(compute_score, row(truth, source)) == []


def test_a_corrupted_rows_coin_is_not_what_is_tried():
    rows = [row("34", corrupted=True, index=n) for n in range(20)]
    assert faults(compute_score, *rows) == []


def test_rows_are_told_by_their_position_and_numbers_and_lists_are_truths_too():
    rows = [row(7), row(np.int64(7)), row(["7", "seven"]), row(None), row({"unit": "test"}), {"data_source": "x"}]
    found = faults(lambda data_source, solution_str, ground_truth, **more: float("7" in solution_str), *rows)
    assert [position for position, _ in found] == [3, 4, 5]
    assert all("has a truth that no right answer was found for" in message for _, message in found)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda **call: 0.0, "has the truth '7', which scores 0 as "),
        (lambda **call: 1.0, "pays an empty answer: '' scores 1 for the truth '7'"),
        (lambda **call: float("boxed{7}" in call["solution_str"]) * 0.5, "which scores 0.5 as '\\\\boxed{7}'"),
        (lambda **call: float(any(map(str.isdigit, call["solution_str"]))), "pays a wrong answer: '\\\\boxed{8}'"),
        (lambda **call: math.nan, "has a reward that is no finite number: nan"),
        (lambda **call: None, "has a reward that is no finite number: None"),
        (lambda **call: (1.0, "right"), "has a reward that is no finite number: (1.0, 'right')"),
        (lambda **call: "1.0", "has a reward that is no finite number: '1.0'"),
        (lambda **call: {"reward": 1.0}, "has a reward that is no finite number: {'reward': 1.0}"),
        (lambda **call: 1 / 0, "has a reward that raises ZeroDivisionError"),
    ],
)
def test_a_reward_function_that_does_not_grade_is_described(function, message):
    ((position, found),) = faults(function, row("7"))
    assert position == 0 and message in found


def test_being_right_is_read_from_acc_where_scores_have_other_units():
    def minus_one_to_one(**call):
        is_right = call["solution_str"] == "\\boxed{7}"
        return {"score": 1.0 if is_right else -1.0, "acc": is_right, "pred": "7"}

    assert faults(minus_one_to_one, row("7")) == []
    assert faults(lambda **call: np.float32(equals(**call)), row("7")) == []


@pytest.mark.parametrize(("asked", "is_fault"), [("Answer within \\boxed{}.", True), ("How many?", False)])
def test_a_prompt_that_asks_for_a_form_is_graded_in_it(asked, is_fault):
    broken = row("\\frac{1}{2") | {"prompt": [{"role": "user", "content": asked}]}
    assert bool(faults(compute_score, broken)) == is_fault


def test_a_coroutine_function_is_awaited():
    async def score(data_source, solution_str, ground_truth, extra_info):
        return equals(data_source, solution_str, ground_truth)

    assert faults(score, row("7")) == []


@given(st.text(min_size=1, max_size=12) | st.integers().map(str) | st.sampled_from(["A", "Z", "yes", "False", "x+y"]))
def test_neighbours_are_other_texts(answer):
    assert neighbours(answer) and answer not in neighbours(answer)[:1]


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**6), max_value=10**6))
def test_the_neighbour_of_a_number_is_another_number(number):
    (near,) = neighbours(str(number))
    assert float(near) != float(number)


def test_a_function_is_loaded_from_a_file_or_a_module(tmp_path):
    (tmp_path / "mine.py").write_text("def compute_score(**call):\n    return 1.0\n\nlimit = 3\n", encoding="utf-8")
    assert load_reward_function(f"{tmp_path}/mine.py")() == 1.0
    assert load_reward_function("pkg://verl_gradalign.data.rewards:compute_score") is compute_score
    with pytest.raises(ValueError, match="is no function but of type int"):
        load_reward_function(f"{tmp_path}/mine.py:limit")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_reward_function(f"{tmp_path}/none.py")
