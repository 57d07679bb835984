# SPDX-License-Identifier: Apache-2.0
"""How well and at what price a run measured: one rule per topic. A rule says nothing of what was not measured."""

from __future__ import annotations

from math import isnan

from verl_gradalign.config import ProbeConfig
from verl_gradalign.findings import GOOD, NOTE, PROBLEM, WATCH, Finding
from verl_gradalign.report.run import RunData

__all__ = ["FAIR", "MEASURING_RULES", "NOISE"]

NOISE = 0.3
"""A reliability below which a ranking is mostly noise: under a third of its variance would come out again."""
FAIR = 0.5

MUCH = 0.6


def _score_reliability(run: RunData) -> list[Finding]:
    value = run.metrics.mean("gradalign/reliability/scores")
    if isnan(value):
        return []
    means = f"Reliability of the scores is {value:.2f}: the rank correlation with fresh responses to the same problems."
    if value >= FAIR:
        return [Finding("reliability of scores", GOOD, means)]
    n = run.key("actor_rollout_ref.rollout.n")
    remedy = f"Raise actor_rollout_ref.rollout.n{f' (now {n})' if n else ''}, or try gradalign.score=confident_cosine."
    if value < NOISE:
        text = f"{means} Below about {NOISE} a ranking is mostly noise."
        return [Finding("reliability of scores", PROBLEM, text, remedy)]
    return [Finding("reliability of scores", WATCH, means, remedy)]


def _direction_reliability(run: RunData) -> list[Finding]:
    value = run.metrics.mean("gradalign/reliability/direction")
    if isnan(value):
        return []
    text = f"Reliability of the direction is {value:.2f}: the cosine with one from fresh trusted responses."
    if value >= FAIR:
        return [Finding("reliability of the direction", GOOD, text)]
    n = run.key("gradalign.validation.n")
    remedy = (
        f"Raise gradalign.validation.n{f' (now {n})' if n else ''} first, then add trusted problems, "
        "or average over refreshes with gradalign.direction.ema."
    )
    verdict = PROBLEM if value < NOISE else WATCH
    return [Finding("reliability of the direction", verdict, text, remedy)]


def _reasons(run: RunData) -> list[Finding]:
    counts = {reason: int(count.sum()) for reason, count in run.reasons.counts(False).items()}
    total, found = sum(counts.values()), []
    dead = (counts.get("dead", 0) + counts.get("filler", 0)) / max(1, total)
    if dead > 0:
        text = f"Dead groups, all of whose responses have the same reward: {dead:.0%} of the candidates."
        remedy = "Their rollouts are lost: leave out problems that are far too easy or hard, or raise rollout.n."
        found.append(Finding("dead groups", WATCH, text, remedy) if dead > MUCH else Finding("dead groups", NOTE, text))
    failed, odd = counts.get("failed", 0) / max(1, total), counts.get("non_finite", 0)
    if failed > 0:
        text = f"Responses could not be generated for {failed:.1%} of the candidates."
        remedy = "Look for errors of the rollout or the reward function in the run's output."
        found.append(Finding("failed groups", PROBLEM if failed > 0.05 else WATCH, text, remedy))
    if odd > 0:
        text = f"{odd:,} scores were not finite; such problems are never kept."
        remedy = "Look for a loss or gradient that is not finite (learning rate, precision)."
        found.append(Finding("scores that are not finite", PROBLEM if odd > 0.01 * total else WATCH, text, remedy))
    return found


def _cost(run: RunData) -> list[Finding]:
    probe, whole = (run.metrics.mean(f"gradalign/{name}/share_of_step") for name in ("seconds", "cost"))
    if isnan(probe):
        return []
    text = f"Selection itself takes {probe:.0%} of a step's seconds"
    text += "." if isnan(whole) else f"; with the rollouts that are not trained on, {whole:.0%}."
    verdict = WATCH if (probe > FAIR or whole > 0.8) else NOTE
    remedy = "Lower gradalign.oversample, or raise gradalign.direction.refresh_interval." if verdict == WATCH else ""
    return [Finding("cost", verdict, text, remedy)]


def _fallbacks(run: RunData) -> list[Finding]:
    found = []
    explained = {
        "reliability/fallback": ("steps without a reliable ranking", "fell back to gradalign.reliability.fallback"),
        "direction/degenerate": ("degenerate directions", "had trusted groups that gave no direction"),
    }
    remedies = {
        "reliability/fallback": "Raise rollout.n or validation.n; or lower gradalign.reliability.min_reliability.",
        "direction/degenerate": "Use trusted problems that are neither always nor never solved, or more of them.",
    }
    for name, (topic, what) in explained.items():
        share = run.metrics.mean(f"gradalign/{name}")
        if share > 0:
            number = run.metrics.total(f"gradalign/{name}")
            text = f"{number:,.0f} step{'' if number == 1 else 's'} ({share:.1%}) {what}."
            found.append(Finding(topic, PROBLEM if share > 0.2 else WATCH, text, remedies[name]))
    return found


def _estimator(run: RunData) -> list[Finding]:
    found = []
    error, limit = (
        run.metrics.most("gradalign/probe/canary/relative_error"),
        run.key("gradalign.probe.canary_threshold", ProbeConfig.canary_threshold),
    )
    if not isnan(error):
        text = f"The estimator's largest error against exact backward passes was {error:.1e} of the gradient's norm."
        is_bad = error > float(limit)
        remedy = "Set gradalign.estimator=backward and report the model." if is_bad else ""
        found.append(Finding("exactness", PROBLEM if is_bad else GOOD, text, remedy))
    fidelity = run.metrics.mean("gradalign/probe/fidelity/spearman")
    if not isnan(fidelity):
        text = f"The approximate estimator's ranks correlate with exact ones by {fidelity:.2f}, on a few problems."
        verdict = GOOD if fidelity >= 0.8 else WATCH if fidelity >= FAIR else PROBLEM
        found.append(Finding("fidelity", verdict, text, "" if verdict == GOOD else "Set gradalign.estimator=ghost."))
    oversized, candidates = (run.metrics.total(f"gradalign/{name}") for name in ("probe/oversized", "candidates"))
    if oversized > 0.02 * candidates:
        text = (
            f"{oversized / candidates:.0%} of the candidates were too long for a micro-batch and scored one at a time."
        )
        found.append(Finding("oversized problems", WATCH, text, "Raise gradalign.probe.max_tokens_per_rank."))
    return found


def _direction_age(run: RunData) -> list[Finding]:
    age, cosine = run.metrics.most("gradalign/direction/age"), run.metrics.mean("gradalign/direction/cosine_previous")
    if not age > 1 or isnan(cosine):
        return []
    text = f"Directions were used until {age:.0f} steps old; one agrees with the next by {cosine:.2f} (cosine)."
    if cosine >= NOISE:
        return [Finding("age of the direction", NOTE, text)]
    remedy = "Refresh more often (gradalign.direction.refresh_interval), or average with gradalign.direction.ema."
    return [Finding("age of the direction", WATCH, text, remedy)]


MEASURING_RULES = (
    _score_reliability,
    _direction_reliability,
    _reasons,
    _cost,
    _fallbacks,
    _estimator,
    _direction_age,
)
