# SPDX-License-Identifier: Apache-2.0
"""Responses and truths of which it is known, by how they are made, whether the response is right.

Made-up answers like MATH's, each kind in many spellings, with neighbours that are wrong; and GSM8K's, from its file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

MINUS, THIN, NARROW, DEGREE, ROOT, PI, TIMES = "\u2212", "\u2009", "\u202f", "\u00b0", "\u221a", "\u03c0", "\u00d7"
SUPERSCRIPTS = str.maketrans("0123456789-", "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b")
VULGAR = {Fraction(1, 2): "\u00bd", Fraction(3, 4): "\u00be", Fraction(1, 3): "\u2153", Fraction(5, 8): "\u215d"}
STATED = (r"So we get \boxed{%s}.", r"Thus \[ \boxed{%s} \]", "The final answer is $%s$.", "Answer: %s")


@dataclass(frozen=True)
class Pair:
    """A response to a problem with its truth; `rule` is the data source's ("math" or "last_number")."""

    kind: str
    response: str
    truth: str
    is_right: bool
    rule: str = "math"


@dataclass(frozen=True)
class Made:
    """One problem's answer: spellings that are right, and answers that are wrong.

    Any of the right ones may be the truth, or the first alone: A is right where the truth is `A`, not the reverse.
    """

    right: tuple[str, ...]
    wrong: tuple[str, ...]
    first_is_truth: bool = False


def latex(value: Fraction, command: str = "frac") -> str:
    """Return a fraction as LaTeX, a whole number as digits."""
    sign = "-" if value < 0 else ""
    whole = value.denominator == 1
    return f"{sign}{abs(value)}" if whole else rf"{sign}\{command}{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _whole(rng: random.Random) -> Made:
    n = rng.randint(1000, 10**9)
    thousands = f"{n:,}"
    right = (str(n), thousands, thousands.replace(",", "{,}"), thousands.replace(",", r"\,"))
    right += (thousands.replace(",", THIN), thousands.replace(",", NARROW), f"x = {n}", f"{n}.0", rf"\text{{{n}}}")
    return Made(right, (str(n + 1), str(-n), str(n * 10), f"{n}, {n + 1}", f"{n + 1:,}"))


def _huge(rng: random.Random) -> Made:
    n = rng.randint(10**30, 10**60)
    return Made((str(n), f"{n:,}"), (str(n + 1), str(n - 1), str(-n)))


def _negative(rng: random.Random) -> Made:
    n = rng.randint(1, 9999)
    right = (f"-{n}", f"{MINUS}{n}", f"\u2013{n}", f"\uff0d{n}", f"- {n}", f"-{n}.0")
    return Made(right, (str(n), f"-{n + 1}", f"+{n}", rf"\pm {n}"))


def _fraction(rng: random.Random) -> Made:
    value = Fraction(rng.randint(1, 200), rng.choice((2, 3, 4, 7, 8, 9, 16, 25)))
    n, d = value.numerator, value.denominator
    right = [latex(value), latex(value, "dfrac"), latex(value, "tfrac"), f"{n}/{d}", rf"\frac{{{3 * n}}}{{{3 * d}}}"]
    if 10**6 % d == 0:
        right.append(str(float(value)))
    if value > 1 and d > 1:
        whole, rest = divmod(n, d)
        right += [rf"{whole}\frac{{{rest}}}{{{d}}}", f"{whole} {rest}/{d}"]
        right += [f"{whole}{VULGAR[Fraction(rest, d)]}"] if Fraction(rest, d) in VULGAR else []
    wrong = (latex(-value), latex(1 / value) if n != d else "2", latex(value + 1), rf"\frac{{{n + 1}}}{{{d}}}")
    return Made(tuple(right), wrong)


def _repeating(rng: random.Random) -> Made:
    n, d = rng.randint(1, 98), 99
    digits = f"{n:02d}"
    value = Fraction(n, d)
    right = (latex(value), rf"0.\overline{{{digits}}}", f"0.({digits})", rf"0.\dot{{{digits[0]}}}\dot{{{digits[1]}}}")
    return Made(right, (f"0.{digits}", f"0.{digits * 2}", latex(value + Fraction(1, 100))))


def _percent(rng: random.Random) -> Made:
    n = rng.randint(1, 99)
    return Made(
        (rf"{n}\%", f"{n}%", str(n), str(n / 100), rf"{n}\text{{ percent}}"), (rf"{n + 1}\%", rf"{n / 100}\%"), True
    )


def _money(rng: random.Random) -> Made:
    n = rng.randint(1, 999)
    right = (f"{n}.50", rf"\${n}.50", f"\u20ac{n}.5", f"\u00a3{n}.50", rf"\${n}.5", f"{n}.50 dollars")
    return Made(right, (rf"\${n}.05", f"{n}", f"\u20ac{n + 1}.50"), True)


def _surd(rng: random.Random) -> Made:
    a, b, c = rng.randint(1, 20), rng.randint(2, 9), rng.choice((2, 3, 5, 7))
    right = (rf"{a}+{b}\sqrt{{{c}}}", rf"{b}\sqrt{{{c}}} + {a}", rf"{a}+\sqrt{{{b * b * c}}}", f"{a}+{b}{ROOT}{c}")
    right += (rf"{a} + {b}\cdot\sqrt{c}",)
    wrong = (rf"{a}-{b}\sqrt{{{c}}}", rf"{a}+{b}\sqrt{{{c + 1}}}", f"{a + b}", rf"{a}+{b}\sqrt[3]{{{c}}}")
    return Made(right, wrong)


def _pi(rng: random.Random) -> Made:
    n, d = rng.randint(2, 40), rng.choice((3, 7))
    n += n % d == 0
    right = (rf"\frac{{{n}\pi}}{{{d}}}", rf"\frac{{{n}}}{{{d}}}\pi", f"{n}{PI}/{d}", rf"{n}\pi/{d}")
    return Made(right, (rf"\frac{{{n}}}{{{d}}}", rf"\frac{{{n + d}\pi}}{{{d}}}", rf"-\frac{{{n}\pi}}{{{d}}}"))


def _power(rng: random.Random) -> Made:
    n = rng.randint(60, 400)
    right = (
        rf"\frac{{1}}{{2^{{{n}}}}}",
        f"2^{{-{n}}}",
        f"2{str(-n).translate(SUPERSCRIPTS)}",
        rf"\left(\frac12\right)^{{{n}}}",
    )
    return Made(right, (f"2^{{-{n + 1}}}", rf"\frac{{1}}{{2^{{{n}}}+1}}", f"2^{{{n}}}", "0"))


def _scientific(rng: random.Random) -> Made:
    m, e = rng.randint(11, 99), rng.randint(3, 9)
    right = (rf"{m / 10} \times 10^{{{e}}}", f"{m / 10}{TIMES}10^{e}", str(m * 10 ** (e - 1)), f"{m / 10}e{e}")
    return Made(right, (rf"{m / 10} \times 10^{{{e + 1}}}", rf"{m / 10} \times 10^{{-{e}}}"))


def _polynomial(rng: random.Random) -> Made:
    a, b = rng.randint(1, 9), rng.randint(10, 19)
    right = (f"x^2+{a + b}x+{a * b}", f"(x+{a})(x+{b})", f"{a * b}+{a + b}x+x^2", f"x\u00b2 + {a + b}x + {a * b}")
    return Made(right, (f"x^2-{a + b}x+{a * b}", f"(x+{a})(x-{b})", f"x^2+{a + b}x", f"y^2+{a + b}y+{a * b}"))


def _line(rng: random.Random) -> Made:
    m, c = rng.randint(2, 9), rng.randint(1, 9)
    right = (f"y={m}x+{c}", f"y = {c} + {m}x", f"{m}x-y+{c}=0", f"{m}x - y = -{c}")
    return Made(right, (f"y={m}x-{c}", f"{m}x+y+{c}=0", f"y={m + 1}x+{c}", str(c)))


def _interval(rng: random.Random) -> Made:
    a, b = rng.randint(-9, 0), rng.randint(1, 9)
    right = (f"({a},{b}]", rf"\left({a}, {b}\right]", rf"{a} < x \le {b}", rf"x \in ({a},{b}]")
    return Made(right, (f"({a},{b})", f"[{a},{b}]", f"({a},{b + 1}]", f"({b},{a}]"))


def _half_line(rng: random.Random) -> Made:
    a = rng.randint(-9, 9)
    right = (f"x<{a}", rf"(-\infty,{a})", rf"x \in (-\infty, {a})", f"{a} > x")
    return Made(right, (f"x>{a}", rf"x \le {a}", rf"(-\infty,{a}]", rf"({a},\infty)", f"x<{a + 1}"))


def _values(rng: random.Random) -> Made:
    a, b, c = sorted(rng.sample(range(-50, 50), 3))
    right = (f"{a}, {b}, {c}", f"{c},{a},{b}", rf"{b}, {a}, \text{{ and }} {c}", rf"x={a},{b},{c}")
    return Made(right, (f"{a}, {b}", f"{a}, {b}, {c + 1}", f"{a}, {b}, {c}, {c + 1}", str(a)))


def _set(rng: random.Random) -> Made:
    a, b, c = rng.sample(range(100), 3)
    right = (rf"\{{{a},{b},{c}\}}", rf"\left\{{{c}, {a}, {b}\right\}}", rf"\lbrace {b},{a},{c}\rbrace")
    return Made(right, (rf"\{{{a},{b}\}}", rf"\{{{a},{b},{c + 100}\}}", rf"\{{{a}\}}", r"\emptyset"))


def _tuple(rng: random.Random) -> Made:
    a, b, c = rng.sample(range(1, 100), 3)
    right = (f"({a},{b},{c})", rf"\left({a}, {b}, {c}\right)", f"( {a} , {b} , {c} )")
    return Made(right, (f"({b},{a},{c})", f"({a},{b})", f"({a},{b},{c + 1})", f"({a},{b},-{c})"))


def _plus_minus(rng: random.Random) -> Made:
    a, b = rng.randint(1, 30), rng.choice((2, 3, 5, 7))
    right = (rf"{a}\pm\sqrt{{{b}}}", rf"{a}+\sqrt{b}, {a}-\sqrt{b}", rf"{a} \pm {ROOT}{b}", rf"x={a}\pm\sqrt{b}")
    return Made(right, (rf"{a}+\sqrt{{{b}}}", rf"-{a}\pm\sqrt{{{b}}}", rf"{a}\pm\sqrt{{{b + 1}}}", str(a)))


def _base(rng: random.Random) -> Made:
    digits = "".join(rng.choices("123456", k=4))
    right = (f"{digits}_7", f"{digits}_{{7}}", rf"{digits}_{{\text{{seven}}}}")
    return Made(right, (f"{digits}_8", f"{digits}_9", str(int(digits, 7)), f"{int(digits) + 1}_8"))


def _choice(rng: random.Random) -> Made:
    letter, other = rng.sample("ABCDE", 2)
    right = (letter, f"({letter})", rf"\text{{{letter}}}", rf"\textbf{{({letter})}}", f"{letter}. both sides")
    wrong = (other, f"{letter}, {other}", f"{letter} or {other}", rf"{letter}\text{{ and }}{other}", "A, B, C, D, E")
    return Made(right, wrong, True)


def _words(rng: random.Random) -> Made:
    word, other = rng.sample(
        ("Friday", "Monday", "even", "odd", "True", "False", "no solution", "ellipse", "circle"), 2
    )
    return Made((word, rf"\text{{{word}}}", word.lower(), rf"\textbf{{{word}}}"), (other, f"not {word}", word[::-1]))


def _unit(rng: random.Random) -> Made:
    n = rng.randint(2, 99)
    right = (rf"{n}\text{{ cm}}^2", str(n), rf"{n}\,\mathrm{{cm}}^2", f"{n} cm\u00b2", f"{n} square centimeters")
    return Made(right, (rf"{n}\text{{ cm}}", rf"{n}\text{{ m}}^2", rf"{n + 1}\text{{ cm}}^2"), True)


def _degrees(rng: random.Random) -> Made:
    n = rng.randint(1, 180)
    right = (rf"{n}^\circ", f"{n}{DEGREE}", rf"{n}\degree", str(n), rf"{n}^{{\circ}}", f"{n} degrees")
    return Made(right, (rf"{n + 1}^\circ", f"-{n}{DEGREE}"))


def _root_index(rng: random.Random) -> Made:
    n = rng.randint(2, 12)
    return Made(
        (str(n), rf"\sqrt[3]{{{n**3}}}", f"\u221b{n**3}", rf"\sqrt{{{n * n}}}"),
        (rf"\sqrt[3]{{{n**2}}}", rf"\sqrt{{{n**3}}}"),
    )


def _function(rng: random.Random) -> Made:
    n = rng.randint(2, 9)
    right = (rf"{n}\sin 2x", rf"{2 * n}\sin x\cos x", rf"{n}\sin(2x)", rf"{2 * n}\cos(x)\sin(x)")
    return Made(right, (rf"{n}\cos 2x", rf"{n}\sin x", rf"{2 * n}\sin x", rf"{n}\sin 3x"))


def _logarithm(rng: random.Random) -> Made:
    n = rng.randint(2, 9)
    return Made(
        (rf"{n}\ln 2", rf"\ln {2**n}", rf"\ln 2^{{{n}}}"), (rf"{n + 1}\ln 2", rf"\ln {n}", str(n), rf"{n}\ln 3")
    )


def _complex(rng: random.Random) -> Made:
    a, b = rng.randint(1, 9), rng.randint(2, 9)
    return Made(
        (f"{a}+{b}i", f"{b}i+{a}", rf"{a} + {b}\mathrm{{i}}"), (f"{a}-{b}i", f"-{a}+{b}i", f"{a + b}", f"{a}+{b}")
    )


def _matrix(rng: random.Random) -> Made:
    a, b, c, d = rng.sample(range(1, 50), 4)
    matrix = r"\begin{%smatrix} %s & %s \\ %s & %s \end{%smatrix}"
    right = (matrix % ("p", a, b, c, d, "p"), matrix % ("b", a, b, c, d, "b"), matrix % ("p", a, b, f"{c}.0", d, "p"))
    return Made(right, (matrix % ("p", b, a, c, d, "p"), matrix % ("p", a, c, b, d, "p"), str(a)))


KINDS: dict[str, Callable[[random.Random], Made]] = {
    make.__name__[1:]: make
    for make in (
        *(_whole, _huge, _negative, _fraction, _repeating, _percent, _money, _surd, _pi, _power, _scientific),
        *(_polynomial, _line, _interval, _half_line, _values, _set, _tuple, _plus_minus, _base, _choice, _words),
        *(_unit, _degrees, _root_index, _function, _logarithm, _complex, _matrix),
    )
}
# What can be taken for right, and is not paid: the reason, an answer and a truth.
NOT_PAID = {
    "rounded": ("a decimal is exactly what it says", "0.333333", r"\frac{1}{3}"),
    "rounded root": ("a decimal is exactly what it says", "1.414214", r"\sqrt{2}"),
    "a set for a pair": ("a pair has an order, and a set has none", r"\{3, 5\}", "(3,5)"),
    "repeated": ("a list that names a value twice is another list", "2, 2, 3", "2, 3"),
    "log without base": ("its base is not said: 10 in school, e elsewhere", r"\log x", r"\ln x"),
    "integral": ("integrals, sums and limits are not computed, only compared as text", r"\int_0^1 2x\,dx", "1"),
    "improper mixed number": (r"2\frac{5}{3} may be a sum or a product", r"2\frac{5}{3}", r"\frac{11}{3}"),
    "slash before a product": ("1/ab may be 1/a times b", "1/ab", r"\frac{1}{ab}"),
    "equation in its unknown": ("2x+3=5 says that x is 1", "2x+3=5", "5"),
    "decimal comma": ("3,5 is a list of 3 and 5", "3,5", "3.5"),
    "ratio as a fraction": ("3:20 may be a ratio or a time of day", "3:20", r"\frac{3}{20}"),
    "unknown function": ("f(x) may be a value of f or a product, and is only compared as text", "f(x)+1", "1+f(x)"),
    "base left out": ("digits without a base are decimal", "1011", "1011_2"),
}


def made_up_pairs(num_problems: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[Pair]:
    """Yield pairs of `num_problems` problems of each kind: every spelling against the truth, every wrong answer too."""
    for kind in kinds:
        rng = random.Random(f"{seed} {kind}")
        for _ in range(num_problems):
            made = KINDS[kind](rng)
            truth = made.right[0] if made.first_is_truth or rng.random() < 0.7 else rng.choice(made.right)
            for answers, is_right in ((made.right, True), (made.wrong, False)):
                for answer in answers:
                    yield Pair(kind, rng.choice(STATED) % answer, truth, is_right)


def gsm8k_pairs(path: Path, num_problems: int, seed: int) -> Iterator[Pair]:
    """Yield pairs of GSM8K: the reference solution, other right endings, and endings with a neighbour of the truth."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rng = random.Random(f"{seed} gsm8k")
    for row in rng.sample(rows, min(num_problems, len(rows))):
        solution, _, tail = row["answer"].rpartition("####")
        truth = tail.strip().replace(",", "")
        value = int(truth)
        yield Pair("gsm8k reference", row["answer"], truth, True, "last_number")
        right = (
            f"{value:,}",
            f"{value}.00",
            f"${value}",
            f"{value} dollars",
            f"{value}\nCheck: 40 - 4 = 36",
            f"**{value}**",
        )
        for ending in right:
            yield Pair("gsm8k spelled otherwise", f"{solution}#### {ending}", truth, True, "last_number")
        for wrong in (value + 1, -value if value else 1, value * 10, value + 1000):
            yield Pair("gsm8k neighbour", f"{solution}#### {wrong}", truth, False, "last_number")
        yield Pair("gsm8k neighbour", f"{solution}#### {MINUS}{abs(value) + (value < 1)}", truth, False, "last_number")
