# SPDX-License-Identifier: Apache-2.0
r"""From the text of an answer to its value: lists, sets, intervals, relations, units, and expressions in them.

    parse_answer(r"\pm 3")  # Items("", (Quantity 3, Quantity -3))
    parse_answer("(-1, 2]")  # Items("(]", (Quantity -1, Quantity 2))

What is not understood, or has two readings, raises `Unclear`; such answers are right only if worded alike.
"""

import re
from collections.abc import Callable, Sequence

from verl_gradalign.data.answers.expression_parser import Parser
from verl_gradalign.data.answers.expressions import Unclear, multiply, number
from verl_gradalign.data.answers.spelling import NEW_LINE, spell
from verl_gradalign.data.answers.tokens import CLOSING, OPENING, Token, matching, tokenize
from verl_gradalign.data.answers.units import CHANGING, SCALES, canonical_unit
from verl_gradalign.data.answers.values import (
    Based,
    Infinity,
    Items,
    Matrix,
    Quantity,
    Ratio,
    Relation,
    Union,
    Value,
    Words,
)

MAX_CHARS = 600
"""Digits apart: long numbers are cheap, long expressions are not."""
MAX_DIGITS = 20_000
MAX_ITEMS = 60

Tokens = Sequence[Token]
RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\in", r"\approx"}
BASED = re.compile(r"\(?(\d[0-9A-Z]*)\)?(?:_(\w{1,2})|_\{(?:base)?(\w+)\}|\(?base(\w+)\)?)")
BASES = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MATRIX = re.compile(
    r"[\[(]?\s*\\begin\{([pbvBV]?)(?:small)?(?:matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{[pbvBV]?(?:small)?(?:matrix|array)\}\s*[\])]?"
)
# What may stand in a name besides letters and words: f(x), [ABC], m\angle A.
IN_NAMES = {r"\angle", r"\triangle", r"\overline", r"\widehat", r"\measuredangle", "_", "{", "}", "'", r"\vec", r"\bar"}
CURRENCIES = {r"\$": "dollar", r"\currency": ""}
EMPTY_SETS = {r"\emptyset", r"\{\}"}


def parse_answer(text: str) -> Value:
    """Return the value that an answer says. Raises: Unclear if it says none, or more than one."""
    spelled = spell(text)
    num_digits = sum(map(str.isdigit, spelled))
    if num_digits > MAX_DIGITS or len(spelled) - num_digits > MAX_CHARS:
        raise Unclear("too long")
    if found := MATRIX.fullmatch(spelled):
        return _matrix(found[1], found[2])
    return _list(tokenize(spelled))


def _matrix(kind: str, inside: str) -> Matrix:
    rows = [row.split("&") for row in inside.split(NEW_LINE.strip()) if row.strip()]
    values = tuple(tuple(_item(tokenize(cell.strip())) for cell in row) for row in rows)
    if len({len(row) for row in values}) != 1:
        raise Unclear("a matrix with unequal rows")
    return Matrix(kind if kind in "vV" else "", values)


def _list(tokens: Tokens) -> Value:
    """A bare list, or the only item of it."""
    parts, joints = _split(tokens, lambda token: token.kind == "joint" or token.text in (",", ";"))
    joint = "or" if joints and set(joints) <= {"or", ","} and "or" in joints else "and" if "and" in joints else ","
    items = [value for part in parts for value in _with_both_signs(part, lambda tokens: _item(tokens))]
    return items[0] if len(items) == 1 else Items("", tuple(items), joint)


def _split(tokens: Tokens, is_separator: Callable[[Token], bool]) -> tuple[list[Tokens], list[str]]:
    """The runs of tokens between separators outside all brackets, and the separators. ", and" is one separator."""
    parts: list[list[Token]] = [[]]
    separators: list[str] = []
    depth = 0
    for token in tokens:
        depth += (token.text in OPENING) - (token.text in CLOSING)
        if depth == 0 and is_separator(token):
            if not parts[-1] and separators and separators[-1] == "," and token.kind == "joint":
                separators[-1] = token.text
                continue
            parts.append([])
            separators.append(token.text)
        else:
            parts[-1].append(token)
    if depth or not all(parts) or len(parts) > MAX_ITEMS:
        raise Unclear("an item is missing, or there are too many")
    return list(parts), separators


def _with_both_signs(tokens: Tokens, parse: Callable[[Tokens], Value]) -> list[Value]:
    r"""The item's value; both values if it has one \pm (and at most one \mp) outside of sets."""
    signs = [token.text for token in tokens if token.text in (r"\pm", r"\mp")]
    if not signs or (tokens[0].text == r"\{" and matching(tokens, 0) == len(tokens) - 1):
        return [parse(tokens)]
    if signs.count(r"\pm") != 1 or signs.count(r"\mp") > 1:
        raise Unclear("more than one sign that may be either")
    values = []
    for plus, minus in (("+", "-"), ("-", "+")):
        signed = {r"\pm": Token("sign", plus), r"\mp": Token("sign", minus)}
        values.append(parse([signed.get(token.text, token) for token in tokens]))
    return values


def _item(tokens: Tokens) -> Value:
    if not tokens:
        raise Unclear("nothing")
    sides, signs = _split_relation(tokens)
    return _relation(sides, signs) if signs else _plain(sides[0])


def _split_relation(tokens: Tokens) -> tuple[list[Tokens], list[str]]:
    if tokens[0].text in ("=", r"\approx") and len(tokens) > 1:  # "= 5" and "about 5" are 5
        tokens = tokens[1:]
        return ([tokens], []) if not any(token.text in RELATIONS for token in tokens) else _split_relation(tokens)
    return _split(tokens, lambda token: token.text in RELATIONS)


def _relation(sides: list[Tokens], signs: list[str]) -> Value:
    if r"\approx" in signs:  # what is exact stands before the sign
        cut = signs.index(r"\approx")
        if cut:
            return _relation(sides[: cut + 1], signs[:cut])
        if len(sides) > 2 or not _name(sides[0]):
            return _plain(sides[0])
        signs = ["="]
    names = tuple(_name(side) for side in sides)
    values: list[Value | None] = []
    for side, name in zip(sides, names, strict=True):
        try:
            values.append(_plain(side))
        except Unclear:
            if not name:
                raise
            values.append(None)
    return Relation(tuple(signs), tuple(values), names)


def _name(tokens: Tokens) -> str:
    """The text of what names a quantity rather than says its value, else ""."""
    outside, position = [], 0
    while position < len(tokens):
        if tokens[position].text in ("(", "["):
            closing = matching(tokens, position)
            inside = tokens[position + 1 : closing]
            if any(token.kind not in ("symbol", "number") and token.text not in (",", "=") for token in inside):
                return ""
            if position == 0 and any(token.kind == "number" for token in inside):
                return ""
            outside += [token for token in inside if position == 0]
            position = closing
        else:
            outside.append(tokens[position])
        position += 1
    after_subscript = [token for i, token in enumerate(outside) if not i or outside[i - 1].text not in ("_", "{")]
    is_name = all(t.kind in ("symbol", "word") or t.text in IN_NAMES or t.text == "," for t in after_subscript)
    return "".join(token.text for token in tokens) if is_name and outside else ""


def _plain(tokens: Tokens) -> Value:
    """An item without a relation."""
    if not tokens:
        raise Unclear("a side is missing")
    text = "".join(token.text for token in tokens)
    if text in EMPTY_SETS:
        return Items("{}", ())
    if text in (r"\infty", r"+\infty", r"-\infty"):
        return Infinity(-1 if text[0] == "-" else 1)
    if text == r"\mathbb{R}":
        return Items("()", (Infinity(-1), Infinity(1)))
    if all(token.kind == "word" for token in tokens) and len(text) > 1:
        return Words(" ".join(token.text.lower() for token in tokens))
    if found := BASED.fullmatch(text):
        return _based(found[1], found[2] or found[3] or found[4])
    if any(token.text in (r"\cup", r"\setminus") for token in tokens):
        return _union(tokens)
    parts, colons = _split(tokens, lambda token: token.text == ":")
    if colons:
        return Ratio(tuple(_plain(part) for part in parts))
    if tokens[0].text in ("(", "[", r"\{") and matching(tokens, 0) == len(tokens) - 1:
        return _bracketed(tokens)
    return _quantity(tokens)


def _based(digits: str, base_text: str) -> Based:
    base = int(base_text) if base_text.isdigit() else BASES.index(base_text) + 2 if base_text in BASES else 0
    if not 2 <= base <= 36 or any(digit not in DIGITS[:base] for digit in digits):
        raise Unclear(f"{digits} is not written in base {base_text}")
    return Based(digits.lstrip("0") or "0", base)


def _union(tokens: Tokens) -> Value:
    parts, signs = _split(tokens, lambda token: token.text in (r"\cup", r"\setminus"))
    pieces: list[Value] = [_plain(parts[0])]
    without: list[Value] = []
    for sign, part in zip(signs, parts[1:], strict=True):
        if sign == r"\cup" and without:
            raise Unclear("a union behind what is taken out")
        (pieces if sign == r"\cup" else without).append(_plain(part))
    return Union(tuple(pieces), tuple(without))


def _bracketed(tokens: Tokens) -> Value:
    opening, closing = tokens[0].text.lstrip("\\"), tokens[-1].text.lstrip("\\")
    parts, _ = _split(tokens[1:-1], lambda token: token.text in (",", ";"))
    if opening + closing == "{}":
        if (condition := _condition(tokens[1:-1])) is not None:
            return condition
        return Items("{}", tuple(v for part in parts for v in _with_both_signs(part, _item)))
    if opening not in "([" or closing not in ")]":
        raise Unclear(f"{opening} closed by {closing}")
    if len(parts) == 1:
        return _quantity(tokens) if opening + closing == "()" else Items(opening + closing, (_item(parts[0]),))
    return Items(opening + closing, tuple(_item(part) for part in parts))


def _condition(tokens: Tokens) -> Value | None:
    r"""What `x | x > 2` and `x \in \mathbb{R} : x > 2` say of the set's members; None if it lists them."""
    parts, bars = _split(tokens, lambda token: token.text in ("|", ":"))
    if len(bars) != 1 or parts[0][0].kind != "symbol":
        return None
    if len(parts[0]) > 1 and "".join(token.text for token in parts[0][1:]) != r"\in\mathbb{R}":
        return None
    condition = _list(parts[1])
    return (
        condition
        if isinstance(condition, Relation) or (isinstance(condition, Items) and not condition.brackets)
        else None
    )


def _quantity(tokens: Tokens) -> Quantity:
    """An expression with a currency before it, or a percent sign, scale, unit or currency behind it."""
    currency, tokens = _currency(tokens)
    parser = Parser(tokens)
    node = parser.parse_sum()
    rest = list(tokens[parser.position :])
    while rest and rest[0].kind == "word" and rest[0].text.lower().rstrip("s") in SCALES:
        node = multiply(node, number(SCALES[rest.pop(0).text.lower().rstrip("s")]))
    if [token.text for token in rest] == ["%"]:
        return Quantity(node, currency, is_percent=True)
    unit = _unit(rest)
    if currency and unit not in ("", currency):
        currency = f"{currency} {unit}"
    return Quantity(node, currency or unit)


def _currency(tokens: Tokens) -> tuple[str, Tokens]:
    """The currency before the number, or before or behind its sign, and what is left."""
    for start in (0, 1):
        if start and tokens[0].text not in ("-", "+"):
            break
        name, length = _currency_at(tokens, start)
        if name:
            return name, [*tokens[:start], *tokens[start + length :]]
    return "", tokens


def _currency_at(tokens: Tokens, start: int) -> tuple[str, int]:
    if start >= len(tokens):
        return "", 0
    if tokens[start].text == r"\$":
        return "dollar", 1
    if tokens[start].text == r"\currency":
        closing = matching(tokens, start + 1)
        return "".join(token.text for token in tokens[start + 2 : closing]), closing - start + 1
    return "", 0


def _unit(rest: Tokens) -> str:
    """One name for the unit that the tokens behind an expression make."""
    if not rest:
        return ""
    if (currency := _currency_at(rest, 0))[1] == len(rest):
        return currency[0]
    allowed = {"/", "^", "*", "-", "{", "}", r"\degree"}
    for i, token in enumerate(rest):
        is_exponent = token.kind == "number" and rest[i - 1].text in ("^", "{", "-") and len(token.text) == 1
        if token.kind != "word" and token.text not in allowed and not is_exponent:
            raise Unclear(f"{token.text} is no unit")
        words = set(re.split(r"[^a-z]+", token.text.lower())) if token.kind == "word" else set()
        if words & CHANGING or {word.rstrip("s") for word in words} & CHANGING - {"point"}:
            raise Unclear(f"{token.text} changes the number")
    if rest[0].kind != "word" and rest[0].text != r"\degree":
        raise Unclear(f"{rest[0].text} is no unit")
    names = [token.text if token.kind == "word" else token.text.replace(r"\degree", "degree") for token in rest]
    return canonical_unit(" ".join(names))
