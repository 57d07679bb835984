# SPDX-License-Identifier: Apache-2.0
r"""The number a response ends on, GSM8K's way: right behind "####", or else the last one of all.

What follows the number behind "####" does not matter, unless it goes on with the number itself: of a calculation
(`40 - 4 = 36`) the result counts, and one without a result, a range (`10-12`), a time or `3,50` is no answer. If
several marks have a number behind them, the last one counts, as in verl's rule; GSM8K's own script takes the first.
If none has one (a heading of four "#", say), the last number after the last mark counts. Numbers are compared as
quantities: `17.50` is `17.5`, `024` is `24`.

    extract_last_number("so 3 + 4 = 7\n#### $7 in all, 2 more than 5")  # "7"
    is_right_last_number("#### 1 234.00", "1,234")  # True
"""

import re
from fractions import Fraction
from typing import Any

from verl_gradalign.data.answers.spelling import to_ascii
from verl_gradalign.data.answers.tokens import read_number
from verl_gradalign.data.answers.units import SCALES
from verl_gradalign.data.truths import truth_text

ANSWER_MARK = "####"
MAX_DIGITS = 20_000

GAP = r"(?:,|\{,\}|\\,|\\!|,\\!|~| )"
"""Between thousands."""
DIGITS = rf"(?:\d{{1,3}}(?:{GAP}\d{{3}})+(?![\d/])|\d{{1,2}}(?:,\d\d)+,\d{{3}}(?!\d)|\d+)(?:\.\d+)?|\.\d+"
CURRENCY = r"(?:(?:US|AU|CA|NZ|HK|[ACS])?\\?\$|\\currency\{\w+\}|(?:USD|EUR|GBP|INR|Rs\.?)(?![A-Za-z]))"
FRACTION = r"/\d+(?![\d/])| \d+/\d+(?![\d/])| ?\\frac\{\d+\}\{\d+\}"
NUMBER = re.compile(
    rf"(?P<sign>[-+] *)?(?:{CURRENCY} *)?(?P<inner>- *)?(?:(?P<digits>{DIGITS})(?P<power>[eE][-+]?\d{{1,3}}(?!\w))?"
    rf"(?P<fraction>{FRACTION})?|(?P<alone>\\frac\{{\d+\}}\{{\d+\}}))"
    rf"(?: +(?P<scale>{'|'.join(SCALES)})(?![A-Za-z]))?"
)
# What may stand between the mark and the number.
OPENING = r"(?:[\s*_`:=~({\[]|\\(?:boxed|fbox|mathbf|textbf|text)(?=\s*\{)|\\[(\[]|\\approx|\\?\$(?!\d)|"
OPENING += r"(?:the\s+)?(?:final\s+)?answer(?:\s+is)?(?![a-z]))*"
MARKED = re.compile(rf"#{{4,}}(?i:{OPENING})")
GOES_ON = re.compile(r"[,.:/^]\d|\^|\s*!(?!\w)|[ ]*(?:[-+*/x]|\\times|\\cdot|\\div|\\text\{ to \}|to)[ ]*[$(]*\d")
RESULT = re.compile(r"[-+*/x() $\\%.,\d]*(?:(?:times|cdot|div)[-+*/x() $\\%.,\d]*)*=[\s*_`(]*")
# A minus sign behind a digit, letter or closing bracket subtracts or joins.
NO_SIGN_BEHIND = re.compile(r"[\w)\]}%]$")
SPACED_SIGN_BEHIND = re.compile(r"(?:[=:(]|\bis) *$")


def extract_last_number(text: str) -> str | None:
    """Return the number the text ends on (see the module), commas and zeros after the point removed; None without."""
    found = _find(text)
    return found[0] if found else None


def is_right_last_number(response: str, truth: Any) -> bool:
    """Return whether the number the response ends on is the truth; a truth that is no number is never reached.

    Raises: ValueError for a truth that cannot be one (see `truth_text`).
    """
    wanted = _read_truth(truth_text(truth))
    found = _find(response)
    return found is not None and wanted is not None and found[1] == wanted


def normalise_number(number: str) -> str:
    """Return the number without commas and without a fraction of zeros only."""
    whole, point, fraction = number.replace(",", "").strip().partition(".")
    return whole + point + fraction if fraction.strip("0") else whole


def _find(text: str) -> tuple[str, Fraction] | None:
    lines = "\n".join(map(to_ascii, text.split("\n")))
    for mark in reversed(list(MARKED.finditer(lines))):
        if match := NUMBER.match(lines, mark.end()):
            return _finished(lines, match)
    _, _, tail = lines.rpartition(ANSWER_MARK)
    return _last(tail)


def _finished(text: str, match: re.Match[str]) -> tuple[str, Fraction] | None:
    """The number behind a mark, or the result of the calculation that it starts; None for anything in between."""
    rest = text[match.end() :].split("\n", 1)[0]
    if not GOES_ON.match(rest):
        return _read(match)
    result = RESULT.match(rest)
    last = NUMBER.match(rest, result.end()) if result else None
    return _read(last) if last and not GOES_ON.match(rest[last.end() :]) else None


def _last(text: str) -> tuple[str, Fraction] | None:
    match = None
    for match in NUMBER.finditer(text):  # noqa: B007  # the last one is wanted
        pass
    if match is None:
        return None
    before = text[max(0, match.start() - 20) : match.start()]
    is_spaced = (match["sign"] or "").endswith(" ")
    has_sign = bool(SPACED_SIGN_BEHIND.search(before)) if is_spaced else not NO_SIGN_BEHIND.search(before)
    if re.search(r"\d,$", before):  # 3,50 and 1,2,3 are no numbers
        return None
    return _read(match, has_sign)


def _read(match: re.Match[str], has_sign: bool = True) -> tuple[str, Fraction] | None:
    """The number as text, and its value."""
    digits = re.sub(GAP, "", match["digits"] or "")
    if len(digits) > MAX_DIGITS:
        return None
    value = read_number(digits + (match["power"] or "")) if digits else Fraction(0)
    extra = (match["fraction"] or match["alone"] or "").strip()
    parts = [int(part[:20]) for part in re.findall(r"\d+", extra)]
    if parts and not parts[-1]:
        return None
    if len(parts) == 1:
        value /= parts[0]
    elif parts:
        value += Fraction(*parts)
    value *= SCALES.get(match["scale"] or "", Fraction(1))
    is_negative = has_sign and (match["sign"] or "").startswith("-")
    is_negative ^= match["inner"] is not None
    shown = normalise_number(digits) + (match["power"] or "") + (match["fraction"] or match["alone"] or "")
    return ("-" if is_negative else "") + shown, -value if is_negative else value


def _read_truth(truth: str) -> Fraction | None:
    text = to_ascii(truth).strip()
    match = NUMBER.match(text, MARKED.match(ANSWER_MARK + text).end() - len(ANSWER_MARK))  # type: ignore[union-attr]
    found = _finished(text, match) if match else None
    return found[1] if found else None
