# SPDX-License-Identifier: Apache-2.0
"""Is the selection working? Sentences with numbers, a verdict, and what to change, in the words of the configuration.

for finding in findings_of(read_run(run)):
    print(finding.level, finding.message, finding.remedy)
"""

from __future__ import annotations

from math import isnan

from verl_gradalign.findings import GOOD, NOTE, PROBLEM, VERDICTS, WATCH, Finding
from verl_gradalign.report.rules_measurement import FAIR, MEASURING_RULES, NOISE
from verl_gradalign.report.rules_outcome import OUTCOME_RULES
from verl_gradalign.report.run import RunData
from verl_gradalign.report.visible_text import short

__all__ = ["findings_of", "headline_of"]


def findings_of(run: RunData) -> list[Finding]:
    """Return what is to be said of a run, the most important first. What was not measured is not mentioned."""
    found = [finding for rule in (*OUTCOME_RULES, *MEASURING_RULES) for finding in rule(run)]
    return sorted(found, key=lambda finding: VERDICTS.index(finding.level))


def headline_of(run: RunData) -> tuple[str, str]:
    """Return (verdict, one sentence) on the selection as a whole."""
    if not run.steps.num_rows:
        return PROBLEM, "Nothing can be said: no row of the selection could be read."
    score = short(str(run.key("gradalign.score", "an unknown score")))
    measured = not isnan(run.steps.mean("alignment", False)) or run.suspects.num_measured > 0
    if not measured:
        return NOTE, f"Problems were chosen by {score}, without measuring alignment: a baseline to compare with."
    reliability = run.metrics.mean("gradalign/reliability/scores")
    gain = run.steps.mean("score", True) - run.steps.mean("score", False)
    serious = [finding.area for finding in findings_of(run) if finding.level == PROBLEM]
    if reliability < NOISE:
        return PROBLEM, f"The ranking by {score} is mostly noise: a repetition would choose largely other problems."
    if not gain > 0:
        return PROBLEM, f"What was kept scores no higher by {score} than what was not: the selection selects nothing."
    if serious:
        return WATCH, f"The ranking by {score} holds, but something else is wrong: {', '.join(serious)}."
    if isnan(reliability):
        return WATCH, f"Problems were kept by {score}; how reliable the ranking is was not measured."
    if reliability < FAIR:
        return WATCH, f"The ranking by {score} holds information, and much noise: about as much of one as of the other."
    return GOOD, f"The selection works: the ranking by {score} would largely come out again."
