# SPDX-License-Identifier: Apache-2.0
"""Is the selection working? Sentences with numbers, a verdict, and what to change, in the words of the configuration.

for finding in findings_of(read_run(run)):
    print(finding.level, finding.message, finding.remedy)

One rule per topic: first what a run chose and what came of it, then how well and at what price it measured. A rule says
nothing of what was not measured. `summary_of` has the same for machines, with all numbers of the page.
"""

from collections.abc import Iterator
from dataclasses import asdict
from math import isnan
from typing import Any

import numpy as np

from verl_gradalign.config import ProbeConfig
from verl_gradalign.files import without_nan
from verl_gradalign.findings import GOOD, NOTE, PROBLEM, VERDICTS, WATCH, Finding
from verl_gradalign.report.forecast_findings import AREA, forecast_findings
from verl_gradalign.report.run import RunData
from verl_gradalign.report.visible_text import short

NOISE = 0.3
"""A reliability below which a ranking is mostly noise: under a third of its variance would come out again."""
FAIR = 0.5


def findings_of(run: RunData) -> list[Finding]:
    """Return what is to be said of a run, the most important first. What was not measured is not mentioned."""
    return sorted((f for rule in RULES for f in rule(run)), key=lambda finding: VERDICTS.index(finding.level))


def headline_of(run: RunData) -> tuple[str, str]:
    """Return (verdict, one sentence) on the selection as a whole."""
    if not run.steps.num_rows:
        return PROBLEM, "Nothing can be said: no row of the selection could be read."
    score = short(str(run.key("gradalign.score", "an unknown score")))
    if run.forecast.has_picks:
        return _forecast_headline(run)
    if isnan(run.steps.mean("alignment", False)) and not run.suspects.num_measured:
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


def _forecast_headline(run: RunData) -> tuple[str, str]:
    (said,) = (finding for finding in forecast_findings(run) if finding.area == AREA)
    serious = [finding.area for finding in findings_of(run) if finding.level == PROBLEM]
    if serious:
        return WATCH, f"{said.message} But something else is wrong: {', '.join(serious)}."
    return said.level, said.message


def _accuracy(run: RunData) -> Iterator[Finding]:
    results = [r for r in run.accuracy() if r["first_step"] < r["last_step"]]
    if not results:
        return
    change = float(np.mean([r["after"] - r["before"] for r in results]))
    verdict = GOOD if change > 0.005 else PROBLEM if change < -0.01 else WATCH
    word = run.held_out()[0]
    form = ".1%" if word == "accuracy" else ".3g"
    text = "; ".join(
        f"{short(r['data_source'])} {r['before']:{form}} at step {r['first_step']:,}, "
        f"{r['after']:{form}} at step {r['last_step']:,}"
        for r in results[:4]
    )
    more = f"; and {len(results) - 4} more data sources" if len(results) > 4 else ""
    remedy = "" if verdict == GOOD else "Compare with a run of gradalign.score=random before you blame the selection."
    yield Finding("held-out accuracy", verdict, f"Held-out {word}: {text}{more}.", remedy)


def _chosen(run: RunData) -> str:
    return "what the forecast chose" if run.forecast.has_picks else "what was kept"


def _pool(run: RunData) -> str:
    return "random draws" if run.forecast.has_picks else "all candidates"


def _note_or_watch(topic: str, is_fine: bool, text: str, remedy: str) -> Finding:
    return Finding(topic, NOTE, text) if is_fine else Finding(topic, WATCH, text, remedy)


def _graded(topic: str, value: float, good: float, watch: float, text: str, remedy: str) -> Finding:
    verdict = GOOD if value >= good else WATCH if value >= watch else PROBLEM
    return Finding(topic, verdict, text, "" if verdict == GOOD else remedy)


def _alignment(run: RunData) -> Iterator[Finding]:
    pool, kept = run.steps.mean("alignment", False), run.steps.mean("alignment", True)
    if not isnan(pool) and not isnan(kept):
        text = (
            f"Mean alignment (cosine with the direction): {kept:+.3f} of {_chosen(run)}, {pool:+.3f} of {_pool(run)}."
        )
        reliability = run.metrics.mean("gradalign/reliability/scores")
        if kept > pool and reliability > 0:  # the rest of the difference is favourable error of measurement
            text += f" Of the difference about {min(1.0, reliability) * (kept - pool):.3f} would come out again."
        remedy = "" if kept > pool else "Intended only where gradalign.score is not a measure of alignment."
        yield Finding("alignment", WATCH if remedy else GOOD, text, remedy)


def _suspicious(run: RunData) -> Iterator[Finding]:
    suspects = run.suspects
    if not suspects.num_measured:
        return
    text = (
        f"{len(suspects):,} of {suspects.num_measured:,} problems look suspicious, {suspects.num_negative:,} of them "
        "pointing away from the trusted set; by chance one would expect about "
        f"{suspects.expected_by_chance:,.0f}."
    )
    is_many = len(suspects) > max(2 * suspects.expected_by_chance, 0.01 * suspects.num_measured, 3)
    remedy = "Read them, below: wrong answers, broken graders, or another skill than the trusted set's."
    yield _note_or_watch("suspicious problems", not is_many, text, remedy)


def _composition(run: RunData) -> Iterator[Finding]:
    alike, has_picks = [], run.forecast.has_picks
    for column in run.columns:
        shift = [row for row in run.composition(column) if row[1] >= 0.01 or row[2] >= 0.05]
        if len(shift) < 2 or not run.steps.num_kept:
            continue
        ratios = [kept / max(pool, 1e-9) for _, pool, kept in shift]
        if max(ratios) < 1.15 and min(ratios) > 0.87:
            alike.append(short(column))
            continue
        ends = shift[int(np.argmax(ratios))], shift[int(np.argmin(ratios))]
        of_pool, of_chosen = ("random draws", "forecast picks") if has_picks else ("the candidates", "what is kept")
        most, least = (
            f"{short(value)} ({pool:.0%} of {of_pool}, {kept:.0%} of {of_chosen})" for value, pool, kept in ends
        )
        value, pool, kept = ends[1]
        of_it = "chosen by forecast" if has_picks else "trained on"
        remedy = f"Nearly nothing of {short(value)} is {of_it}: is that meant? Look at the trusted set."
        is_gone = pool >= 0.05 and kept < 0.2 * pool
        who = "the forecast" if has_picks else "selection"
        text = f"By {short(column)}, {who} prefers {most} and avoids {least}."
        yield _note_or_watch(f"composition by {short(column)}", not is_gone, text, remedy)
    if alike:
        text = f"By {', '.join(alike)}, {_chosen(run)} is what {_pool(run)} are, within 15%."
        yield Finding("composition", NOTE, text)


def _success(run: RunData) -> Iterator[Finding]:
    pool, kept = run.steps.mean("success_rate", False), run.steps.mean("success_rate", True)
    if not isnan(pool) and not isnan(kept):
        text = f"Success rate: {kept:.0%} of {_chosen(run)}, {pool:.0%} of {_pool(run)}."
        easier = "easier" if kept < 0.05 else "harder"
        remedy = f"Hardly a response differs from the others, so there is little to learn: use {easier} problems."
        yield _note_or_watch("success rate", 0.05 <= kept <= 0.95, text, remedy)


def _length(run: RunData) -> Iterator[Finding]:
    pool, kept = run.steps.mean("response_tokens", False), run.steps.mean("response_tokens", True)
    if pool > 0 and not isnan(kept):
        text = f"Responses: {kept:,.0f} tokens of {_chosen(run)}, {pool:,.0f} of {_pool(run)}."
        remedy = (
            "The selection chooses by length: see gradalign.loss_agg_mode, and gradalign.score=cosine instead of dot."
        )
        yield _note_or_watch("length", 0.7 <= kept / pool <= 1.4, text, remedy)


def _reliability(run: RunData) -> Iterator[Finding]:
    scores, direction = (run.metrics.mean(f"gradalign/reliability/{name}") for name in ("scores", "direction"))
    now_n, now_validation_n = (
        f" (now {n})" if n else "" for n in (run.key("actor_rollout_ref.rollout.n"), run.key("gradalign.validation.n"))
    )
    if not isnan(scores):
        means = "the rank correlation with fresh responses to the same problems"
        text = f"Reliability of the scores is {scores:.2f}: {means}."
        text += f" Below about {NOISE} a ranking is mostly noise." if scores < NOISE else ""
        remedy = f"Raise actor_rollout_ref.rollout.n{now_n}, or try gradalign.score=confident_cosine."
        yield _graded("reliability of scores", scores, FAIR, NOISE, text, remedy)
    if not isnan(direction):
        text = f"Reliability of the direction is {direction:.2f}: the cosine with one from fresh trusted responses."
        remedy = (
            f"Raise gradalign.validation.n{now_validation_n} first, then add trusted problems, "
            "or average over refreshes with gradalign.direction.ema."
        )
        yield _graded("reliability of the direction", direction, FAIR, NOISE, text, remedy)


def _reasons(run: RunData) -> Iterator[Finding]:
    counts = {reason: int(count.sum()) for reason, count in run.reasons.counts(False).items()}
    total = max(1, sum(counts.values()))
    dead = (counts.get("dead", 0) + counts.get("filler", 0)) / total
    failed, no_reward = (counts.get(name, 0) / total for name in ("failed", "reward_not_finite"))
    odd = counts.get("non_finite", 0)
    if dead > 0:
        text = f"Dead groups, all of whose responses have the same reward: {dead:.0%} of the candidates."
        remedy = "Their rollouts are lost: leave out problems that are far too easy or hard, or raise rollout.n."
        yield _note_or_watch("dead groups", dead <= 0.6, text, remedy)
    if failed > 0:
        text = f"Responses could not be generated, or their grading raised, for {failed:.1%} of the candidates."
        remedy = "Look for errors of the rollout or the reward function in the run's output."
        yield Finding("failed groups", PROBLEM if failed > 0.05 else WATCH, text, remedy)
    if no_reward > 0:
        text = f"{no_reward:.1%} of the candidates have a reward that is nan, infinite or missing; they are never kept."
        remedy = "Mend the reward function: `verl-gradalign doctor` shows what it gives for your data."
        yield Finding("rewards that are not numbers", PROBLEM if no_reward > 0.01 else WATCH, text, remedy)
    if odd > 0:
        text = f"{odd:,} scores, advantages or log-probs were not finite; such problems are never kept."
        remedy = "Look for a loss or gradient that is not finite (learning rate, precision)."
        yield Finding("scores that are not finite", PROBLEM if odd > 0.01 * total else WATCH, text, remedy)


def _cost(run: RunData) -> Iterator[Finding]:
    probe, whole = (run.metrics.mean(f"gradalign/{name}/share_of_step") for name in ("seconds", "cost"))
    if not isnan(probe):
        text = f"Selection itself takes {probe:.0%} of a step's seconds"
        text += "." if isnan(whole) else f"; with the rollouts that are not trained on, {whole:.0%}."
        remedy = "Lower gradalign.oversample, or raise gradalign.direction.refresh_interval."
        yield _note_or_watch("cost", not (probe > FAIR or whole > 0.8), text, remedy)


def _fallbacks(run: RunData) -> Iterator[Finding]:
    what = "fell back to gradalign.reliability.fallback"
    remedy = "Raise rollout.n or validation.n; or lower gradalign.reliability.min_reliability."
    yield from _share_of_steps(run, "reliability/fallback", "steps without a reliable ranking", what, remedy)
    what = "had trusted groups that gave no direction"
    remedy = "Use trusted problems that are neither always nor never solved, or more of them."
    yield from _share_of_steps(run, "direction/degenerate", "degenerate directions", what, remedy)


def _share_of_steps(run: RunData, name: str, topic: str, what: str, remedy: str) -> Iterator[Finding]:
    share, number = run.metrics.mean(f"gradalign/{name}"), run.metrics.total(f"gradalign/{name}")
    if share > 0:
        text = f"{number:,.0f} step{'' if number == 1 else 's'} ({share:.1%}) {what}."
        yield Finding(topic, PROBLEM if share > 0.2 else WATCH, text, remedy)


def _estimator(run: RunData) -> Iterator[Finding]:
    error = run.metrics.most("gradalign/probe/canary/relative_error")
    if not isnan(error):
        text = f"The estimator's largest error against exact backward passes was {error:.1e} of the gradient's norm."
        is_bad = error > float(run.key("gradalign.probe.canary_threshold", ProbeConfig.canary_threshold))
        remedy = "Set gradalign.estimator=backward and report the model." if is_bad else ""
        yield Finding("exactness", PROBLEM if is_bad else GOOD, text, remedy)
    fidelity = run.metrics.mean("gradalign/probe/fidelity/spearman")
    if not isnan(fidelity):
        text = f"The approximate estimator's ranks correlate with exact ones by {fidelity:.2f}, on a few problems."
        yield _graded("fidelity", fidelity, 0.8, FAIR, text, "Set gradalign.estimator=ghost.")
    oversized, candidates = (run.metrics.total(f"gradalign/{name}") for name in ("probe/oversized", "candidates"))
    if oversized > 0.02 * candidates:
        share = f"{oversized / candidates:.0%} of the candidates"
        text = f"{share} were larger than a micro-batch: their gradients were added up over several, or taken apart."
        error = run.metrics.mean("gradalign/probe/oversized_norm_error")
        text += "" if isnan(error) else f" Their norms are estimates, off by about {error:.0%}."
        yield Finding("oversized problems", NOTE, text, "Raise gradalign.probe.max_tokens_per_rank if memory allows.")


def _forecast(run: RunData) -> Iterator[Finding]:
    # The notes stand in the forecast's own section.
    yield from (finding for finding in forecast_findings(run) if finding.level != NOTE)


def _direction_age(run: RunData) -> Iterator[Finding]:
    age, cosine = run.metrics.most("gradalign/direction/age"), run.metrics.mean("gradalign/direction/cosine_previous")
    if age > 1 and not isnan(cosine):
        text = f"Directions were used until {age:.0f} steps old; one agrees with the next by {cosine:.2f} (cosine)."
        remedy = "Refresh more often (gradalign.direction.refresh_interval), or average with gradalign.direction.ema."
        yield _note_or_watch("age of the direction", cosine >= NOISE, text, remedy)


def summary_of(run: RunData) -> dict[str, Any]:
    """Return the numbers of a run's page for machines; what is not known is None."""
    verdict, headline = headline_of(run)
    steps, metrics, suspects = run.steps, run.metrics, run.suspects
    values = {
        "name": run.name,
        "log": str(run.folder),
        "num_steps": len(steps.steps),
        "last_step": max(steps.steps, default=0),
        "num_rows": steps.num_rows,
        "verdict": verdict,
        "headline": headline,
        "findings": [
            {"topic": f.area, "verdict": f.level, "text": f.message, "remedy": f.remedy} for f in findings_of(run)
        ],
        "missing": run.missing,
        "accuracy": run.accuracy(),
        "reliability": {name: metrics.mean(f"gradalign/reliability/{name}") for name in ("scores", "direction")},
        "success_rate": {"pool": steps.mean("success_rate", False), "kept": steps.mean("success_rate", True)},
        "alignment": {"pool": steps.mean("alignment", False), "kept": steps.mean("alignment", True)},
        "forecast": _forecast_summary(run),
        "share_of_step": metrics.mean("gradalign/seconds/share_of_step"),
        "reasons": {reason: int(count.sum()) for reason, count in run.reasons.counts(False).items()},
        "composition": {
            column: [{"value": value, "pool": pool, "kept": kept} for value, pool, kept in run.composition(column)]
            for column in run.columns
        },
        "suspicious": {
            "is_cosine": suspects.is_cosine,
            "num_measured": suspects.num_measured,
            "num_suspicious": len(suspects),
            "expected_by_chance": suspects.expected_by_chance,
            "typical": suspects.typical,
            "problems": suspects.table.to_pylist(),
        },
    }
    cleaned: dict[str, Any] = without_nan(values)
    return cleaned


def _forecast_summary(run: RunData) -> dict[str, Any] | None:
    """Return the numbers of a forecast; None of a run of another schedule."""
    forecast, names = run.forecast, list(run.columns["data_source"].values)
    if not forecast.has_picks:
        return None
    lift = forecast.lift
    correlation, num_compared = forecast.spearman()
    return {
        "pays": None if lift is None else lift.pays,
        "lift": None if lift is None else asdict(lift),
        "spearman": correlation,
        "num_compared": num_compared,
        "sources": [asdict(row) for row in forecast.sources(names)],
        "starved": [source.in_words() for source in forecast.starved(names)],
        "sentences": [finding.message for finding in forecast_findings(run)],
    }


RULES = (
    *(_forecast, _accuracy, _alignment, _suspicious, _composition, _success, _length),
    *(_reliability, _reasons, _cost, _fallbacks, _estimator, _direction_age),
)
