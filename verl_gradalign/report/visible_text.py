# SPDX-License-Identifier: Apache-2.0
"""Text from outside as a person may safely look at it: nothing in it acts, hides or turns round what stands beside it.

    visible("left \\u202e right")      # "left [U+202E] right"

Escaping for HTML is the template's. The characters are a table, not Unicode's category of format characters (Cf): that
holds joiners too, which emoji and Indic scripts need.
"""

import re
from typing import NamedTuple

INVISIBLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f]"  # C0 but for tab and line feed
    "|[\\x80-\\x9f]"  # C1
    "|[\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]"  # marks and overrides of direction
    "|[\\u00ad\\u200b\\u2028\\u2029\\u2060-\\u2065\\ufeff]"  # no width, separators
    "|[\\ufff9-\\ufffb\\U000e0000-\\U000e007f]"  # annotations, tags
    "|[\\ud800-\\udfff\\ufffe\\uffff]"  # no characters at all
)
MARK = "[\\u0300-\\u036f\\u0483-\\u0489\\u1ab0-\\u1aff\\u20d0-\\u20ff]"
STACKED = re.compile(f"({MARK}{{3}}){MARK}+")
"""Marks above and below a letter, so many that they would cover other lines."""


class Shown(NamedTuple):
    """A text, as much of it as is shown: `num_shown` characters of it, some as several, of `length`."""

    text: str
    num_shown: int
    length: int

    @property
    def is_cut(self) -> bool:
        return self.length > self.num_shown


def shown(text: str, most: int) -> Shown:
    """Return the beginning of a text, visible, in at most `most` characters."""
    num_shown = min(len(text), most)
    while len(seen := visible(text[:num_shown])) > most:  # signs of several characters
        num_shown = num_shown * most // len(seen)
    return Shown(seen, num_shown, len(text))


def visible(text: str) -> str:
    """Return the text with every character that cannot be seen as a sign that can: a control character as its picture,
    others as [U+202E], what is no character as the replacement character. Tabs and line feeds stay."""
    text = STACKED.sub(r"\1", text.replace("\r\n", "\n"))
    return INVISIBLE.sub(lambda match: _sign(ord(match[0])), text)


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if 0xD800 <= code <= 0xDFFF or code in (0xFFFE, 0xFFFF):
        return "\ufffd"
    return f"[U+{code:04X}]"


def short(text: str, most: int = 80) -> str:
    """Return a name as it may stand within a line: visible, on one line, cut."""
    line = visible(text).replace("\n", " ").replace("\t", " ").strip() or "(empty)"
    return line if len(line) <= most else line[: most - 3] + "..."
