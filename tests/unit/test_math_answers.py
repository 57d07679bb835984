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
from verl_gradalign.data.rewards import is_right_last_number

# Comparing as text costs microseconds; computing what is compared here would take minutes, or the machine's memory.
TEXT_COMPARISON_S = 1.0
# Measured: 0.3 s at most, on one core of a busy machine.
LONG_RESPONSE_S = 5.0

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
        ("Write it in \\boxed and stop.\nThe answer is 8", "8"),
        (r"\boxed{12}, in \boxed{} as asked", "12"),
        (r"\boxed{12} stands where \boxed{your answer} was", "12"),
        ("Final Answer: **31**", "31"),
        ("Answer: `$31$`", "31"),
        ("**Final answer**: \n\n31", "31"),
        ("The answer is 31. It was easy.", "31"),
        ("The answer is 31, because 30 + 1 = 31", "31"),
        ("The answer is $3$ or $4$", "3$ or $4"),
        ('Answer: 31\n(on its own line after "Answer:".)', "31"),
        (r"so \[ \boxed{31} \]", "31"),
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


@pytest.mark.parametrize(
    ("answer", "truth", "is_right"),
    [
        # Signs, digits, spaces and powers of Unicode.
        ("\u22127", "-7", True),
        ("\u20137", "-7", True),
        ("\u22127", "7", False),
        ("\uff14\uff12", "42", True),
        ("2\u2009500", "2500", True),
        ("2\u202f500", "2500", True),
        ("3\u20135", "-2", False),  # a range, or a difference
        ("4\u221a{11}", r"4\sqrt{11}", True),
        ("\u221b64", "4", True),
        ("z\u00b3+1", "1+z^3", True),
        ("10\u207b\u00b2", "0.01", True),
        ("2\u215c", r"\frac{19}{8}", True),
        ("5\u03c0", r"5\pi", True),
        ("41\u00b0", r"41^\circ", True),
        # What only looks different.
        (r"\dfrac34", "0.75", True),
        (r"\left( \tfrac{1}{4}, 2 \right)", "(0.25,2)", True),
        (r"\displaystyle 7", "7", True),
        (r"\textcolor{red}{7}", "7", True),
        (r"\mathrm{e}^{3}", "e^3", True),
        (r"6{,}000", "6000", True),
        (r"\underline{8}", "8", True),
        (r"\text{31}", "31", True),
        # Exact numbers, whatever their size.
        (r"\frac{1}{3^{90}}", r"\frac{1}{3^{91}}", False),
        (str(7**80), "7^{80}", True),
        (str(7**80 + 1), "7^{80}", False),
        ("8" * 5000, "8" * 4999 + "7", False),
        ("8" * 5000 + ".0", "8" * 5000, True),
        (r"\sqrt{3}+10^{-90}", r"\sqrt{3}", False),
        ("0.667", "2/3", False),
        ("0.1", "0.1000001", False),
        (r"0.\overline{27}", r"\frac{3}{11}", True),
        ("0.8(3)", "5/6", True),
        (r"0.\dot{2}8571\dot{4}", r"\frac27", True),
        ("0.27", r"0.\overline{27}", False),
        ("7 5/8", r"\frac{61}{8}", True),
        ("-1 1/4", "-1.25", True),
        (r"3\frac{7}{2}", "6.5", False),  # a sum or a product
        ("5e3", "5000", True),
        # Bases.
        ("1203_4", "1203_5", False),
        ("1203_{4}", "1203_4", True),
        ("1203\u2084", r"1203_{\text{four}}", True),
        ("1203", "1203_4", False),
        ("99", "1203_4", False),
        # Roots and functions.
        (r"\sqrt[3]{-27}", "-3", True),
        (r"2\sqrt(5)", "2", False),
        (r"2\sqrt(5)", r"\sqrt{20}", True),
        (r"\sqrt{7+4\sqrt3}", r"2+\sqrt3", True),
        (r"\cos 60^\circ", "0.5", True),
        (r"\ln 9", r"2\ln 3", True),
        (r"\sqrt{x^2}", "x", False),
        (r"\log_2 32", "5", True),
        (r"\binom{n}{2}", r"\frac{n^2-n}{2}", True),
        (r"2 pi", "2", False),
        ("a/bc", r"\frac{a}{bc}", False),
        ("1/4x", r"\frac{x}{4}", True),
        # Lists, sets, tuples and intervals.
        ("6, 7", "6", False),
        (r"4,9, \text{ and } 16", "16, 9, 4", True),
        ("m=2,3", "m=3,2", True),
        ("m=2,3", "m=2,4", False),
        (r"\pm 6", "6", False),
        (r"\pm 6", "-6, 6", True),
        (r"\{2,9\}", r"\{9,2\}", True),
        ("(9,2)", "(2,9)", False),
        (r"\{2,9\}", "(2,9)", False),
        (r"(2,9]", "(2,9)", False),
        (r"\varnothing", r"\{\}", True),
        (r"2 < t \le 9", "(2,9]", True),
        (r"(-\infty,-2)\cup(2,\infty)", r"x<-2 \text{ or } x>2", True),
        ("x<4", "y<4", False),
        ("3,6,9,\\ldots,3n", "1,2,\\ldots,n", False),
        ("4:15", "7:15", False),
        # Relations.
        ("k=8", "8", True),
        ("k=8", "m=8", False),
        ("3x+1=10", "10", False),
        ("a+b=10", "10", True),
        (r"\frac{x^2}{9}+y^2=1", "1", False),
        ("m=2, n=3", r"\{2,3\}", False),
        (r"\approx 10", "10", True),
        (r"\{x \mid x \ge 3\}", r"[3,\infty)", True),
        ("4x-2y=6", "y=2x-3", True),
        ("4x+2y=6", "y=2x-3", False),
        ("xy=4", "y=4/x", True),
        ("3x+6y<9", "x+2y<3", True),
        ("3x+6y>9", "x+2y<3", False),
        # Units.
        ("8 x", "8", False),
        ("8 million", "8", False),
        ("8 million", "8000000", True),
        ("8 thirds", "8", False),
        (r"8\text{ m}", r"8\text{ mm}", False),
        ("8 square feet", r"8\text{ ft}^2", True),
        ("\u00a38", "8", True),
        ("\u20ac8", "\u00a38", False),
        ("10%", "0.1%", False),
        ("10%", r"\$10", False),
        ("8'", "8", False),
        (r"8 \text{ is wrong}", "8", False),
        # Letters.
        ("C, D", "C", False),
        ("C or D", "C", False),
        ("C/D", "C", False),
        ("(C) a circle", "C", True),
        ("C: A and B", "C", False),
    ],
)
def test_one_value_is_one_answer_however_it_is_written(answer, truth, is_right):
    assert answers_match(answer, truth) is is_right


rationals = st.fractions(max_denominator=10**6) | st.fractions()
small_rationals = st.fractions(min_value=-50, max_value=50, max_denominator=12)


def spellings(value):
    """A fraction in many forms."""
    n, d = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    forms = [
        f"{sign}{n}/{d}",
        rf"{sign}\frac{{{n}}}{{{d}}}",
        rf"{sign}\dfrac{{{7 * n}}}{{{7 * d}}}",
        f"\u2212{n}/{d}"[not sign :],
    ]
    whole, rest = divmod(n, d)
    if whole and rest:
        forms += [f"{sign}{whole} {rest}/{d}", rf"{sign}{whole}\frac{{{rest}}}{{{d}}}"]
    if d == 1:
        forms += [f"{sign}{n:,}", f"{sign}{n}.0", f"{sign}0{n}", rf"{sign}{n:,}".replace(",", "{,}")]
    twos_and_fives = (n * 10**40) % d == 0
    if twos_and_fives and 10**40 % d == 0:
        digits = str(n * 10**40 // d).rjust(41, "0")
        forms.append(f"{sign}{digits[:-40]}.{digits[-40:]}")
    return forms


@given(rationals | small_rationals, rationals | small_rationals, st.data())
def test_rationals_are_equal_answers_where_they_are_equal(left, right, data):
    written = [data.draw(st.sampled_from(spellings(value))) for value in (left, right)]
    assert answers_match(*written) is (left == right)
    assert answers_match(data.draw(st.sampled_from(spellings(left))), written[0])


@given(st.integers(0, 10**40), st.integers(0, 39))
def test_a_number_with_one_digit_changed_is_another(number, position):
    neighbour = number + 10**position
    for answer in (str(neighbour), f"{neighbour:,}", f"-{number + 1}", f"{number}.01"):
        assert not answers_match(answer, str(number))


@given(
    st.sets(st.sampled_from("ABCDEFGH"), min_size=2, max_size=5),
    st.sampled_from([", ", ",", " or ", " and ", "/", " ", "; "]),
)
def test_several_letters_are_never_one(letters, joint):
    listed = joint.join(sorted(letters))
    for answer in (
        listed,
        f"({listed})",
        rf"\text{{{listed}}}",
        ", ".join(f"({letter})" for letter in sorted(letters)),
    ):
        assert not any(answers_match(answer, letter) for letter in "ABCDEFGH")


pieces = st.sampled_from(
    [
        r"\frac",
        r"\sqrt",
        r"\text{cm}",
        r"\left(",
        r"\{",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "1",
        "27",
        "0.5",
        "x",
        "e",
        "i",
        "+",
        "-",
    ]
    + [
        "*",
        "/",
        "^",
        "_",
        ",",
        "=",
        "<",
        "!",
        "|",
        "%",
        "$",
        r"\$",
        r"\pm",
        r"\cup",
        r"\infty",
        r"\sin",
        r"\ln",
        r"\binom",
        "\\",
    ]
    + [
        r"\boxed{",
        "####",
        "Answer:",
        " or ",
        ".",
        " ",
        "\n",
        "\u221a",
        "\u2212",
        "\u00bd",
        "\u0305",
        "\ud83d",
        "9" * 50,
        "A",
    ]
)


@given(
    st.lists(pieces, max_size=25).map("".join) | st.text(max_size=40),
    st.sampled_from(["7", r"\sqrt{2}", "(1,2)", "B", "x<7"]),
)
def test_no_response_raises_and_none_takes_long(response, truth):
    start = time.monotonic()
    for answer in (response, rf"\boxed{{{response}}}"):
        assert isinstance(is_right_math_answer(answer, truth), bool)
        assert isinstance(is_right_last_number(answer, truth), bool)
    assert isinstance(answers_match(response, truth), bool)
    assert time.monotonic() - start < TEXT_COMPARISON_S


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{" * 20_000,
        "answer: " * 20_000,
        "#### " * 20_000,
        "1," * 20_000,
        "$" * 20_000,
        r"\text{" * 3_000 + "}" * 3_000,
        "answer:" + " " * 50_000,
        r"\boxed{" + "(" * 5_000 + "}",
        r"\boxed{" + "+".join(rf"\sin({i}x)" for i in range(60)) + "}",
        r"\boxed{" + "n!" * 100 + "}",
        "Answer: " + "9" * 100_000,
    ],
    ids=lambda response: response[:12],
)
def test_long_responses_are_graded_in_bounded_time(response):
    start = time.monotonic()
    assert not is_right_math_answer(response, r"\sin x+n!")
    assert not is_right_last_number(response, "7")
    assert time.monotonic() - start < LONG_RESPONSE_S


def test_answers_are_compared_from_other_threads():
    results = []
    thread = threading.Thread(target=lambda: results.append(is_right_math_answer(r"\boxed{1+x^2}", "x^2+1")))
    thread.start()
    thread.join()
    assert results == [True]
