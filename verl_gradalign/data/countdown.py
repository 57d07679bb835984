# SPDX-License-Identifier: Apache-2.0
"""Countdown: reach a target from given numbers with + - * /, each number used exactly once. Problems and checks.

Problems are drawn from a seed, are distinct, and come with a solution. A response is right if its last boxed
expression is a solution. Expressions are parsed, never evaluated as Python, and computed in exact fractions.

    problem = draw_countdown_problems(1, seed=0)[0]
    problem.question, problem.truth, problem.solution
    is_right_countdown_answer(f"Thus \\\\boxed{{{problem.solution}}}.", problem.truth)
"""

import ast
import itertools
import json
import operator
import random
import re
from dataclasses import dataclass
from fractions import Fraction

from verl_gradalign.data.math_answers import find_last_boxed

NUMBER_COUNTS = (3, 4)
MAX_NUMBER = 99
MIN_TARGET, MAX_TARGET = 10, 100
# Longer than any sensible answer of a handful of numbers, and short enough that no expression is costly.
MAX_EXPRESSION_CHARS = 200
MAX_DRAWS_PER_PROBLEM = 10_000
# All orders of four numbers are some thousand steps; of six numbers not all are tried.
MAX_SEARCH_STEPS = 100_000

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = {"+": operator.add, "*": operator.mul, "-": operator.sub, "/": operator.truediv}
LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
SPELLINGS = {r"\times": "*", r"\cdot": "*", "\u00d7": "*", r"\div": "/", "\u00f7": "/", "\u2212": "-"}
SPELLINGS |= dict.fromkeys((r"\left", r"\right", r"\,", "$"), "")


@dataclass(frozen=True)
class CountdownProblem:
    """Numbers in rising order, the target, and one solution (empty where none is known)."""

    numbers: tuple[int, ...]
    target: int
    solution: str = ""

    @property
    def question(self) -> str:
        """The problem in words; equal for equal problems, since the numbers are in order."""
        return (
            f"Using each of the numbers {', '.join(map(str, self.numbers))} exactly once, write an expression that "
            f"equals {self.target}. Use only + - * / and parentheses."
        )

    @property
    def truth(self) -> str:
        """What the reward needs to know, as JSON text."""
        return json.dumps({"numbers": list(self.numbers), "target": self.target})


def draw_countdown_problems(num: int, seed: int) -> list[CountdownProblem]:
    """Return `num` distinct solvable problems; for one seed, the first of a longer list are those of a shorter one.

    Three or four numbers from 1 to 99, a target from 10 to 100; a solution's steps are whole and not negative.
    Raises: ValueError if `num` is negative, or distinct problems run out.
    """
    if num < 0:
        raise ValueError(f"num={num} must not be negative; ask for at least 0 problems")
    rng = random.Random(f"countdown {seed}")
    problems: dict[str, CountdownProblem] = {}
    while len(problems) < num:
        draws = (_draw_problem(rng) for _ in range(MAX_DRAWS_PER_PROBLEM))
        problem = next((drawn for drawn in draws if drawn and drawn.question not in problems), None)
        if problem is None:
            raise ValueError(f"no new Countdown problem after {len(problems)} of num={num}; ask for fewer problems")
        problems[problem.question] = problem
    return list(problems.values())


def _draw_problem(rng: random.Random) -> CountdownProblem | None:
    numbers = [rng.randint(1, MAX_NUMBER) for _ in range(rng.choice(NUMBER_COUNTS))]
    terms = [(number, str(number)) for number in numbers]
    while len(terms) > 1:
        (left, left_text), (right, right_text) = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        values = {"+": left + right, "*": left * right}
        if left >= right:
            values["-"] = left - right
        if right and left % right == 0:
            values["/"] = left // right
        sign = rng.choice(sorted(values))
        terms.append((values[sign], f"({left_text} {sign} {right_text})"))
    target, solution = terms[0]
    if not MIN_TARGET <= target <= MAX_TARGET:
        return None
    return CountdownProblem(tuple(sorted(numbers)), target, solution[1:-1])


def solve_countdown(truth: str) -> str | None:
    """Return an expression that solves the problem of a truth, or None if none was found.

    All ways are tried for four numbers and fewer, for more the first MAX_SEARCH_STEPS.
    Raises: ValueError if `truth` is not what `CountdownProblem.truth` gives.
    """
    numbers, target = _parse_truth(truth)
    steps = itertools.count()

    def search(terms: list[tuple[Fraction, str]]) -> str | None:
        if len(terms) == 1:
            return terms[0][1] if terms[0][0] == target else None
        for i, j in itertools.permutations(range(len(terms)), 2):
            if next(steps) > MAX_SEARCH_STEPS:
                return None
            (left, left_text), (right, right_text) = terms[i], terms[j]
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            for sign, compute in SIGNS.items():
                if (sign in "+*" and i > j) or (sign == "/" and not right):
                    continue
                found = search([*rest, (compute(left, right), f"({left_text} {sign} {right_text})")])
                if found is not None:
                    return found
        return None

    solution = search([(Fraction(number), str(number)) for number in numbers])
    return solution[1:-1] if solution and solution.startswith("(") else solution


def compute_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Return the exact value of an expression in + - * / and parentheses, and the numbers it uses in order.

    LaTeX spellings of the four signs and of fractions are understood. None for anything else: other characters or
    signs (powers, `//`, names, decimals), a division by zero, more than MAX_EXPRESSION_CHARS characters.
    """
    if len(text) > MAX_EXPRESSION_CHARS:
        return None
    for latex, sign in SPELLINGS.items():
        text = text.replace(latex, sign)
    while (plain := LATEX_FRACTION.sub(r"((\1)/(\2))", text)) != text:
        text = plain
    if not re.fullmatch(r"[\d+\-*/()\s]+", text, re.ASCII):
        return None
    numbers: list[int] = []
    try:
        return _compute(ast.parse(text.strip(), mode="eval").body, numbers), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _compute(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return Fraction(OPERATORS[type(node.op)](_compute(node.left, numbers), _compute(node.right, numbers)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_compute(node.operand, numbers)
    raise ValueError("not one of + - * /")


def is_right_countdown_answer(response: str, truth: str) -> bool:
    """Return whether the last boxed expression uses each number of `truth` exactly once and equals its target.

    A closing `= target` inside the box is allowed.
    Raises: ValueError if `truth` is not what `CountdownProblem.truth` gives.
    """
    numbers, target = _parse_truth(truth)
    boxed = find_last_boxed(response)
    if boxed is None:
        return False
    expression, equals_sign, result = boxed.partition("=")
    if equals_sign and result.strip() != str(target):
        return False
    computed = compute_expression(expression)
    return computed is not None and computed[0] == target and sorted(computed[1]) == numbers


def _parse_truth(truth: str) -> tuple[list[int], int]:
    try:
        parsed = json.loads(truth)
        return sorted(int(number) for number in parsed["numbers"]), int(parsed["target"])
    except (ValueError, TypeError, KeyError) as error:
        remedy = 'write it as {"numbers": [3, 5, 7], "target": 26}, or prepare the data again'
        raise ValueError(f"ground_truth={truth!r} is not a Countdown problem; {remedy}") from error
