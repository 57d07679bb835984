# SPDX-License-Identifier: Apache-2.0
"""What an answer can be: a quantity, a list, an interval, a relation, ... `parser` makes them."""

from dataclasses import dataclass

from verl_gradalign.data.answers.expressions import Node


@dataclass(frozen=True)
class Quantity:
    """An expression with a unit ("" if none is named); as a percentage it stands for itself or a hundredth of it."""

    node: Node
    unit: str = ""
    is_percent: bool = False


@dataclass(frozen=True)
class Infinity:
    """Plus or minus infinity."""

    sign: int


@dataclass(frozen=True)
class Based:
    """Digits with the base they are written in."""

    digits: str
    base: int


@dataclass(frozen=True)
class Words:
    """Words, in lower case."""

    text: str


@dataclass(frozen=True)
class Items:
    """Several values: bare (brackets ""), a set ("{}"), or in brackets of which the order counts ("()", "(]", ...).

    Two in round or square brackets are a pair or an interval. `joint` is what a bare list has between its items.
    """

    brackets: str
    values: tuple["Value", ...]
    joint: str = ","


@dataclass(frozen=True)
class Ratio:
    """Values with colons between them: ratios, times of day."""

    parts: tuple["Value", ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of values. The kind tells a matrix ("") from a determinant ("v")."""

    kind: str
    rows: tuple[tuple["Value", ...], ...]


@dataclass(frozen=True)
class Union:
    """Intervals and sets joined, less the sets that are taken out."""

    pieces: tuple["Value", ...]
    without: tuple["Value", ...] = ()


@dataclass(frozen=True)
class Relation:
    r"""Sides with a sign ("=", "<", "\le", ...) between each two.

    A side that is no value is None; `names` has the text of a side that names something ("x", "f(x)", "Area"), else "".
    """

    signs: tuple[str, ...]
    sides: tuple["Value | None", ...]
    names: tuple[str, ...]


Value = Quantity | Infinity | Based | Words | Items | Ratio | Matrix | Union | Relation
