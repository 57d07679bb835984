# SPDX-License-Identifier: Apache-2.0
r"""Tokens of an answer in the spelling of `spelling`: numbers, symbols, words, commands and signs.

Numbers come with their exact value, whatever their length. Letters in a row are a function, a unit, a word or a
product, by what stands around them.

    tokenize("5x + 3 cm")  # number 5, symbol x, sign +, number 3, word cm
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from verl_gradalign.data.answers.expressions import FUNCTIONS, Unclear
from verl_gradalign.data.answers.units import LETTERS, NAMES, SPELLINGS, canonical_word

MAX_TOKENS = 1000

REPEATING = r"\\overline\s*\{\d+\}|\\bar\s*(?:\{\d+\}|\d)|\\dot\s*(?:\{\d\}|\d)(?:\d*\\dot\s*(?:\{\d\}|\d))?|\(\d+\)"
WHOLE = r"\d{1,3}(?: \d{3})+(?![\d/]| \d| /)|\d+"
WHOLE_WITH_COMMAS = r"\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d{1,2}(?:,\d\d)+,\d{3}(?!\d|,\d)|" + WHOLE
AFTER_POINT = rf"(?:\.(?:\d*(?:{REPEATING})|\d+))?(?:[eE][-+]?\d{{1,4}}(?![\d.a-zA-Z]))?"
# Commas in brackets separate: (1,000) is a pair.
NUMBER = {
    in_brackets: re.compile(rf"(?:{WHOLE if in_brackets else WHOLE_WITH_COMMAS}|(?=\.)){AFTER_POINT}")
    for in_brackets in (False, True)
}
WORD = re.compile(r"\\text\{([^{}]*)\}")
COMMAND = re.compile(r"\\(?:[A-Za-z]+|.)", re.DOTALL)
LETTERS_IN_A_ROW = re.compile(r"[A-Za-z]+")
END_OF_UNIT = re.compile(r"\s*(?:$|[,;/)\]}]|\^\s*\{?\s*-?\d\s*\}?\s*(?:$|[,;/]))")
WRITTEN_OUT = {"pi": r"\pi", "infty": r"\infty", "infinity": r"\infty", "inf": r"\infty", "sqrt": r"\sqrt"}
INVERSE_NAMES = {f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sec", "csc")}
CALLED = {name: name for name in FUNCTIONS if name[0] != "a"} | INVERSE_NAMES | {"ln": "ln", "log": "log", "lg": "lg"}
MADE_OF_FUNCTIONS = re.compile("(?:" + "|".join(sorted([*CALLED, *WRITTEN_OUT], key=len, reverse=True)) + ")")
ACCENTS = {"vec", "hat", "bar", "overline", "widehat", "tilde", "mathcal", "mathbb", "mathfrak", "overrightarrow"}
VARIABLES = set(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega "
    "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar".split()
)
APPLIED = set("fghFGHPQ")
"""Letters whose brackets hold an argument, not a factor."""
OPENING, CLOSING = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}


class Token(NamedTuple):
    r"""A piece of an answer: a number, symbol, word, command (with its backslash) or a single sign."""

    kind: str
    text: str
    value: Fraction | None = None
    is_spaced: bool = False  # white space stands before it


def tokenize(text: str) -> list[Token]:
    """Return the tokens of a spelled answer.

    Raises: Unclear for a character that no answer has, or more than MAX_TOKENS tokens.
    """
    tokens: list[Token] = []
    position = depth = 0
    while position < len(text):
        if text[position] == " ":
            position += 1
            continue
        is_spaced = position > 0 and text[position - 1] == " "
        new, position = _next_tokens(text, position, depth > 0, tokens, is_spaced)
        tokens += new
        depth += sum((token.text in OPENING - {"{"}) - (token.text in CLOSING - {"}"}) for token in new)
        if len(tokens) > MAX_TOKENS:
            raise Unclear("too long")
    return tokens


def _next_tokens(
    text: str, start: int, in_brackets: bool, before: Sequence[Token], is_spaced: bool
) -> tuple[list[Token], int]:
    if (found := NUMBER[in_brackets].match(text, start)) and found.group():
        return [Token("number", found.group(), read_number(found.group()), is_spaced)], found.end()
    if found := WORD.match(text, start):
        return [Token("word", " ".join(found[1].split()), None, is_spaced)], found.end()
    if found := COMMAND.match(text, start):
        name = found.group()[1:]
        kind = "symbol" if name in VARIABLES else "command"
        return [Token(kind, found.group(), None, is_spaced)], found.end()
    if found := LETTERS_IN_A_ROW.match(text, start):
        return _letters(found.group(), text[found.end() :], before, is_spaced), found.end()
    if text[start] in "+-*/^_=<>()[]{}|,;:!%&'":
        return [Token("sign", text[start], None, is_spaced)], start + 1
    raise Unclear(f"{text[start]!r} has no meaning here")


def _letters(run: str, rest: str, before: Sequence[Token], is_spaced: bool) -> list[Token]:
    """One word, one function, or a product of letters."""
    name = run if run in CALLED or run in WRITTEN_OUT else run.lower()
    if name in CALLED or name in WRITTEN_OUT:
        return [Token("command", WRITTEN_OUT.get(name, f"\\{name}"), None, is_spaced)]
    if run in ("and", "or"):
        return [Token("joint", run, None, is_spaced)]
    if _is_word(run, rest, before, is_spaced):
        return [Token("word", run, None, is_spaced)]
    if len(run) > 2 and MADE_OF_FUNCTIONS.search(run):
        raise Unclear(f"{run} is no product of letters")
    return [Token("symbol", letter, None, is_spaced and not i) for i, letter in enumerate(run)]


def _is_word(run: str, rest: str, tokens: Sequence[Token], is_spaced: bool) -> bool:
    """Known units stand right behind a number or apart, other words apart; one letter is a unit at the end alone."""
    before = tokens[-1] if tokens else None
    if before is None or before.text in ("=", ",", ";") or before.kind == "joint":
        return len(run) > 3
    if before.kind == "word":
        return len(run) > 1 or before.text.lower() in ("per", "a", "an") or bool(END_OF_UNIT.match(rest))
    if before.text == "/" and len(tokens) > 1 and tokens[-2].kind == "word":
        return run in NAMES and bool(END_OF_UNIT.match(rest))
    if before.text == r"\degree":
        return len(run) > 1 or run in "CFK"
    if len(run) == 1:
        return is_spaced and before.kind == "number" and run in LETTERS and bool(END_OF_UNIT.match(rest))
    is_behind_number = before.kind == "number" or before.text in ("}", ")", "%")
    if (canonical_word(run) in SPELLINGS or run in ("sq", "cu")) and (is_spaced or is_behind_number):
        return True
    is_noun = len(run) > 3 or (len(run) == 3 and before.kind == "number" and bool(re.search("[aeiouy]", run)))
    return is_spaced and is_noun


def read_number(text: str) -> Fraction:
    """Return the exact value of digits with thousands, a decimal point, a repeating part and a power of ten."""
    text = re.sub("[ ,]", "", text)
    mantissa, _, exponent = text.lower().partition("e") if re.search(r"\d[eE]", text) else (text, "", "")
    whole, _, after = mantissa.partition(".")
    fixed = re.match(r"\d*", after).group()  # type: ignore[union-attr]  # matches always
    repeating = "".join(re.findall(r"\d", after[len(fixed) :]))
    value = whole_number(whole or "0") + Fraction(whole_number(fixed or "0"), 10 ** len(fixed))
    if repeating:
        value += Fraction(whole_number(repeating), (10 ** len(repeating) - 1) * 10 ** len(fixed))
    return value * Fraction(10) ** int(exponent or 0)


def whole_number(digits: str) -> Fraction:
    """Return the value of digits, however many: `int` refuses more than 4300."""
    pieces = [digits[max(0, end - 4000) : end] for end in range(len(digits), 0, -4000)]
    value = 0
    for piece in reversed(pieces):
        value = value * 10 ** len(piece) + int(piece)
    return Fraction(value)


def matching(tokens: Sequence[Token], start: int) -> int:
    """Return the position of the bracket that closes the one at `start`; brackets of any kind close each other.

    Raises: Unclear if none does.
    """
    depth = 0
    for position in range(start, len(tokens)):
        depth += (tokens[position].text in OPENING) - (tokens[position].text in CLOSING)
        if depth == 0:
            return position
    raise Unclear("a bracket is not closed")
