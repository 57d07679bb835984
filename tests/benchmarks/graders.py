# SPDX-License-Identifier: Apache-2.0
"""Which right answers this package, math-verify and verl's own rules pay, and which wrong ones: a confusion table.

    python -m tests.benchmarks.graders --gsm8k path/to/gsm8k/test.jsonl --output confusion.md

Pairs are made by a seed (see `answer_pairs`); GSM8K's are left out without its file. verl's rules for MATH are
math_reward, math_dapo and prime_math, for GSM8K its own; math-verify grades both as its documentation shows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import subprocess
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("VERL_PLATFORM", "cpu")

from tests.benchmarks.answer_pairs import NOT_PAID, Pair, gsm8k_pairs, made_up_pairs
from verl_gradalign.data.rewards import RULES

OURS = "verl-gradalign"
PREFACE = """\
Whether an answer is right is known by how it is made. The kinds are those that this package means to understand, so the
table says where the rules differ, not how often they err on a model's responses. verl's math_reward reads boxes alone,
math_dapo compares what follows `Answer:` as text, and the rule for GSM8K what stands right behind `#### ` as text: most
of what these do not pay is written otherwise."""
Grader = Callable[[str, str], bool]
# Why a right answer that another rule pays is not paid here, by kind of the made-up pairs.
REASONS: dict[str, str] = {}
REASONS |= {kind: reason for kind, (reason, _, _) in NOT_PAID.items()}


def graders_of(rule: str) -> dict[str, Grader]:
    """Return the graders for a rule, ours first."""
    from verl.utils.reward_score import gsm8k, math_dapo, math_reward, prime_math

    others: dict[str, Grader] = {"math-verify": _math_verify}
    if rule == "last_number":
        others["verl gsm8k"] = lambda response, truth: gsm8k.compute_score(response, truth) == 1.0
    else:
        others["verl math_reward"] = lambda response, truth: math_reward.compute_score(response, truth) == 1.0
        others["verl math_dapo"] = lambda response, truth: bool(math_dapo.compute_score(response, truth)["acc"])
        others["verl prime_math"] = lambda response, truth: bool(prime_math.compute_score(response, truth)[0])
    return {OURS: RULES[rule], **others}


def _math_verify(response: str, truth: str) -> bool:
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{truth}}}"), parse(response)))


def grade(pairs: Iterable[Pair]) -> list[tuple[Pair, dict[str, bool]]]:
    """Return each pair with every grader's verdict; a grader that raises does not pay."""
    logging.disable(logging.WARNING)
    graders = {rule: graders_of(rule) for rule in RULES if rule != "countdown"}
    verdicts = []
    for pair in pairs:
        paid = {}
        for name, grader in graders[pair.rule].items():
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    paid[name] = grader(pair.response, pair.truth)
                except Exception:
                    if name == OURS:
                        raise
                    paid[name] = False
        verdicts.append((pair, paid))
    logging.disable(logging.NOTSET)
    return verdicts


def page(verdicts: Sequence[tuple[Pair, dict[str, bool]]], title: str, made_by: str = "") -> str:
    """Return the confusion tables as markdown: over all, by kind, and what others pay and this package does not."""
    lines = [f"# {title}", "", *([made_by, ""] if made_by else []), PREFACE, ""]
    for rule, what in (("math", "Made-up answers like MATH's"), ("last_number", "GSM8K")):
        of_rule = [(pair, paid) for pair, paid in verdicts if pair.rule == rule]
        if of_rule:
            lines += [f"## {what}", "", *_confusion(of_rule), "", *_by_kind(of_rule), ""]
    return "\n".join([*lines, *_not_paid(verdicts)]) + "\n"


def how_made(arguments: argparse.Namespace) -> str:
    """Return the command, without folders, and the commit."""
    given = {"gsm8k": arguments.gsm8k and arguments.gsm8k.name, "problems": arguments.problems}
    given |= {"gsm8k-problems": arguments.gsm8k_problems, "seed": arguments.seed}
    options = " ".join(f"--{name} {value}" for name, value in given.items() if value is not None)
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = ", ".join(f"{name} {version(name)}" for name in ("verl", "math-verify"))
    return f"    python -m tests.benchmarks.graders {options}\n\nCommit {done.stdout.strip() or 'unknown'}; {versions}."


def _confusion(verdicts: Sequence[tuple[Pair, dict[str, bool]]]) -> list[str]:
    lines = [
        "| rule | right, paid | right, not paid | wrong, paid | wrong, not paid |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in verdicts[0][1]:
        counts = Counter((pair.is_right, paid[name]) for pair, paid in verdicts)
        cells = (counts[True, True], counts[True, False], counts[False, True], counts[False, False])
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return lines


def _by_kind(verdicts: Sequence[tuple[Pair, dict[str, bool]]]) -> list[str]:
    """Right ones not paid + wrong ones paid, by kind."""
    names = list(verdicts[0][1])
    lines = ["Faults by kind: right ones not paid + wrong ones paid.", ""]
    lines += [f"| kind | pairs | {' | '.join(names)} |", "| --- | --- |" + " --- |" * len(names)]
    for kind in dict.fromkeys(pair.kind for pair, _ in verdicts):
        of_kind = [(pair, paid) for pair, paid in verdicts if pair.kind == kind]
        missed = {name: sum(pair.is_right and not paid[name] for pair, paid in of_kind) for name in names}
        wrong = {name: sum(not pair.is_right and paid[name] for pair, paid in of_kind) for name in names}
        cells = " | ".join(f"{missed[name]} + {wrong[name]}" for name in names)
        lines.append(f"| {kind} | {len(of_kind)} | {cells} |")
    return lines


def paid_by_others_alone(verdicts: Sequence[tuple[Pair, dict[str, bool]]]) -> dict[str, list[tuple[Pair, list[str]]]]:
    """Return, by kind, the right pairs that another rule pays and this package does not, with the rules."""
    found = defaultdict(list)
    for pair, paid in verdicts:
        if pair.is_right and not paid[OURS] and any(paid.values()):
            found[pair.kind].append((pair, [name for name in paid if paid[name]]))
    return found


def _not_paid(verdicts: Sequence[tuple[Pair, dict[str, bool]]]) -> list[str]:
    found = paid_by_others_alone(verdicts)
    num = sum(map(len, found.values()))
    lines = [f"## Right ones that another rule pays and this package does not: {num}"]
    lines += [""] if num else []
    for kind, pairs in found.items():
        pair, names = pairs[0]
        lines.append(
            f"* {kind}, {len(pairs)}: `{pair.response!a}`, truth `{pair.truth}`, by {', '.join(names)}: {REASONS[kind]}"
        )
    lines += ["", "## Not paid on purpose", "", "Readings that some take for right, one pair each.", ""]
    lines += ["| kind | answer | truth | paid by | why it is not paid here |", "| --- | --- | --- | --- | --- |"]
    for kind, (reason, answer, truth) in NOT_PAID.items():
        ((_, paid),) = grade([Pair(kind, f"\\boxed{{{answer}}}", truth, is_right=False)])
        names = ", ".join(name for name in paid if paid[name]) or "none"
        cells = (cell.replace("|", "\\|") for cell in (kind, f"`{answer}`", f"`{truth}`", names, reason))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's test.jsonl or train.jsonl")
    parser.add_argument("--problems", type=int, default=25, help="made-up problems of each kind (default 25)")
    parser.add_argument("--gsm8k-problems", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--title", default="Confusion of graders")
    parser.add_argument("--output", type=Path, help="a markdown file; printed without")
    arguments = parser.parse_args()
    made_by = how_made(arguments)  # before the grading, during which the checkout may move on
    pairs = list(made_up_pairs(arguments.problems, arguments.seed))
    if arguments.gsm8k:
        pairs += gsm8k_pairs(arguments.gsm8k, arguments.gsm8k_problems, arguments.seed)
    text = page(grade(pairs), arguments.title, made_by)
    arguments.output.write_text(text, encoding="utf-8") if arguments.output else print(text)


if __name__ == "__main__":
    main()
