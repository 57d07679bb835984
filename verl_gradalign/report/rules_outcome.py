# SPDX-License-Identifier: Apache-2.0
"""What a run chose, and what came of it: one rule per topic. A rule says nothing of what was not measured."""

from __future__ import annotations

import re
from math import isnan

import numpy as np

from verl_gradalign.findings import GOOD, NOTE, PROBLEM, WATCH, Finding
from verl_gradalign.report.run import RunData
from verl_gradalign.report.visible_text import short

__all__ = ["OUTCOME_RULES", "accuracy_of", "composition_shift", "held_out"]


def held_out(run: RunData) -> tuple[str, dict[str, str]]:
    """Return "accuracy", or "reward" where there is none, and verl's metric of it by data source."""
    for quantity, word in (("acc", "accuracy"), ("reward", "reward")):
        pattern = re.compile(rf"val-core/(.+)/{quantity}/mean@\d+", re.DOTALL)
        found = {match[1]: name for name in run.metrics.names if (match := pattern.fullmatch(name))}
        found = {source: name for source, name in found.items() if run.metrics.count(name)}
        if found:
            return word, found
    return "accuracy", {}


def accuracy_of(run: RunData) -> list[tuple[str, float, float, int, int]]:
    """Return (data source, before, after, first step, last step) of the held-out accuracies, or rewards."""
    found = []
    for source, name in held_out(run)[1].items():
        steps, values = run.metrics.points(name)
        found.append((source, float(values[0]), float(values[-1]), int(steps[0]), int(steps[-1])))
    return found


def composition_shift(run: RunData, column: str) -> list[tuple[str, float, float]]:
    """Return (value, share of the candidates, share of the kept ones) of a column, the most frequent first."""
    pool, kept = run.columns[column].counts(False), run.columns[column].counts(True)
    num_pool, num_kept = sum(c.sum() for c in pool.values()), sum(c.sum() for c in kept.values())
    if not num_pool:
        return []
    return [(value, pool[value].sum() / num_pool, kept[value].sum() / max(1, num_kept)) for value in pool]


def _accuracy(run: RunData) -> list[Finding]:
    results = [result for result in accuracy_of(run) if result[3] < result[4]]
    if not results:
        return []
    change = float(np.mean([after - before for _, before, after, _, _ in results]))
    verdict = GOOD if change > 0.005 else PROBLEM if change < -0.01 else WATCH
    word = held_out(run)[0]
    form = ".1%" if word == "accuracy" else ".3g"
    text = "; ".join(
        f"{short(source)} {before:{form}} at step {first:,}, {after:{form}} at step {last:,}"
        for source, before, after, first, last in results[:4]
    )
    more = f"; and {len(results) - 4} more data sources" if len(results) > 4 else ""
    remedy = "" if verdict == GOOD else "Compare with a run of gradalign.score=random before you blame the selection."
    return [Finding("held-out accuracy", verdict, f"Held-out {word}: {text}{more}.", remedy)]


def _alignment(run: RunData) -> list[Finding]:
    pool, kept = run.steps.mean("alignment", False), run.steps.mean("alignment", True)
    if isnan(pool) or isnan(kept):
        return []
    text = f"Mean alignment (cosine with the direction): {kept:+.3f} of what was kept, {pool:+.3f} of all candidates."
    if kept > pool:
        reliability = run.metrics.mean("gradalign/reliability/scores")
        if reliability > 0:  # the rest of the difference is error of measurement that happened to be favourable
            text += f" Of the difference about {min(1.0, reliability) * (kept - pool):.3f} would come out again."
        return [Finding("alignment", GOOD, text)]
    return [Finding("alignment", WATCH, text, "Intended only where gradalign.score is not a measure of alignment.")]


def _suspicious(run: RunData) -> list[Finding]:
    suspects = run.suspects
    if not suspects.num_measured:
        return []
    text = (
        f"{len(suspects):,} of {suspects.num_measured:,} problems look suspicious, "
        f"{int(suspects.is_negative_S.sum()):,} of them pointing away from the trusted set; by chance one would expect "
        f"about {suspects.expected_by_chance:,.0f}."
    )
    is_many = len(suspects) > max(2 * suspects.expected_by_chance, 0.01 * suspects.num_measured, 3)
    remedy = (
        "Read them, below: wrong answers, broken graders, or another skill than the trusted set's." if is_many else ""
    )
    return [Finding("suspicious problems", WATCH if is_many else NOTE, text, remedy)]


def _composition(run: RunData) -> list[Finding]:
    found, alike = [], []
    for column in run.columns:
        shift = [row for row in composition_shift(run, column) if row[1] >= 0.01 or row[2] >= 0.05]
        if len(shift) < 2 or not run.steps.num_kept:
            continue
        ratios = [kept / max(pool, 1e-9) for _, pool, kept in shift]
        if max(ratios) < 1.15 and min(ratios) > 0.87:
            alike.append(short(column))
            continue
        most, least = shift[int(np.argmax(ratios))], shift[int(np.argmin(ratios))]
        text = f"By {short(column)}, selection prefers {_shift(most)} and avoids {_shift(least)}."
        gone = least[1] >= 0.05 and least[2] < 0.2 * least[1]
        remedy = f"Nearly nothing of {short(least[0])} is trained on: is that meant? Look at the trusted set."
        found.append(Finding(f"composition by {short(column)}", WATCH if gone else NOTE, text, remedy if gone else ""))
    if alike:
        text = f"By {', '.join(alike)}, what is kept is what the candidates are, within 15%."
        found.append(Finding("composition", NOTE, text))
    return found


def _shift(row: tuple[str, float, float]) -> str:
    value, pool, kept = row
    return f"{short(value)} ({pool:.0%} of the candidates, {kept:.0%} of what is kept)"


def _success(run: RunData) -> list[Finding]:
    pool, kept = run.steps.mean("success_rate", False), run.steps.mean("success_rate", True)
    if isnan(pool) or isnan(kept):
        return []
    text = f"Success rate: {kept:.0%} of what was kept, {pool:.0%} of all candidates."
    if 0.05 <= kept <= 0.95:
        return [Finding("success rate", NOTE, text)]
    easier = "easier" if kept < 0.05 else "harder"
    remedy = f"Hardly a response differs from the others, so there is little to learn: use {easier} problems."
    return [Finding("success rate", WATCH, text, remedy)]


def _length(run: RunData) -> list[Finding]:
    pool, kept = run.steps.mean("tokens", False), run.steps.mean("tokens", True)
    if isnan(pool) or isnan(kept) or not pool > 0:
        return []
    text = f"Responses: {kept:,.0f} tokens of what was kept, {pool:,.0f} of all candidates."
    if 0.7 <= kept / pool <= 1.4:
        return [Finding("length", NOTE, text)]
    remedy = "The selection chooses by length: see gradalign.loss_agg_mode, and gradalign.score=cosine instead of dot."
    return [Finding("length", WATCH, text, remedy)]


OUTCOME_RULES = (_accuracy, _alignment, _suspicious, _composition, _success, _length)
