# SPDX-License-Identifier: Apache-2.0
"""Final answers: found in nested braces, read as numbers with units, compared within bounds and in any thread."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_gradalign.data.math_answers import (
    answers_match,
    extract_final_answer,
    find_last_boxed,
    is_right_math_answer,
    parse_quantity,
)

# Comparing as text costs microseconds; computing what is compared here would take minutes, or the machine's memory.
TEXT_COMPARISON_S = 1.0

nested_braces = st.recursive(
    st.text("ab1+\\frac ", max_size=6).filter(lambda text: not text.endswith("\\")),
    lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda parts: "{" + "}{".join(parts) + "}"),
    max_leaves=12,
)


@given(nested_braces, st.text("xyz {}", max_size=10))
def test_a_box_holds_everything_up_to_its_own_closing_brace(content, after):
    boxed = find_last_boxed(f"first \\boxed{{0}}, then \\boxed{{{content}}} {after}")
    assert boxed == (content.strip() or "0")


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and \fbox{2}", "2"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed 72 apples", "72"),
        (r"\boxed{12} ... \boxed{1", "12"),  # cut off
        (r"\boxed{}", None),
        (r"\boxedx{3}", None),
        ("no box", None),
    ],
)
def test_the_last_complete_box_counts(text, boxed):
    assert find_last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"Answer: 3, no: \boxed{4}. The answer is 5", "4"),
        ("The answer is not plain.\nSo the final answer is $12$.", "12"),
        ("**Answer:** 7", "7"),
        ("Answer: $\\frac{1}{2}$\n", "\\frac{1}{2}"),
        ("and so we get 12", None),
        ("", None),
    ],
)
def test_the_final_answer_is_boxed_or_announced(response, answer):
    assert extract_final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        ("1000", "1,000", True),
        ("1 000", "1000", True),
        ("1 2", "12", False),
        (r"\$18.00", "18", True),
        ("15", "15 cm", True),
        (r"15\text{ cm}", "15 cm", True),
        ("15 km", "15 cm", False),
        ("12 apples", "12", True),
        ("15x", "15", False),
        (r"90^\circ", "90 degrees", True),
        ("25%", "25", True),
        (r"25\%", "0.25", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac12", "1/2", True),
        (r"-\dfrac{3}{4}", "-0.75", True),
        (r"2\frac{1}{2}", "2.5", True),
        ("11/2", r"1\frac{1}{2}", False),
        ("1/0", "1", False),
        ("320000", r"3.2 \times 10^5", True),
        ("x=12", "12", True),
        ("1+x^2", "x^2+1", True),
        ("q-p", "p - q", False),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True),
        ("1,2", r"\{1,2\}", True),
        (r"(-\infty, 3]", r"\left(-\infty,3\right]", True),
        ("(B)", "B", True),
        (r"\text{B}", "B", True),
        ("B. five", "B", True),
        ("C", "B", False),
        ("true", "True", True),
        ("East", "east", True),
        ("seat", "east", False),  # equal as products of letters
        ("five", "5", False),
        ("", "5", False),
    ],
)
def test_answers_compare_by_what_they_mean(answer, truth, is_right):
    assert answers_match(answer, truth) is is_right


@given(st.integers(-(10**9), 10**9), st.sampled_from(["", " cm", r"\text{ kg}", " m/s", r"\%", "^\\circ"]))
def test_numbers_are_read_through_commas_and_units(number, unit):
    quantity = parse_quantity(f"{number:,}{unit}")
    assert quantity is not None and number in quantity[0]


@pytest.mark.parametrize(
    "expression",
    [
        "10^{10^{10}}",
        "9**9**9**9",
        "2^3^{99}",
        "((9^{999})^{999})",
        "2^{99999999}",
        "99999!",
        "(10!)!",
        r"\binom{1000000000}{500000000}",
        r"\int_0^1 e^{x^2}\sin(x^3)dx",
        r"\sum_{i=1}^{10000000} i^i",
        "1" * 70 + "x",
        "+".join(["x"] * 400),
    ],
)
def test_what_cannot_be_computed_in_bounded_time_compares_as_text(expression):
    start = time.monotonic()
    assert not answers_match(expression, "7")
    assert answers_match(expression, expression)
    assert time.monotonic() - start < TEXT_COMPARISON_S


def test_answers_are_compared_from_other_threads():
    results = []
    thread = threading.Thread(target=lambda: results.append(is_right_math_answer(r"\boxed{1+x^2}", "x^2+1")))
    thread.start()
    thread.join()
    assert results == [True]
