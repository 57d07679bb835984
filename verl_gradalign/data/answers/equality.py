# SPDX-License-Identifier: Apache-2.0
r"""Whether two values are the same answer.

Order counts in tuples and intervals, not in sets and bare lists; a bare list may stand for a tuple in the same order.
`x=5` answers 5 and `y=2x+1` answers 2x+1, but `2x+3=5` says something else than 5. Equations are the same if one is the
other times a constant, or if both give the same variable the same value; inequalities in one variable are compared as
intervals. `25\%` is both 25 and 0.25. A unit may be left out, but two different ones differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cmp_to_key

from verl_gradalign.data.answers.expressions import (
    FUNCTIONS,
    Node,
    Unclear,
    are_equal,
    are_proportional,
    divide,
    number,
    root_of_affine,
    sign_of,
    subtract,
    symbols_of,
)
from verl_gradalign.data.answers.units import do_units_agree
from verl_gradalign.data.answers.values import Infinity, Items, Matrix, Quantity, Ratio, Relation, Union, Value

Endpoint = Node | Infinity
OPPOSITE = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


@dataclass(frozen=True)
class Interval:
    """Between two ends, each of which belongs to it or not."""

    low: Endpoint
    high: Endpoint
    has_low: bool
    has_high: bool


EVERYTHING: tuple[Interval, ...] = (Interval(Infinity(-1), Infinity(1), False, False),)


def are_same(left: Value, right: Value) -> bool:
    """Return whether two values are the same answer. Raises: Unclear where that cannot be told."""
    if isinstance(left, Relation) and isinstance(right, Relation):
        return _same_relations(left, right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Relation):
            return _relation_says(one, other)
    if isinstance(left, Items) and isinstance(right, Items):
        return _same_items(left, right)
    if isinstance(left, Union) or isinstance(right, Union):
        return _same_regions(left, right)
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Items):  # a set of one solution is that solution
            return one.brackets == "{}" and len(one.values) == 1 and are_same(one.values[0], other)
    if type(left) is not type(right):
        return False
    if isinstance(left, Quantity) and isinstance(right, Quantity):
        return _same_quantities(left, right)
    if isinstance(left, Ratio) and isinstance(right, Ratio):
        return _same_in_order(left.parts, right.parts)
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        is_alike = left.kind == right.kind and len(left.rows) == len(right.rows)
        return is_alike and all(map(_same_in_order, left.rows, right.rows))
    return left == right


def _same_quantities(left: Quantity, right: Quantity) -> bool:
    is_one_percent = left.is_percent != right.is_percent
    if not do_units_agree(left.unit, right.unit) or (is_one_percent and (left.unit or right.unit)):
        return False
    if are_equal(left.node, right.node):
        return True
    if not is_one_percent:
        return False
    percent, other = (left, right) if left.is_percent else (right, left)
    return are_equal(divide(percent.node, number(100)), other.node)


def _same_in_order(left: Sequence[Value], right: Sequence[Value]) -> bool:
    return len(left) == len(right) and all(map(are_same, left, right))


def _same_in_any_order(left: Sequence[Value], right: Sequence[Value]) -> bool:
    rest = list(right)
    for value in left:
        match = next((i for i, other in enumerate(rest) if are_same(value, other)), None)
        if match is None:
            return False
        del rest[match]
    return not rest


def _same_items(left: Items, right: Items) -> bool:
    kinds = {left.brackets, right.brackets}
    if kinds == {""}:
        return _same_lists(left, right)
    if kinds == {"{}"}:
        return all(
            any(are_same(value, other) for other in others.values)
            for one, others in ((left, right), (right, left))
            for value in one.values
        )
    if kinds == {"{}", ""} and not any(isinstance(value, Relation) for value in (*left.values, *right.values)):
        return _same_in_any_order(left.values, right.values)
    if "" in kinds and any(isinstance(value, Relation) for value in (*left.values, *right.values)):
        return _same_regions(left, right)
    return (len(kinds) == 1 or kinds == {"()", ""}) and _same_in_order(left.values, right.values)


def _same_lists(left: Items, right: Items) -> bool:
    """`k = 4, 5` is a list of what k is; a list of inequalities depends on whether all hold or one."""
    (name, values), (other_name, other_values) = _without_name(left), _without_name(right)
    if name and other_name and name != other_name:
        return False
    relations = [v for v in (*values, *other_values) if isinstance(v, Relation) and v.signs != ("=",)]
    if relations and (left.joint == "or") != (right.joint == "or"):
        return False
    num_names = [len({v.names[0] for v in vs if isinstance(v, Relation)} - {""}) for vs in (values, other_values)]
    if 0 in num_names and max(num_names) > 1:  # x = 2, y = 3 is 2, 3 in this order
        return _same_in_order(values, other_values)
    return _same_in_any_order(values, other_values)


def _without_name(items: Items) -> tuple[str, Sequence[Value]]:
    values = items.values
    named = [v for v in values if isinstance(v, Relation) and v.signs == ("=",) and v.names[0] and v.sides[1]]
    names = {v.names[0] for v in named}
    if len(names) != 1 or (len(named) < len(values) and (len(named) > 1 or values[0] is not named[0])):
        return "", values
    return names.pop(), [v.sides[1] if isinstance(v, Relation) and v.sides[1] else v for v in values]


def _relation_says(relation: Relation, value: Value) -> bool:
    """Whether a relation, as an answer, is the value: `x = 5` is 5."""
    if set(relation.signs) == {"="}:
        said = _value_said(relation)
        return said is not None and are_same(said, value)
    if relation.signs == (r"\in",) and relation.names[0] and relation.sides[1]:
        return are_same(relation.sides[1], value)
    return _same_regions(relation, value)


def _value_said(relation: Relation) -> Value | None:
    """The last side if the first is a name, made of several variables alone, a function, or equal to the last.

    So `x+y = 5` says 5, and an ellipse does not say 1.
    """
    first, last = relation.sides[0], relation.sides[-1]
    if relation.names[0] or not isinstance(first, Quantity):
        return last if relation.names[0] else None
    if relation.names[-1] and len(relation.sides) == 2:
        return first
    has_several = len(symbols_of(first.node)) > 1 and _is_of_variables(first.node)
    is_function = first.node.op in FUNCTIONS | {"ln"}
    return last if last and (has_several or is_function or are_same(first, last)) else None


def _is_of_variables(node: Node) -> bool:
    """Whether there are no numbers but exponents and signs."""
    if node.op == "number":
        return node.value == -1
    args = node.args[:1] if node.op == "power" else node.args
    return node.op in ("symbol", "add", "multiply", "divide", "power") and all(map(_is_of_variables, args))


def _same_relations(left: Relation, right: Relation) -> bool:
    signs = set(left.signs) | set(right.signs)
    if signs == {"="}:
        last, other_last = left.sides[-1], right.sides[-1]
        if left.names[0] and left.names[0] == right.names[0] and last and other_last and are_same(last, other_last):
            return True
        return _same_equations(left, right)
    if "=" in signs:
        return False
    try:
        return _same_regions(left, right)
    except Unclear:
        return _same_inequalities(left, right)


def _same_inequalities(left: Relation, right: Relation) -> bool:
    """Whether one is the other times a positive constant, or turned around."""
    if len(left.signs) != 1 or len(right.signs) != 1 or r"\in" in (*left.signs, *right.signs):
        return False
    nodes = _difference(left), _difference(right)
    is_same_direction = left.signs == right.signs
    if not is_same_direction and left.signs[0] != OPPOSITE[right.signs[0]]:
        return False
    turned = nodes[1] if is_same_direction else subtract(number(0), nodes[1])
    return are_proportional(nodes[0], turned, only_positive=left.signs != (r"\ne",))


def _difference(relation: Relation) -> Node:
    """The first side less the second."""
    left, right = relation.sides[:2]
    if not isinstance(left, Quantity) or not isinstance(right, Quantity) or len(relation.sides) != 2:
        raise Unclear("not a relation of two expressions")
    return subtract(left.node, right.node)


def _same_equations(left: Relation, right: Relation) -> bool:
    nodes = _difference(left), _difference(right)
    symbols = symbols_of(nodes[0])
    if symbols != symbols_of(nodes[1]):
        return False
    if are_proportional(*nodes):
        return True
    for name in sorted(symbols):
        roots = [root_of_affine(node, name) for node in nodes]
        if roots[0] and roots[1]:
            return are_equal(roots[0][1], roots[1][1])
    return False


def _same_regions(left: Value, right: Value) -> bool:
    """Whether two sets of real numbers are the same, and of one variable if both name one."""
    (name, region), (other_name, other_region) = _region(left), _region(right)
    if name and other_name and name != other_name:
        return False
    return len(region) == len(other_region) and all(map(_same_intervals, region, other_region))


def _same_intervals(left: Interval, right: Interval) -> bool:
    are_alike = (left.has_low, left.has_high) == (right.has_low, right.has_high)
    return are_alike and not _compare(left.low, right.low) and not _compare(left.high, right.high)


def _region(value: Value) -> tuple[str, tuple[Interval, ...]]:
    """The variable (if there is one) and the disjoint intervals, in order, that a value says."""
    if isinstance(value, Relation):
        return _solved(value)
    if isinstance(value, Union):
        region = _joined([piece for part in value.pieces for piece in _region(part)[1]])
        for part in value.without:
            for taken in _region(part)[1]:
                region = _without_point(region, taken)
        return "", region
    if not isinstance(value, Items):
        raise Unclear("not a set of numbers")
    if value.brackets == "":
        regions = [_region(part) for part in value.values]
        if len({name for name, _ in regions}) != 1 or value.joint == ",":
            raise Unclear("inequalities that are not joined by and, or or")
        if value.joint == "or":
            return regions[0][0], _joined([interval for _, region in regions for interval in region])
        common = EVERYTHING
        for _, region in regions:
            common = _meeting(common, region)
        return regions[0][0], common
    if value.brackets == "{}":
        return "", _joined([Interval(_end(v), _end(v), True, True) for v in value.values])
    if len(value.values) != 2:
        raise Unclear("not an interval")
    low, high = map(_end, value.values)
    if _compare(low, high) >= 0:
        raise Unclear("not an interval")
    return "", (Interval(low, high, value.brackets[0] == "[", value.brackets[1] == "]"),)


def _end(value: Value) -> Endpoint:
    if isinstance(value, Infinity):
        return value
    if not isinstance(value, Quantity) or value.is_percent:
        raise Unclear("not an end of an interval")
    return value.node


def _compare(left: Endpoint, right: Endpoint) -> int:
    """-1, 0 or 1 as `left` is less, equal or more."""
    if isinstance(left, Infinity) or isinstance(right, Infinity):
        signs = [end.sign if isinstance(end, Infinity) else 0 for end in (left, right)]
        return (signs[0] > signs[1]) - (signs[0] < signs[1])
    if are_equal(left, right):
        return 0
    if (sign := sign_of(subtract(left, right))) is None:
        raise Unclear("ends that are no real numbers")
    return sign


def _compare_lows(left: Interval, right: Interval) -> int:
    return _compare(left.low, right.low) or right.has_low - left.has_low


def _joined(intervals: Sequence[Interval]) -> tuple[Interval, ...]:
    """The intervals in order, those that meet made one."""
    joined: list[Interval] = []
    ordered = sorted(intervals, key=cmp_to_key(_compare_lows))
    for interval in ordered:
        last = joined[-1] if joined else None
        gap = _compare(interval.low, last.high) if last else 1
        if last is None or gap > 0 or (gap == 0 and not (interval.has_low or last.has_high)):
            joined.append(interval)
            continue
        reach = _compare(interval.high, last.high)
        high, has_high = (interval.high, interval.has_high) if reach > 0 else (last.high, last.has_high)
        joined[-1] = Interval(last.low, high, last.has_low, has_high or (reach == 0 and interval.has_high))
    return tuple(joined)


def _meeting(left: Sequence[Interval], right: Sequence[Interval]) -> tuple[Interval, ...]:
    """What belongs to both."""
    common = []
    for one in left:
        for other in right:
            by_low, by_high = _compare(one.low, other.low), _compare(one.high, other.high)
            low = one.low if by_low >= 0 else other.low
            high = one.high if by_high <= 0 else other.high
            has_low = one.has_low if by_low > 0 else other.has_low if by_low < 0 else one.has_low and other.has_low
            has_high = (
                one.has_high if by_high < 0 else other.has_high if by_high > 0 else one.has_high and other.has_high
            )
            width = _compare(high, low)
            if width > 0 or (width == 0 and has_low and has_high):
                common.append(Interval(low, high, has_low, has_high))
    return _joined(common)


def _without_point(region: Sequence[Interval], point: Interval) -> tuple[Interval, ...]:
    if _compare(point.low, point.high):
        raise Unclear("what is taken out is no point")
    at = point.low
    return _meeting(region, (Interval(Infinity(-1), at, False, False), Interval(at, Infinity(1), False, False)))


def _solved(relation: Relation) -> tuple[str, tuple[Interval, ...]]:
    """The variable of inequalities, and where they all hold."""
    if relation.signs == (r"\in",) and relation.names[0] and relation.sides[1]:
        return relation.names[0], _region(relation.sides[1])[1]
    region = EVERYTHING
    names: set[str] = set()
    for i, sign in enumerate(relation.signs):
        if sign not in OPPOSITE:
            raise Unclear("not an inequality")
        node = _difference(Relation((sign,), relation.sides[i : i + 2], relation.names[i : i + 2]))
        symbols = symbols_of(node)
        if len(symbols) != 1:
            raise Unclear("not an inequality in one variable")
        names |= symbols
        region = _meeting(region, _half_line(node, sign, next(iter(symbols))))
    if len(names) != 1:
        raise Unclear("inequalities in several variables")
    return names.pop(), region


def _half_line(node: Node, sign: str, name: str) -> tuple[Interval, ...]:
    """Where `node` has the sign against 0."""
    solved = root_of_affine(node, name)
    if solved is None:
        raise Unclear("not a linear inequality")
    slope, root = solved
    if sign == r"\ne":
        return (Interval(Infinity(-1), root, False, False), Interval(root, Infinity(1), False, False))
    sign = sign if sign_of(slope) == 1 else OPPOSITE[sign]
    has_root = sign in (r"\le", r"\ge")
    if sign in ("<", r"\le"):
        return (Interval(Infinity(-1), root, False, has_root),)
    return (Interval(root, Infinity(1), has_root, False),)
