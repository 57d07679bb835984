# SPDX-License-Identifier: Apache-2.0
"""Expressions and their values: whether two of them are equal.

Rationals are computed exactly, whatever their size. All else (roots, pi, functions, complex numbers) is computed to far
more bits than the literals have, and two expressions which agree to half of those bits are equal. Variables are given
the same few rational values on both sides; a difference that is not 0 everywhere is not 0 there, but by an accident.
All work is bounded: what is too large raises `Unclear`.

    half = divide(number(1), number(2))
    are_equal(power(number(2), half), ...)
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from typing import Any

import mpmath

MAX_EXACT_BITS = 100_000
"""Of a numerator or denominator; a number of 30,000 digits still fits."""
# Bits computed with, and the most that a rational may have which meets a number that is none: an eighth, so that it is
# not lost in rounding. The second pair is tried where the first is too coarse.
PRECISIONS = ((1024, 128), (8192, 1024))
# Of factorials of what is not whole, as of a variable, which take long.
GAMMA_PRECISIONS = ((256, 32),)
MAX_FACTORIAL = 1000
MAX_GAMMA_ARGUMENT, MAX_GAMMAS = 200, 20
MAX_ARGUMENT_BITS = 40
"""Before the point, of what exp, powers and trigonometric functions are taken of."""
POINTS = 5
MIN_POINTS = 3
"""Of those, where both sides have values (no division by 0)."""

INVERSES = {"asin", "acos", "atan", "acot", "asec", "acsc"}
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp"} | INVERSES
"""As mpmath names them."""


class Unclear(ValueError):
    """The text is not an expression with one clear value, or computing it is not bounded work."""


class TooFine(Exception):
    """A rational has too many bits for the precision that is computed with."""


@dataclass(frozen=True)
class Node:
    """A number or symbol with its value, or an operation on other expressions."""

    op: str
    args: tuple["Node", ...] = ()
    value: Fraction | str = ""


def number(value: int | Fraction) -> Node:
    """Return a literal."""
    return Node("number", value=Fraction(value))


def subtract(left: Node, right: Node) -> Node:
    """Return left - right."""
    return Node("add", (left, Node("multiply", (number(-1), right))))


def divide(left: Node, right: Node) -> Node:
    """Return left / right."""
    return Node("divide", (left, right))


def multiply(*factors: Node) -> Node:
    """Return the product."""
    return Node("multiply", factors)


def power(base: Node, exponent: Node) -> Node:
    """Return base ** exponent."""
    return Node("power", (base, exponent))


def symbols_of(node: Node) -> frozenset[str]:
    """Return the names of the variables; e and i are constants."""
    if node.op == "symbol":
        return frozenset() if node.value in ("e", "i") else frozenset({str(node.value)})
    return frozenset() if node.op == "at_first_point" else frozenset().union(*map(symbols_of, node.args))


def substitute(node: Node, name: str, value: int) -> Node:
    """Return the expression with a number in place of a variable."""
    if node.op == "symbol":
        return number(value) if node.value == name else node
    return Node(node.op, tuple(substitute(arg, name, value) for arg in node.args), node.value)


def are_equal(left: Node, right: Node) -> bool:
    """Return whether the two have the same value, whatever values their variables have; False if that is unclear."""
    if left == right:
        return True
    num_points = POINTS if symbols_of(left) | symbols_of(right) else 1
    for precision, max_bits in _precisions(left, right):
        num_equal = 0
        try:
            for point in range(num_points):
                with _computing(precision, max_bits, point) as computer:
                    try:
                        difference = computer.value(subtract(left, right))
                    except ZeroDivisionError:
                        continue
                    if not computer.is_zero(difference, computer.value(left)):
                        return False
                    num_equal += 1
            return num_equal >= min(num_points, MIN_POINTS)
        except TooFine:
            continue
        except FAILURES:
            return False
    return False


def _precisions(*nodes: Node) -> tuple[tuple[int, int], ...]:
    has_variables = any(map(symbols_of, nodes))
    num_gammas = sum(map(_count_gammas, nodes)) if has_variables else 0
    return PRECISIONS if not num_gammas else GAMMA_PRECISIONS if num_gammas <= MAX_GAMMAS else ()


def _count_gammas(node: Node) -> int:
    return (node.op in ("factorial", "binomial")) + sum(map(_count_gammas, node.args))


def are_proportional(left: Node, right: Node, only_positive: bool = False) -> bool:
    """Return whether `left` is `right` times a constant other than 0; a positive one if asked for."""
    left_there, right_there = Node("at_first_point", (left,)), Node("at_first_point", (right,))
    sign = (sign_of(left_there) or 0) * (sign_of(right_there) or 0)
    is_possible = sign > 0 if only_positive else sign != 0
    return is_possible and are_equal(multiply(left, right_there), multiply(right, left_there))


def root_of_affine(node: Node, name: str) -> tuple[Node, Node] | None:
    """Return the slope in a variable and the value of that variable at which the expression is 0; None if not affine.

    Both are expressions in the other variables.
    """
    at = [substitute(node, name, value) for value in (0, 1, 2)]
    slope = subtract(at[1], at[0])
    if not are_equal(subtract(at[2], at[1]), slope) or are_equal(slope, number(0)):
        return None
    return slope, divide(multiply(number(-1), at[0]), slope)


def sign_of(node: Node) -> int | None:
    """Return -1, 0 or 1 for an expression without variables; None if it is not real, or unclear."""
    for precision, max_bits in PRECISIONS:
        try:
            with _computing(precision, max_bits, 0) as computer:
                value = computer.value(node) if not symbols_of(node) else None
                return None if value is None or computer.is_complex(value) else (value > 0) - (value < 0)
        except TooFine:
            continue
        except FAILURES:
            return None
    return None


def exact_value(node: Node) -> Fraction | None:
    """Return the value of an expression without variables in which everything is rational; else None."""
    if symbols_of(node):
        return None
    try:
        with _computing(*PRECISIONS[0], 0) as computer:
            value = computer.value(node)
    except (TooFine, *FAILURES):
        return None
    return value if isinstance(value, Fraction) else None


FAILURES = (ValueError, ArithmeticError, TypeError, NotImplementedError, RecursionError, mpmath.libmp.NoConvergence)
# mpmath keeps constants such as pi between calls, and is not safe in threads; verl scores in a pool of them.
_lock = threading.Lock()
_contexts: dict[int, Any] = {}


@contextmanager
def _computing(precision: int, max_bits: int, point: int) -> Iterator["_Computer"]:
    with _lock:
        yield _Computer(precision, max_bits, point)


class _Computer:
    """Values at one point of the variables: a Fraction where exact, else mpmath's numbers."""

    def __init__(self, precision: int, max_bits: int, point: int) -> None:
        if precision not in _contexts:
            _contexts[precision] = mpmath.MPContext()
            _contexts[precision].prec = precision
        self.mp = _contexts[precision]
        self.precision, self.max_bits, self.point = precision, max_bits, point

    def value(self, node: Node) -> Any:
        if node.op == "number":
            return node.value
        if node.op == "symbol":
            return self._symbol(str(node.value))
        if node.op == "at_first_point":
            return _Computer(self.precision, self.max_bits, 0).value(node.args[0])
        args = [self.value(arg) for arg in node.args]
        return self._checked(
            self._of_bounded(node.op, *args) if node.op in FUNCTIONS else getattr(self, f"_{node.op}")(*args)
        )

    def is_zero(self, value: Any, scale: Any) -> bool:
        """Whether a difference is 0 beside one of its sides."""
        if isinstance(value, Fraction):
            return value == 0
        size = max(1, abs(self._inexact(scale))) if not isinstance(scale, Fraction) else max(1, abs(scale).__ceil__())
        return bool(abs(value) <= self.mp.ldexp(self.mp.mpf(size), -self.precision // 2))

    def is_complex(self, value: Any) -> bool:
        return isinstance(value, self.mp.mpc)

    def _checked(self, value: Any) -> Any:
        """The value if it is of bounded size; 0 where rounding alone keeps it from that."""
        if isinstance(value, Fraction):
            if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_EXACT_BITS:
                raise Unclear("too large a number")
            return value
        if self.is_complex(value) and abs(value.imag) <= abs(value) * self.mp.ldexp(1, -self.precision * 3 // 4):
            value = value.real
        if not self.mp.isfinite(value):
            raise Unclear("no finite value")
        magnitude = self.mp.mag(value)  # minus infinity for 0
        if magnitude < -self.precision * 3 // 4:
            return Fraction(0)
        if abs(magnitude) > self.precision // 4:
            raise TooFine
        return value

    def _inexact(self, value: Any) -> Any:
        if not isinstance(value, Fraction):
            return value
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > self.max_bits:
            raise TooFine
        return self.mp.mpf(value.numerator) / value.denominator

    def _symbol(self, name: str) -> Any:
        if name == "e":
            return self.mp.e + 0
        if name == "i":
            return self.mp.mpc(0, 1)
        digest = blake2b(f"{self.point} {name}".encode("utf-8", "replace"), digest_size=5).digest()
        value = Fraction(int.from_bytes(digest[:2], "big") % 97 + 2, digest[2] % 31 + 5)
        is_negative = self.point == 2 or (self.point > 2 and digest[3] & 1)  # first all positive, then all negative
        return -value if is_negative else value

    def _pi(self) -> Any:
        return self.mp.pi + 0

    def _add(self, *terms: Any) -> Any:
        exact = sum((term for term in terms if isinstance(term, Fraction)), Fraction(0))
        inexact = [term for term in terms if not isinstance(term, Fraction)]
        return sum(inexact, self._inexact(exact)) if inexact else exact

    def _multiply(self, *factors: Any) -> Any:
        exact = Fraction(1)
        for factor in factors:
            exact = self._checked(exact * factor) if isinstance(factor, Fraction) else exact
        inexact = [factor for factor in factors if not isinstance(factor, Fraction)]
        return self.mp.fprod([self._inexact(exact), *inexact]) if inexact and exact else exact

    def _divide(self, left: Any, right: Any) -> Any:
        if right == 0:
            raise ZeroDivisionError
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left / right
        return self._inexact(left) / self._inexact(right)

    def _power(self, base: Any, exponent: Any) -> Any:
        if isinstance(exponent, Fraction):
            if exponent.denominator == 1:
                return self._whole_power(base, exponent.numerator)
            if isinstance(base, Fraction) or not self.is_complex(base):
                return self._whole_power(self._root(base, Fraction(exponent.denominator)), exponent.numerator)
        if base == 0:
            raise Unclear("a power of 0")
        return self._of_bounded("exp", self._multiply(exponent, self._ln(base)))

    def _whole_power(self, base: Any, exponent: int) -> Any:
        if isinstance(base, Fraction):
            if base == 0 and exponent <= 0:
                raise ZeroDivisionError
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(base) != 1 and base != 0 and bits * abs(exponent) > 2 * MAX_EXACT_BITS:
                raise Unclear("too large a power")
            return base**exponent if abs(base) != 1 else base ** (exponent % 2)
        if abs(exponent).bit_length() > MAX_ARGUMENT_BITS:
            raise Unclear("too large a power")
        return base**exponent

    def _root(self, base: Any, index: Any) -> Any:
        """Real where there is a real one: odd roots of negative numbers too."""
        if not isinstance(index, Fraction) or index.denominator != 1 or not 1 <= index <= MAX_FACTORIAL:
            raise Unclear("not a root")
        degree = index.numerator
        if not self.is_complex(base) and base < 0 and degree % 2:
            return -self._root(-base, index)
        if isinstance(base, Fraction) and base >= 0:
            above, below = _whole_root(base.numerator, degree), _whole_root(base.denominator, degree)
            if above is not None and below is not None:
                return Fraction(above, below)
        return self.mp.root(self._inexact(base), degree)

    def _factorial(self, value: Any) -> Any:
        if isinstance(value, Fraction) and value.denominator == 1:
            if not 0 <= value <= MAX_FACTORIAL:
                raise Unclear("a factorial out of bounds")
            return Fraction(math.factorial(value.numerator))
        self._check_gamma(value)
        return self.mp.factorial(self._inexact(value))

    def _binomial(self, above: Any, below: Any) -> Any:
        if all(isinstance(value, Fraction) and value.denominator == 1 for value in (above, below)):
            if not 0 <= above <= MAX_FACTORIAL or below < 0:
                raise Unclear("a binomial coefficient out of bounds")
            return Fraction(math.comb(above.numerator, below.numerator))
        self._check_gamma(above)
        self._check_gamma(below)
        return self.mp.binomial(self._inexact(above), self._inexact(below))

    def _check_gamma(self, value: Any) -> None:
        if abs(value) > MAX_GAMMA_ARGUMENT or self.precision > GAMMA_PRECISIONS[-1][0]:
            raise Unclear("a factorial out of bounds")

    def _abs(self, value: Any) -> Any:
        return abs(value)

    def _floor(self, value: Any) -> Any:
        if self.is_complex(value):
            raise Unclear("the floor of a complex number")
        return Fraction(math.floor(value) if isinstance(value, Fraction) else int(self.mp.floor(value)))

    def _ceil(self, value: Any) -> Any:
        return -self._floor(-value)

    def _ln(self, value: Any) -> Any:
        if value == 0:
            raise ZeroDivisionError
        return Fraction(0) if value == 1 else self.mp.ln(self._inexact(value))

    def _of_bounded(self, name: str, value: Any) -> Any:
        value = self._inexact(value)
        if value != 0 and self.mp.mag(value) > MAX_ARGUMENT_BITS:
            raise Unclear(f"{name} of a number out of bounds")
        return getattr(self.mp, name)(value)


def _whole_root(value: int, degree: int) -> int | None:
    """The root of a whole number if it is whole."""
    if value < 2 or degree == 1:
        return value
    if degree == 2:
        root = math.isqrt(value)
    else:
        root = 1 << -(-value.bit_length() // degree)  # Newton's method from above, in whole numbers
        while (better := ((degree - 1) * root + value // root ** (degree - 1)) // degree) < root:
            root = better
    return root if root**degree == value else None
