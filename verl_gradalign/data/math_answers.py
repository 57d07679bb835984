# SPDX-License-Identifier: Apache-2.0
r"""Final answers to mathematical problems: found in solutions and responses, and compared with the truth.

The rule: a right answer says the same value as the truth, and nothing more. Numbers are compared exactly (0.333 is not
1/3), as are expressions with roots, constants and variables; letters of a choice are right only where exactly one is
named; words are compared as words; what is not understood, or has two readings, is right only if worded like the truth.
Paying a wrong answer is worse than missing a right one. All work is bounded, and no response raises an error. No model
is asked.

How it is done: `answers.spelling` brings Unicode and LaTeX to one spelling, `answers.parser` reads values (numbers with
units, lists, sets, intervals, equations), `answers.equality` compares them, and `answers.expressions` computes.
Answers behind "####" are in `last_number`.

    find_last_boxed(r"so \boxed{\frac{1}{2}}")  # "\\frac{1}{2}"
    is_right_math_answer(r"... \boxed{0.5}", r"\frac{1}{2}")  # True
"""

import re
from fractions import Fraction
from typing import Any

from verl_gradalign.data.answers.equality import are_same
from verl_gradalign.data.answers.expressions import Unclear, exact_value
from verl_gradalign.data.answers.parser import parse_answer
from verl_gradalign.data.answers.spelling import flatten, squeeze_spaces
from verl_gradalign.data.answers.values import Quantity
from verl_gradalign.data.last_number import ANSWER_MARK, extract_last_number, normalise_number
from verl_gradalign.data.truths import truth_text

__all__ = [
    "ANSWER_MARK",
    "answers_match",
    "extract_final_answer",
    "extract_last_number",
    "find_last_boxed",
    "is_right_math_answer",
    "normalise_number",
    "parse_quantity",
    "squeeze_spaces",
]

MAX_ANSWER_CHARS = 25_000
"""A longer one is right only if it is the truth to the letter."""

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])[ \t]*")
BRACE = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*\{?|\\.|[{}]", re.DOTALL)  # \{ and \} are printed, not grouping
# What may follow a box without braces: a number, or the letter of a choice.
BARE = re.compile(r"[-+]?(?:\d[\d.,/]*\d|\d)|[A-Z](?![A-Za-z])")
# "answer is ...", "Answer: ...", or a line of its own that says "Final answer".
STATED_ANSWER = re.compile(
    r"(?:answer[\s*_]*(?:is\b|:|=|\uff1a)|^[#*_ \t]*(?:final )?answer[*_ \t]*$)"
    r"(?:[\s:*_`]|</?\w{1,8}>|\\\[|\$\$)*([^\n]*)",
    re.IGNORECASE | re.MULTILINE,
)
SENTENCE_END = re.compile(
    r"\.(?:\*\*)?\s+(?=[A-Z])|,?\s+(?:because|since)\s|,\s+(?:as|so|which|where|therefore|and so)\s"
)
# What stands where the instruction is repeated: nothing, dots, "your answer", "$Answer (without quotes) ...".
PLACEHOLDER = re.compile(
    r"[\s.?_$*()\"'`\u2026-]*(?:\\(?:[lc]?dots|text\{\.*\}))?|"
    r"(?:\\text\{)?[\s\[<\"'$]*(?:(?:your|the|final|correct) )*answer\b.*",
    re.IGNORECASE | re.DOTALL,
)

WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'\-]*[A-Za-z]\.?")
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "arcsin", "arccos", "arctan", "and"}
CHOICE = re.compile(r"\(?\s*([A-Z])\s*(?:\)|\.(?!\d)|:|,|$)")
CHOICES_NAMED = re.compile(r"(?<![A-Za-z\\'])[A-Z](?![A-Za-z'])")
ARTICLE = re.compile(r"(?<![A-Za-z])A (?=(?!and\b|or\b)[a-z])")


def find_last_boxed(text: str) -> str | None:
    r"""Return what the last complete \boxed{...} or \fbox{...} holds, braces within included; None if there is none.

    A number or one capital letter may follow instead of braces, as in `\boxed 7`. Boxes that hold a placeholder, such
    as `\boxed{}` and `\boxed{your answer}`, are passed over: they repeat the instruction.
    """
    found: list[tuple[int, str]] = []
    opened: list[int | None] = []  # where the contents of each open brace start, if it is a box's
    for match in BRACE.finditer(text):
        token = match.group()
        if token.endswith("{") and token != r"\{":
            opened.append(match.end() if len(token) > 1 else None)
        elif token == "}" and opened:
            start = opened.pop()
            if start is not None:
                found.append((start, text[start : match.start()].strip()))
        elif (box := BOX.match(text, match.start())) and (bare := BARE.match(text, box.end())):
            found.append((bare.start(), bare.group()))
    return next((inside for _, inside in sorted(found, reverse=True) if not _is_placeholder(inside)), None)


def _is_placeholder(text: str) -> bool:
    return bool(PLACEHOLDER.fullmatch(text))


def extract_final_answer(response: str) -> str | None:
    """Return the answer a response ends on: what its last box holds, else what its last "Answer:" or "answer is" says.

    What is said goes to the end of its line or sentence; it may stand on the next line. None if there is neither: a
    number that merely stands last is not an answer.
    """
    boxed = find_last_boxed(response)
    if boxed is not None:
        return boxed
    for stated in reversed(STATED_ANSWER.findall(response)):
        said = SENTENCE_END.split(stated.strip(), maxsplit=1)[0].strip().rstrip(".").strip("*$`_ \t").rstrip(".")
        if not _is_placeholder(said):
            return said
    return None


def is_right_math_answer(response: str, truth: Any) -> bool:
    """Return whether the response's final answer equals the truth (see `answers_match`).

    Raises: ValueError for a truth that cannot be one (see `truth_text`).
    """
    truth = truth_text(truth)
    answer = extract_final_answer(response)
    return answer is not None and answers_match(answer, truth)


def answers_match(answer: str, truth: str) -> bool:
    """Return whether two final answers are equal: as text, as the one letter of a choice, as words, or as values.

    A unit may be left out, but two different units differ; `25%` equals `25` and `0.25`. Callable from any thread.
    """
    if max(len(answer), len(truth)) > MAX_ANSWER_CHARS:
        return answer == truth
    answer_text, true_text = flatten(answer), flatten(truth)
    if not answer_text or not true_text:
        return False
    if squeeze_spaces(answer_text) == squeeze_spaces(true_text):
        return True
    if letter := re.fullmatch(r"\(?([A-Z])\)?", true_text):
        return _only_choice(answer_text) == letter.group(1)
    if _is_words(true_text) and _is_words(answer_text):
        return _plain_words(answer_text) == _plain_words(true_text)
    try:
        return are_same(parse_answer(answer), parse_answer(truth))
    except (Unclear, RecursionError):
        return False


def _only_choice(text: str) -> str | None:
    """The letter that an answer starts with, as in `(B)` and `B. five`, if it names no other."""
    found = CHOICE.match(text)
    if found is None or len(set(CHOICES_NAMED.findall(ARTICLE.sub("", text)))) > 1:
        return None
    return found.group(1) if len(CHOICES_NAMED.findall(ARTICLE.sub("", text))) == 1 else None


def _is_words(text: str) -> bool:
    """Words of a language: three letters in a row or more somewhere, and no sign of mathematics."""
    if text.lower() in ("yes", "no"):
        return True
    return bool(WORDS.fullmatch(text)) and any(w.lower() not in FUNCTIONS for w in re.findall("[A-Za-z]{3,}", text))


def _plain_words(text: str) -> str:
    return squeeze_spaces(text.lower().rstrip("."))


def parse_quantity(text: str) -> tuple[frozenset[Fraction], str] | None:
    """Return the values that a rational number with a unit, percent or currency sign may stand for, and the unit.

    None for anything else. A percentage stands for two values, as it is written and a hundredth of it.
    """
    try:
        value = parse_answer(text)
    except (Unclear, RecursionError):
        return None
    if not isinstance(value, Quantity) or (exact := exact_value(value.node)) is None:
        return None
    return frozenset({exact, exact / 100} if value.is_percent else {exact}), value.unit
