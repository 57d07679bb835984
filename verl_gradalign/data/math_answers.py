# SPDX-License-Identifier: Apache-2.0
"""Final answers to mathematical problems: found in solutions and responses, and compared.

Comparison goes from cheap to costly: equal text, equal numbers (commas, units and percent signs understood), then
math-verify. Words are compared as words, not as products of letters. Expressions that could take for ever to compute
(power towers, large factorials, integrals) are compared as text alone, and math-verify runs under a time limit.
No model is asked, so free-form answers (a sentence) are right only if they are worded alike.

    find_last_boxed(r"so \\boxed{\\frac{1}{2}}")  # "\\frac{1}{2}"
    is_right_math_answer(r"... \\boxed{0.5}", r"\\frac{1}{2}")  # True
"""

import ctypes
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import accumulate

logger = logging.getLogger(__name__)

ANSWER_MARK = "####"
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are printed, not grouping
STATED_ANSWER = re.compile(r"answer\s*(?:is\b|:|=)[ \t:]*(\S[^\n]*)", re.IGNORECASE)

QUANTITY = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>\d{1,3}(?:[ ,]\d{3})+|\d*)(?P<point>\.\d+)?"
    r"(?:e(?P<e>[-+]?\d{1,3})|(?:\*|x|\\times|\\cdot)10\^\{?(?P<power>[-+]?\d{1,3})\}?)?"
    r"(?:/(?P<divisor>\d+))?(?P<percent>\\?%)?"
)
# Not after a digit, where it makes a mixed number.
PLAIN_FRACTION = re.compile(r"(?<![\d ])\s*\\frac(?:\{(-?\d+)\}\{(\d+)\}|(\d)(\d))")
# One letter right after a digit is algebra (15x); a unit stands apart or has two letters or more.
UNIT = re.compile(r"(?<=[\d}%])(?:\s+|(?=[A-Za-z]{2}))(?P<unit>[A-Za-z][A-Za-z /.]*(?:\^\{?-?\d\}?)?)$")
WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'\-]*[A-Za-z]\.?")
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "sqrt", "arcsin", "arccos", "arctan"}
CHOICE = re.compile(r"\(?([A-Z])(?:\)|\.|:|,|$)")

# Bounds within which math-verify was never seen to need more than a few seconds.
MAX_EXPRESSION_CHARS = 300
MAX_EXPONENT_PRODUCT = 10_000
COMPARISON_TIMEOUT_S = 20.0
UNBOUNDED_WORK = re.compile(r"\\(?:o?i*int|sum|prod|lim)(?![a-zA-Z])|\d{4,}\s*!|[)}\]!]\s*!|\d{60}")
BIG_BINOMIAL = re.compile(r"binom.*\d{4}|\d{4}.*binom", re.DOTALL)
POWER = re.compile(r"\^|\*\*")


def find_last_boxed(text: str) -> str | None:
    r"""Return what the last complete \boxed{...} or \fbox{...} holds, braces within included; None if there is none.

    A bare number or word may follow instead of braces, as in `\boxed 7`.
    """
    for match in reversed(list(BOX.finditer(text))):
        inside = _balanced(text, match.end())
        if inside is not None and inside.strip():
            return inside.strip()
    return None


def _balanced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and the one that closes it."""
    if text[start : start + 1] != "{":
        bare = re.match(r"-?[\w.]*\w", text[start:])
        return bare.group() if bare else None
    depth = 0
    for match in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return text[start + 1 : match.start()]
    return None


def extract_last_number(text: str) -> str | None:
    """Return the last number after the last "####", or of the whole text if there is none; None if no number is there.

    Commas are removed, and so are a fraction of zeros only (`18.00` becomes `18`) and a full stop after the number.
    """
    _, mark, tail = text.rpartition(ANSWER_MARK)
    numbers = NUMBER.findall(tail if mark else text)
    return normalise_number(numbers[-1]) if numbers else None


def normalise_number(number: str) -> str:
    """Return the number without commas and without a fraction of zeros only."""
    whole, point, fraction = number.replace(",", "").strip().partition(".")
    return whole + point + fraction if fraction.strip("0") else whole


def extract_final_answer(response: str) -> str | None:
    """Return the answer a response ends on: what its last box holds, else what its last "Answer:" or "answer is" says.

    None if there is neither: a number that merely stands last is not an answer.
    """
    boxed = find_last_boxed(response)
    if boxed is not None:
        return boxed
    stated = STATED_ANSWER.findall(response)
    return (stated[-1].strip().rstrip(".").strip("*$ ").rstrip(".") or None) if stated else None


def is_right_math_answer(response: str, truth: str) -> bool:
    """Return whether the response's final answer equals the truth (see `answers_match`)."""
    answer = extract_final_answer(response)
    return answer is not None and answers_match(answer, truth)


def answers_match(answer: str, truth: str) -> bool:
    """Return whether two final answers are equal: as text, as numbers, as words or choices, or by math-verify.

    A unit may be left out, but two different units differ; `25%` equals `25` and `0.25`. Callable from any thread.
    """
    answer_text, truth_text = _normalise_text(answer), _normalise_text(truth)
    if squeeze_spaces(answer_text) == squeeze_spaces(truth_text):
        return True
    if re.fullmatch(r"[A-Z]", truth_text):
        choice = CHOICE.match(answer_text)
        return choice is not None and choice.group(1) == truth_text
    if _is_words(truth_text):
        return answer_text.lower().rstrip(".") == truth_text.lower().rstrip(".")
    quantity, true_quantity = parse_quantity(answer), parse_quantity(truth)
    if quantity is not None and true_quantity is not None:
        (values, unit), (true_values, true_unit) = quantity, true_quantity
        return bool(values & true_values) and (not unit or not true_unit or unit == true_unit)
    if _is_words(answer_text):
        return False
    return _is_cheap(answer) and _is_cheap(truth) and _verify(answer, truth)


def parse_quantity(text: str) -> tuple[frozenset[Fraction], str] | None:
    """Return the values a number with commas, unit, percent or dollar sign may stand for, and the unit; else None.

    A percentage stands for two values, as it is written and a hundredth of it. Fractions `a/b` and `\\frac{a}{b}` and
    powers of ten are read exactly.
    """
    text = _normalise_text(text)
    text = re.sub(r"\^\{?(?:\\circ|o)\}?", " degrees", text)
    unit = ""
    if found := UNIT.search(text):
        unit = found.group("unit").replace(" ", "").lower().rstrip(".")
        unit = unit[:-1] if len(unit) > 2 and unit.endswith("s") else unit
        text = text[: found.start()]
    text = PLAIN_FRACTION.sub(lambda match: "/".join(group for group in match.groups() if group), text)
    found = QUANTITY.fullmatch(squeeze_spaces(text))
    if not found or not (found["whole"] or found["point"]) or (found["divisor"] and not int(found["divisor"])):
        return None
    value = Fraction((re.sub("[ ,]", "", found["whole"]) or "0") + (found["point"] or ""))
    value = value * Fraction(10) ** int(found["e"] or found["power"] or 0) / int(found["divisor"] or 1)
    value = -value if found["sign"] == "-" else value
    return frozenset({value, value / 100} if found["percent"] else {value}), unit


def squeeze_spaces(text: str) -> str:
    """Return the text with white space left only between two letters or digits, and there as one space."""
    return re.sub(r"(?<!\w) | (?!\w)", "", re.sub(r"\s+", " ", text.strip()))


def _normalise_text(text: str) -> str:
    text = re.sub(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\(?:left|right|[!,;:])(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text.replace("\\$", "").replace("$", "").replace("~", " "))
    text = re.sub(r"\\[()\[\] ]", " ", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".")


def _is_words(text: str) -> bool:
    """Words of a language: three letters in a row or more somewhere, and no sign of mathematics."""
    if text.lower() in ("yes", "no"):
        return True
    return bool(WORDS.fullmatch(text)) and any(w.lower() not in FUNCTIONS for w in re.findall("[A-Za-z]{3,}", text))


def _is_cheap(text: str) -> bool:
    """Whether comparing the expression is bounded work: sympy computes huge integers in one uninterruptible call."""
    if len(text) > MAX_EXPRESSION_CHARS or UNBOUNDED_WORK.search(text) or BIG_BINOMIAL.search(text):
        return False
    product = 1
    for match in POWER.finditer(text):
        exponent = _exponent(text, match.end())
        product *= max([1, *map(int, re.findall(r"\d+", exponent))])
        inner = POWER.search(exponent)
        is_tower = inner is not None and not exponent[: inner.start()].rstrip()[-1:].isalpha()
        is_chained = POWER.match(text[match.end() :].lstrip()[len(exponent) :].lstrip()) is not None
        if is_tower or is_chained or product > MAX_EXPONENT_PRODUCT or ("!" in text and product > 100):
            return False
    return True


def _exponent(text: str, start: int) -> str:
    rest = text[start:].lstrip()
    opening, closing = rest[:1], {"{": "}", "(": ")"}.get(rest[:1])
    if closing is None:
        found = re.match(r"-?\d+|\\?\w", rest)
        return found.group() if found else ""
    depths = accumulate((character == opening) - (character == closing) for character in rest)
    return rest[: next((length for length, depth in enumerate(depths, start=1) if depth == 0), None)]


def _verify(answer: str, truth: str) -> bool:
    """math-verify without its own time limits: those use signals, which raise outside the main thread."""
    from math_verify import parse, verify

    try:
        with time_limit(COMPARISON_TIMEOUT_S):
            gold, target = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (truth, answer))
            return bool(verify(gold, target, timeout_seconds=None))
    except TimeLimitExceeded:
        logger.warning("comparing %r with %r took over %s s; it counts as wrong", answer, truth, COMPARISON_TIMEOUT_S)
        return False


class TimeLimitExceeded(BaseException):
    """Not an `Exception`, so that code under the limit which catches those does not swallow it."""


@contextmanager
def time_limit(timeout_s: float) -> Iterator[None]:
    """Raise `TimeLimitExceeded` in this thread if the body is still running after `timeout_s` seconds.

    By an exception set in the thread: a process pool that can be killed costs more than most comparisons take.
    """
    thread_id = ctypes.c_ulong(threading.get_ident())
    raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
    lock = threading.Lock()
    is_over = False

    def expire() -> None:
        with lock:
            if not is_over:
                raise_in_thread(thread_id, ctypes.py_object(TimeLimitExceeded))

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            is_over = True
        # An exception that was set and not yet raised would otherwise be raised somewhere after the body.
        raise_in_thread(thread_id, None)
        timer.cancel()
