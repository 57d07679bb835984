# SPDX-License-Identifier: Apache-2.0
"""A value of a column as text: what is taken as it is, what is repaired (each repair has a name), what is refused.

Nothing is guessed. A value that stands for several answers, for none, or for a number that is none is refused with the
reason; the caller knows the place.

    as_text(Decimal("12.50"), "answer")  # ("12.5", {"numbers_written_as_text"})
    clean_answer("$15$", "answer")  # ("15", {"dollar_signs_removed"})
    as_text(float("nan"), "answer")  # ValueError: an empty 'answer' (nan); fill it in or remove the row
"""

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from verl_gradalign.data.math_answers import ANSWER_MARK, find_last_boxed

# Names of repairs, in the order in which they are shown.
NUMBER = "numbers_written_as_text"
BOOLEAN = "booleans_written_as_text"
BYTES = "bytes_read_as_text"
INVISIBLE = "invisible_characters_removed"
DOLLARS = "dollar_signs_removed"
BOX = "boxes_removed"
COMMAS = "thousands_commas_removed"
JSON_TEXT = "json_text_read"
PARTS = "text_parts_joined"
SYSTEM_TURNS = "system_turns_kept"
SEVERAL_TURNS = "prompts_of_several_turns_kept_whole"
REPAIRS = (
    NUMBER, BOOLEAN, BYTES, INVISIBLE, DOLLARS, BOX, COMMAS, JSON_TEXT, PARTS, SYSTEM_TURNS, SEVERAL_TURNS,
)  # fmt: skip

# What programs write for a value that is missing; "none" and "inf" too, since a pool of thousands is not read by eye.
MISSING = frozenset({"nan", "+nan", "-nan", "none", "null", "nat", "<na>", "n/a", "#n/a", "inf", "+inf", "-inf"})
# Control characters, zero width, byte order and direction marks: they are not white space, and are seen by nobody.
UNSEEN = r"[\s\x00-\x1f\x7f\u200b-\u200f\u2060\ufeff]+"
UNSEEN_AROUND = re.compile(rf"\A{UNSEEN}|{UNSEEN}\Z")
SURROGATE = re.compile(r"[\ud800-\udfff]")
BOX_OPENS = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
# LaTeX that prints nothing by itself, and commands that only wrap.
PRINTS_NOTHING = re.compile(
    r"\\(?:text\w*|math\w+|mbox|operatorname|left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[,;:!()\[\] $]"
)
LARGEST_EXPONENT_WRITTEN_OUT = 30


def as_text(value: Any, column: str) -> tuple[str, set[str]]:
    """Return a value as text without outer white space, and the names of the repairs.

    Numbers are written in decimals, without a fraction of zeros: 142.0 is 142, a decimal 12.50 is 12.5. Bytes are read
    as UTF-8.
    Raises: ValueError with the reason and remedy, as what follows "<place> has".
    """
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        value = value.tolist()
    repairs = set()
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _number_as_text(value, column), {NUMBER}
    if isinstance(value, bytes):
        value, repairs = _decoded(value, column), {BYTES}
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column!r} of type {type(value).__name__}; give text or a number, one to a problem")
    text = UNSEEN_AROUND.sub("", value or "")
    if text != (value or "").strip():
        repairs.add(INVISIBLE)
    if not text:
        raise ValueError(f"an empty {column!r}; fill it in or remove the row")
    if text.casefold() in MISSING:
        raise ValueError(f"an empty {column!r} ({text!r}, as a missing value is written); fill it in or remove the row")
    if found := SURROGATE.search(text):
        # Not the character itself, which cannot be printed.
        which = f"unpaired surrogate {ascii(found.group())} as character {found.start() + 1}"
        raise ValueError(f"an {which} of {column!r}; write the whole character, or remove it")
    return text, repairs


def as_answer(value: Any, column: str) -> tuple[str, set[str]]:
    """Return a value as a clean answer, and the names of the repairs. Booleans are the words True and False.

    Raises: ValueError, as `as_text` and `clean_answer`.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    text, repairs = (str(value), {BOOLEAN}) if isinstance(value, bool) else as_text(value, column)
    cleaned, of_cleaning = clean_answer(text, column)
    return cleaned, repairs | of_cleaning


def clean_answer(text: str, column: str) -> tuple[str, set[str]]:
    """Return an answer without dollar signs and box around it, and the names of the repairs.

    A backslash that belongs to a closing dollar sign goes with it: `400\\$` is 400. One before a number is left, since
    `\\$600` says a unit.
    Raises: ValueError with the reason, as `as_text`, if nothing is left that could be an answer, or more than one is.
    """
    repairs, before = set(), None
    if ANSWER_MARK in text or len(BOX_OPENS.findall(text)) > 1:
        why = f"a whole solution or several answers in {column!r} ({text[:60]!r})"
        raise ValueError(f"{why}; give the final answer alone")
    cleaned = text
    while cleaned != before:
        before = cleaned
        cleaned = re.sub(r"\A\$+|(?:\\?\$)+\Z", "", cleaned).strip()
        repairs |= {DOLLARS} if cleaned != before else set()
        if BOX_OPENS.search(cleaned):
            cleaned = find_last_boxed(cleaned) or ""
            repairs.add(BOX)
    if not _says_something(cleaned):
        shown = f" ({text!r} says nothing)" if text else ""
        raise ValueError(f"an empty {column!r}{shown}; fill it in or remove the row")
    if cleaned.casefold() in MISSING:
        raise ValueError(f"an empty {column!r} ({text!r} says that it is missing); fill it in or remove the row")
    if _is_list_as_text(cleaned):
        raise ValueError(f"in {column!r} a list or an object as text ({cleaned[:60]!r}); give the one answer as text")
    return cleaned, repairs


def _number_as_text(value: int | float | Decimal, column: str) -> str:
    if not isinstance(value, int) and not math.isfinite(value):
        kind = "an empty" if math.isnan(value) else "an infinite"
        raise ValueError(f"{kind} {column!r} ({str(value).lower()}); fill it in or remove the row")
    # By way of its shortest text: int(1e23) has digits that nobody wrote.
    number = Decimal(str(value))
    if not number:
        return "0"
    if abs(number.adjusted()) > LARGEST_EXPONENT_WRITTEN_OUT and not isinstance(value, int):
        return str(value)
    # Decimal.normalize would round to the context's 28 digits.
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _decoded(value: bytes, column: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"in {column!r} bytes that are not UTF-8 ({error.reason}); write it as text") from error


def _says_something(text: str) -> bool:
    """Whether a letter, a digit, a sign of mathematics or a LaTeX command that prints is left."""
    printed = PRINTS_NOTHING.sub("", text)
    categories = map(unicodedata.category, printed.replace("$", ""))
    return any(category[0] in "LN" or category in ("Sm", "So") for category in categories)


def _is_list_as_text(text: str) -> bool:
    """Whether the text is a list of texts or an object, as JSON or Python writes it; `[1, 2]` may be an interval."""
    if re.match(r"""\[\s*["'{\]]|\{\s*["']""", text):
        return True
    return text.startswith("{") and isinstance(parse_json_text(text), dict)


def parse_json_text(text: str) -> Any:
    """Return what a JSON text holds; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_empty(value: Any) -> bool:
    """Return whether a value is missing: None, nan, empty text or an empty list."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, Sequence) and not value)
