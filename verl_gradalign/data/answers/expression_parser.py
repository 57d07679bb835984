# SPDX-License-Identifier: Apache-2.0
r"""Expressions, from tokens.

Whatever has two readings raises `Unclear`: `1/ab`, `\frac123`, `\sqrt12`, `f(x)`, `x2`, two numbers side by side. A
slash between whole numbers divides these alone (`1/3x` is a third of x), and a whole number before a proper fraction
makes a mixed number.

    Parser(tokenize(r"2\frac{1}{2}")).parse_all()  # the Node of 5/2
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from verl_gradalign.data.answers.expressions import FUNCTIONS, Node, Unclear, divide, multiply, number, power
from verl_gradalign.data.answers.tokens import ACCENTS, APPLIED, CALLED, Token, matching

MAX_DEPTH = 40


def _negated(node: Node) -> Node:
    return number(-node.value) if isinstance(node.value, Fraction) else multiply(number(-1), node)


class Parser:
    """Reads expressions off a list of tokens, from `position` on."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.position = self.depth = self.num_bars = self.num_functions = 0

    def parse_all(self) -> Node:
        """Return the expression that all tokens make. Raises: Unclear if they make none."""
        node = self.parse_sum()
        if self.position < len(self.tokens):
            raise Unclear(f"{self.tokens[self.position].text} is left over")
        return node

    def parse_sum(self) -> Node:
        """Return the sum that starts here and goes as far as it can."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unclear("too deep")
        terms = [self._signed_term()]
        while self._peek() in ("+", "-"):
            terms.append(self._signed_term())
        self.depth -= 1
        return Node("add", tuple(terms)) if len(terms) > 1 else terms[0]

    def _peek(self, ahead: int = 0) -> str:
        position = self.position + ahead
        return self.tokens[position].text if position < len(self.tokens) else ""

    def _kind(self, ahead: int = 0) -> str:
        position = self.position + ahead
        return self.tokens[position].kind if position < len(self.tokens) else ""

    def _next(self) -> Token:
        if self.position >= len(self.tokens):
            raise Unclear("something is missing at the end")
        self.position += 1
        return self.tokens[self.position - 1]

    def _expect(self, text: str) -> None:
        if (token := self._next()).text != text:
            raise Unclear(f"{token.text} instead of {text}")

    def _signed_term(self) -> Node:
        is_negative = False
        for _ in range(2):  # at most two signs: 5 - -3
            if self._peek() in ("+", "-"):
                is_negative ^= self._next().text == "-"
        term = self._term()
        return _negated(term) if is_negative else term

    def _term(self) -> Node:
        start = self.position
        node = self._factor()
        may_follow = True  # whether a factor may follow without a sign
        while True:
            if self._peek() == "*":
                self._next()
                node, may_follow = multiply(node, self._signed_factor()), True
            elif self._peek() == "/":
                self._next()
                is_whole = all(
                    token.kind == "number" for token in (self.tokens[start], *self.tokens[start + 2 : start + 3])
                )
                may_follow = is_whole and self.position == start + 2
                node = divide(node, self._signed_factor())
                may_follow &= self.position == start + 3
            elif self._starts_factor():
                if not may_follow:
                    raise Unclear("a product behind a slash")
                node = multiply(node, self._factor())
            else:
                return node

    def _signed_factor(self) -> Node:
        if self._peek() == "-":
            self._next()
            return _negated(self._factor())
        return self._factor()

    def _starts_factor(self) -> bool:
        """Whether a factor starts here that may follow another one without a sign; a number only as in `2!3!`."""
        text, kind = self._peek(), self._kind()
        if kind == "number":
            return self._peek(-1) == "!"
        if kind == "command":
            name = text[1:]
            return name in CALLED or name in ACCENTS or name in ("sqrt", "frac", "pi", "binom", "lfloor", "lceil")
        return kind == "symbol" or text in ("(", "[", "{") or (text == "|" and not self.num_bars)

    def _factor(self) -> Node:
        start = self.position
        node = self._atom()
        if self._kind(-1) == "number" and self.position == start + 1:
            node = self._mixed(node)
        if self._peek() == "^":
            self._next()
            node = power(node, self._exponent())
            if self._peek() == "^":
                raise Unclear("a power of a power")
        while self._peek() == "!":
            self._next()
            node = Node("factorial", (node,))
        if self._peek() == r"\degree" and self.num_functions:
            self._next()
            node = multiply(node, divide(Node("pi"), number(180)))
        if self._peek() in ("'", "_", "^"):
            raise Unclear(f"{self._peek()} behind {self.tokens[self.position - 1].text}")
        return node

    def _mixed(self, whole: Node) -> Node:
        r"""A mixed number if a proper fraction follows a whole one: `2 3/4`, `2\frac{3}{4}`; else the number itself."""
        if self._kind() == "number" and self._peek(1) == "/" and self._kind(2) == "number":
            parts = self.tokens[self.position].value, self.tokens[self.position + 2].value
            self.position += 3
        elif self._peek() == r"\frac":
            start = self.position
            node = self._factor()
            values = [arg.value for arg in node.args if arg.op == "number"]
            if node.op != "divide" or len(values) != 2:
                self.position = start
                return whole
            parts = values[0], values[1]  # type: ignore[assignment]  # numbers have Fractions
        elif self._kind() == "number":
            raise Unclear("two numbers side by side")
        else:
            return whole
        numerator, denominator = parts
        are_whole = all(v is not None and v.denominator == 1 for v in (whole.value, *parts))  # type: ignore[union-attr]
        if not are_whole or not 0 < numerator < denominator:  # type: ignore[operator]
            raise Unclear("a number before a fraction that makes no mixed number")
        return number(whole.value + numerator / denominator)  # type: ignore[operator]

    def _exponent(self) -> Node:
        if self._peek() in ("+", "-"):
            is_negative = self._next().text == "-"
            exponent = self._atom()
            return _negated(exponent) if is_negative else exponent
        if self._peek() == r"\text" or self._kind() == "word":
            raise Unclear("a word as exponent")
        return self._atom()

    def _atom(self) -> Node:
        token = self._next()
        if token.kind == "number":
            return number(token.value)  # type: ignore[arg-type]  # numbers have values
        if token.kind == "symbol" or (token.kind == "word" and len(token.text) == 1):
            return self._symbol(token.text)
        if token.text in ("(", "[", "{"):
            self.position -= 1
            return self._group()
        if token.text == "|":
            self.num_bars += 1
            node = self.parse_sum()
            self._expect("|")
            self.num_bars -= 1
            return Node("abs", (node,))
        if token.kind != "command":
            raise Unclear(f"{token.text} starts no expression")
        return self._command(token.text[1:])

    def _group(self) -> Node:
        closing = {"(": ")", "[": "]", "{": "}"}[self._next().text]
        num_bars, self.num_bars = self.num_bars, 0
        node = self.parse_sum()
        self.num_bars = num_bars
        self._expect(closing)
        return node

    def _symbol(self, name: str) -> Node:
        if name in APPLIED and self._peek() == "(":
            raise Unclear(f"{name}(...) is a function that is not known")
        if self._peek() == "_":
            self._next()
            name += f"_{self._raw()}"
        return Node("symbol", value=name)

    def _raw(self) -> str:
        """The text of one token or group, unread."""
        if self._peek() != "{":
            return self._next().text
        start, self.position = self.position, matching(self.tokens, self.position) + 1
        return "".join(token.text for token in self.tokens[start + 1 : self.position - 1])

    def _command(self, name: str) -> Node:
        if name == "pi":
            return Node("pi")
        if name == "frac":
            return divide(*self._two_arguments())
        if name == "binom":
            return Node("binomial", self._two_arguments())
        if name == "sqrt":
            return self._root()
        if name in ("lfloor", "lceil"):
            node = self.parse_sum()
            self._expect(rf"\r{name[1:]}")
            return Node("floor" if name == "lfloor" else "ceil", (node,))
        if name in ACCENTS:
            return self._symbol(rf"\{name} {self._raw()}")
        if name in CALLED:
            return self._called(CALLED[name])
        raise Unclear(f"\\{name} is not known")

    def _two_arguments(self) -> tuple[Node, Node]:
        r"""The arguments of \frac: groups, or single digits and letters; `\frac12` is a half."""
        token = self.tokens[self.position] if self.position < len(self.tokens) else None
        if token and token.kind == "number" and re.fullmatch(r"\d\d", token.text):
            self.position += 1
            return number(int(token.text[0])), number(int(token.text[1]))
        return self._argument(), self._argument()

    def _argument(self) -> Node:
        if self._peek() == "{":
            return self._group()
        if self._kind() == "number" and len(self._peek()) > 1:
            raise Unclear("several digits where LaTeX takes one")
        return self._atom()

    def _root(self) -> Node:
        index = number(2)
        if self._peek() == "[":
            index = self._group()
        return Node("root", (self._group() if self._peek() == "(" else self._argument(), index))

    def _called(self, name: str) -> Node:
        base = Node("symbol", value=f"base of {name}")  # without a base, log is one to a base that is not said
        if name == "log" and self._peek() == "_":
            self._next()
            base = self._argument()
        exponent = None
        if self._peek() == "^":
            self._next()
            exponent = self._exponent()
            if exponent == number(-1):
                name, exponent = f"a{name}", None
        self.num_functions += 1
        argument = self._group() if self._peek() in ("(", "{") else self._tight_product()
        self.num_functions -= 1
        if name in ("log", "lg"):
            node = divide(Node("ln", (argument,)), Node("ln", (base,)))
        elif name == "ln" or name in FUNCTIONS:
            node = Node(name, (argument,))
        else:
            raise Unclear(f"{name} is not known")
        return node if exponent is None else power(node, exponent)

    def _tight_product(self) -> Node:
        """An argument without brackets: factors up to the next sign or function, as in `sin 2x cos y`."""
        node = self._factor()
        while self._starts_factor() and self._peek()[1:] not in CALLED and self._peek() not in ("(", "["):
            node = multiply(node, self._factor())
        return node
