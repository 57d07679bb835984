# SPDX-License-Identifier: Apache-2.0
"""Countdown: problems are distinct and solvable, and only expressions that keep the rules are right."""

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.data.countdown import (
    CountdownProblem,
    compute_expression,
    draw_countdown_problems,
    is_right_countdown_answer,
)

TRUTH = CountdownProblem((3, 5, 7), 26).truth  # 3 * 7 + 5


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_every_problem_is_solved_by_its_own_solution(seed):
    problems = draw_countdown_problems(30, seed)
    for problem in problems:
        assert is_right_countdown_answer(f"\\boxed{{{problem.solution}}}", problem.truth)
        assert 3 <= len(problem.numbers) <= 4 and 10 <= problem.target <= 100
        assert list(problem.numbers) == sorted(problem.numbers)
        assert not is_right_countdown_answer(f"\\boxed{{{problem.solution}}}", _other_target(problem))
    assert len({(problem.numbers, problem.target) for problem in problems}) == len(problems)


def _other_target(problem: CountdownProblem) -> str:
    return CountdownProblem(problem.numbers, problem.target + 1).truth


def test_a_longer_list_begins_with_the_shorter_one():
    assert draw_countdown_problems(50, seed=3)[:20] == draw_countdown_problems(20, seed=3)
    assert draw_countdown_problems(20, seed=3) != draw_countdown_problems(20, seed=4)
    with pytest.raises(ValueError, match="num=-1"):
        draw_countdown_problems(-1, seed=0)


@pytest.mark.parametrize(
    ("response", "is_right"),
    [
        (r"\boxed{3*7+5}", True),
        (r"\boxed{5 + 7 \times 3}", True),
        (r"\boxed{(3 \cdot 7) + 5}", True),
        (r"\boxed{\left(3 \times 7\right) + 5 = 26}", True),
        (r"\boxed{5 - -3 * 7}", True),
        (r"first \boxed{3+5+7}, no: \boxed{3*7+5}", True),
        (r"first \boxed{3*7+5}, no: \boxed{3+5+7}", False),
        (r"\boxed{3*7+5 = 27}", False),
        (r"\boxed{3*7+5 = 26 = 26}", False),
        (r"\boxed{26}", False),
        (r"\boxed{21+5}", False),
        (r"\boxed{3*7+5+3-3}", False),
        (r"\boxed{3*7+5*1}", False),
        (r"3*7+5", False),
        (r"\boxed{}", False),
        ("", False),
    ],
)
def test_the_last_boxed_expression_uses_each_number_once_and_hits_the_target(response, is_right):
    assert is_right_countdown_answer(response, TRUTH) is is_right


def test_division_is_exact():
    assert compute_expression(r"\frac{1}{3} + 1/6") == (Fraction(1, 2), [1, 3, 1, 6])
    assert compute_expression(r"\dfrac{\frac{8}{2}}{3-1}") == (Fraction(2), [8, 2, 3, 1])
    assert is_right_countdown_answer(r"\boxed{8/(3-8/3)}", CountdownProblem((3, 3, 8, 8), 24).truth)


@pytest.mark.parametrize(
    "expression",
    [
        "1/0",
        "1/(2-2)",
        "9**9**9",
        "9//2",
        "9%2",
        "9^2",
        "1.5+1",
        "1_0+1",
        "007",
        "3(4)",
        "3 4",
        "x+1",
        "__import__('os').getcwd()",
        "(" * 99 + "1" + ")" * 99,
        "-" * 199 + "1" + "0",
        "(" * 150,
        "9" * 201,
        "*".join(["9"] * 150),
        "+",
        "",
        "1+\n1;2",
    ],
)
def test_other_expressions_have_no_value_and_cost_nothing(expression):
    start = time.monotonic()
    computed = compute_expression(expression)
    assert computed is None or expression.startswith("(((")  # deep but lawful parentheses may be read
    assert time.monotonic() - start < 0.5


@given(st.text("0123456789+-*/(). \\{}abc_", max_size=60))
def test_no_text_makes_the_check_fail(text):
    is_right_countdown_answer(f"\\boxed{{{text}}}", TRUTH)
    compute_expression(text)


@pytest.mark.parametrize("truth", ["26", "{}", "[]", '{"numbers": 3, "target": 26}', "x"])
def test_a_malformed_truth_is_rejected(truth):
    with pytest.raises(ValueError, match="prepare the data again"):
        is_right_countdown_answer(r"\boxed{1}", truth)
