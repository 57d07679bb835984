# SPDX-License-Identifier: Apache-2.0
"""What stands on the page of a report: each run's tables, pictures and suspicious problems, as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_gradalign.findings import Finding
from verl_gradalign.log.selection_log import EXTRA
from verl_gradalign.report import pictures
from verl_gradalign.report.findings import findings_of, headline_of
from verl_gradalign.report.pictures import Picture
from verl_gradalign.report.problem_texts import problem_texts
from verl_gradalign.report.rules_outcome import accuracy_of, composition_shift, held_out
from verl_gradalign.report.run import RunData
from verl_gradalign.report.visible_text import Shown, short, shown

__all__ = ["RunPage", "Table", "comparison_table", "page_of"]

MAX_TABLE_ROWS = 12
COMPARED = (
    "run",
    "score",
    "steps",
    "held-out accuracy",
    "reliability of scores, direction",
    "kept: success, alignment",
    "selection's share of a step",
    "suspicious",
)
SETTINGS = {
    "Score": "gradalign.score",
    "Schedule": "gradalign.schedule",
    "Estimator": "gradalign.estimator",
    "Candidates per place": "gradalign.oversample",
    "Responses per problem": "actor_rollout_ref.rollout.n",
    "Responses per trusted problem": "gradalign.validation.n",
    "Direction refreshed every": "gradalign.direction.refresh_interval",
    "Advantages": "algorithm.adv_estimator",
    "Model": "actor_rollout_ref.model.path",
}
COSTS = (
    ("rollout", "gradalign/seconds/rollout", "generating candidates and trusted problems"),
    ("direction", "gradalign/seconds/direction", "making the direction of the trusted sets"),
    ("scores", "gradalign/seconds/scores", "measuring the candidates"),
    ("rest of the selection", "", "moving data, choosing, logging"),
    ("update", "gradalign/seconds/update", "the actor's update"),
    ("everything else", "", "old log-probabilities, reference, weights, validation, checkpoints"),
)


@dataclass(frozen=True)
class Table:
    """A table of text; `bars` are lengths from 0 to 1 drawn beside the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    bars: Sequence[float] = ()


@dataclass(frozen=True)
class ShownResponse:
    step: int
    reward: str
    num_tokens: int | None
    text: Shown


@dataclass(frozen=True)
class Suspect:
    """A suspicious problem with its texts; None: not known."""

    problem_id: int
    kind: str
    source: str
    mean: str
    interval: str
    distance: str
    occurrences: str
    success_rate: str
    kept: str
    prompt: Shown | None
    answer: Shown | None
    origin: str
    responses: Sequence[ShownResponse]


@dataclass(frozen=True)
class RunPage:
    """Everything of one run."""

    anchor: str
    name: str
    place: str
    facts: Sequence[tuple[str, str]]
    verdict: str
    headline: str
    findings: Sequence[Finding]
    missing: Sequence[str]
    pictures: dict[str, list[Picture]]
    composition: Sequence[Table]
    reasons: Table
    costs: Table | None
    suspects: Sequence[Suspect]
    num_suspects: int
    num_measured: int
    num_negative: int
    typical: str
    by_chance: str
    none_aligned: str
    unit: str


def page_of(run: RunData, number: int, top: int, text_chars: int) -> RunPage:
    """Return a run's page. `top`: suspicious problems shown; `text_chars`: characters that their texts are cut to."""
    verdict, headline = headline_of(run)
    suspects = run.suspects
    return RunPage(
        anchor=f"run-{number}",
        name=short(run.name, 120),
        place=short(str(run.folder), 300),
        facts=_facts(run),
        verdict=verdict,
        headline=headline,
        findings=findings_of(run),
        missing=[short(text, 1500) for text in run.missing],
        pictures={
            "outcome": pictures.outcome(run),
            "scores": pictures.scores(run),
            "composition": pictures.composition(run),
            "reliability": pictures.reliability(run),
            "cost": pictures.cost(run),
            "problems": pictures.problems(run),
        },
        composition=[_composition_table(run, column) for column in run.columns if run.steps.num_rows],
        reasons=_reasons_table(run),
        costs=_cost_table(run),
        suspects=_suspects(run, top, text_chars),
        num_suspects=len(suspects),
        num_measured=suspects.num_measured,
        num_negative=int(suspects.is_negative_S.sum()),
        typical=f"{suspects.typical:+.3f}",
        by_chance=f"{suspects.expected_by_chance:,.0f}",
        none_aligned=f"{suspects.negative_if_none_aligned:,.0f}",
        unit="cosine" if suspects.is_cosine else "dot product",
    )


def comparison_table(runs: Sequence[RunData]) -> Table:
    """Return a row per run."""
    rows = []
    for run in runs:
        pairs = [(before, after) for _, before, after, _, _ in accuracy_of(run)]
        before, after = (
            (float(np.mean(column)) for column in zip(*pairs, strict=True)) if pairs else (math.nan, math.nan)
        )
        rows.append(
            (
                short(run.name, 120),
                short(str(run.key("gradalign.score", "?")), 40),
                f"{len(run.steps.steps):,}",
                f"{_share(before)} \u2192 {_share(after)}"
                if held_out(run)[0] == "accuracy"
                else f"{before:.3g} \u2192 {after:.3g}",
                f"{_number(run.metrics.mean('gradalign/reliability/scores'))}, "
                f"{_number(run.metrics.mean('gradalign/reliability/direction'))}",
                f"{_share(run.steps.mean('success_rate', True))}, {_number(run.steps.mean('alignment', True), '+.3f')}",
                _share(run.metrics.mean("gradalign/seconds/share_of_step")),
                f"{len(run.suspects):,} of {run.suspects.num_measured:,}" if run.suspects.num_measured else "\u2013",
            )
        )
    return Table(
        COMPARED, rows, "Means over all steps; accuracies are means over data sources, first and last validation."
    )


def _facts(run: RunData) -> list[tuple[str, str]]:
    steps = run.steps
    facts = [
        ("Size", f"{steps.num_rows:,} candidates in {len(steps.steps):,} steps"),
        *((label, short(str(run.key(path)))) for label, path in SETTINGS.items() if run.key(path) is not None),
    ]
    versions = run.about.get("versions")
    if isinstance(versions, dict):
        facts.append(("Versions", short(", ".join(f"{name} {version}" for name, version in versions.items()), 300)))
    if run.about.get("created"):
        facts.append(("Started", short(str(run.about["created"]))))
    return facts


def _composition_table(run: RunData, column: str) -> Table:
    shift = composition_shift(run, column)
    shown_rows = [
        (short(value), f"{pool:.1%}", f"{kept:.1%}", f"{kept / pool:.2f}" if pool else "\u2013")
        for value, pool, kept in shift[:MAX_TABLE_ROWS]
    ]
    name = short(column.removeprefix(EXTRA))
    rest = len(shift) - MAX_TABLE_ROWS
    caption = f"By {name}" + (
        f"; the {MAX_TABLE_ROWS} most frequent values, {rest} more are not shown." if rest > 0 else "."
    )
    return Table((name, "candidates", "kept", "kept / candidates"), shown_rows, caption)


def _reasons_table(run: RunData) -> Table:
    kept = run.reasons.counts(True)
    total = max(1, run.steps.num_rows)
    rows = [
        (short(reason), "kept" if kept[reason].sum() else "rejected", f"{count.sum():,}", f"{count.sum() / total:.1%}")
        for reason, count in run.reasons.counts(False).items()
        if count.sum()
    ]
    return Table(("reason", "", "candidates", "share"), rows, "Why candidates were kept or rejected.")


def _cost_table(run: RunData) -> Table | None:
    """Return the mean seconds of a step by stage, None if they are not known."""
    step_s = run.metrics.mean("timing_s/step")
    selection_s = run.metrics.mean("gradalign/seconds/selection")
    if not step_s > 0 or math.isnan(selection_s):
        return None
    # A stage that not every step has counts with what it adds to the mean step.
    num_steps = run.metrics.count("timing_s/step")
    seconds = {name: run.metrics.total(metric) / num_steps for name, metric, _ in COSTS if metric}
    seconds = {name: 0.0 if math.isnan(value) else value for name, value in seconds.items()}
    selection_s = run.metrics.total("gradalign/seconds/selection") / num_steps
    seconds["rest of the selection"] = max(0.0, selection_s - seconds["direction"] - seconds["scores"])
    seconds["everything else"] = max(0.0, step_s - selection_s - seconds["rollout"] - seconds["update"])
    rows = [(name, f"{seconds[name]:,.2f}", f"{seconds[name] / step_s:.1%}", what) for name, _, what in COSTS]
    bars = [min(1.0, seconds[name] / step_s) for name, _, _ in COSTS]
    return Table(("stage", "s / step", "share", ""), rows, f"Mean of {num_steps:,} steps: {step_s:,.1f} s each.", bars)


def _suspects(run: RunData, top: int, text_chars: int) -> list[Suspect]:
    s = run.suspects
    texts = problem_texts(run.reader, run.about, s.problem_id_S[:top].tolist())
    found = []
    for place, problem_id in enumerate(s.problem_id_S[:top].tolist()):
        text = texts[problem_id]
        found.append(
            Suspect(
                problem_id=problem_id,
                kind=s.kind(place),
                source=short(run.sources[s.source_S[place]]) if run.sources else "?",
                mean=f"{s.mean_S[place]:+.3f} \u00b1 {s.error_S[place]:.3f}",
                interval=f"{s.low_S[place]:+.3f} to {s.high_S[place]:+.3f}",
                distance=f"{-s.distance_S[place]:.1f}",
                occurrences=f"{s.num_negative_S[place]} of {s.num_measured_S[place]}",
                success_rate=_share(s.success_rate_S[place], 0),
                kept=f"{s.num_kept_S[place]:,}",
                prompt=None if text.prompt is None else shown(text.prompt, text_chars),
                answer=None if text.answer is None else shown(text.answer, text_chars),
                origin=short(text.origin, 300) if text.origin else "",
                responses=[
                    ShownResponse(r.step, f"{r.reward:g}", r.num_tokens, shown(r.text, text_chars))
                    for r in text.responses
                ],
            )
        )
    return found


def _share(value: float, digits: int = 1) -> str:
    return "\u2013" if math.isnan(value) else f"{value:.{digits}%}"


def _number(value: float, form: str = ".2f") -> str:
    return "\u2013" if math.isnan(value) else format(value, form)
