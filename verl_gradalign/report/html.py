# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file that needs nothing else: no network, no script, no other file.

path = write_report(find_runs(["outputs"]), "report.html")

The template gets tables, pictures and plain values by name. Every text from outside is made visible, by `short` and
`shown`: here, or in the template where it is a problem's.
"""

import importlib.metadata
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from verl_gradalign.files import replacing
from verl_gradalign.log.selection_log import EXTRA
from verl_gradalign.report.findings import findings_of, headline_of
from verl_gradalign.report.forecast_findings import forecast_findings
from verl_gradalign.report.pictures import compared, pictures_of
from verl_gradalign.report.problem_texts import problem_texts
from verl_gradalign.report.run import RunData
from verl_gradalign.report.visible_text import short, shown

MAX_RUNS_IN_FULL = 5
MAX_TABLE_ROWS = 12
TEXT_BYTES = 1_200_000
"""Of all prompts, answers and responses; together with pictures this stays below 5 MB."""
TEXTS_PER_PROBLEM = 6
MOST_CHARS, LEAST_CHARS = 3000, 300
UNKNOWN = "\u2013"
COMPARED = (
    *("run", "score", "steps", "held-out accuracy", "reliability of scores, direction", "kept: success, alignment"),
    *("selection's share of a step", "suspicious"),
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
COSTS = {
    "rollout": "generating candidates and trusted problems",
    "direction": "making the direction of the trusted sets",
    "scores": "measuring the candidates",
    "rest of the selection": "moving data, choosing, logging",
    "update": "the actor's update",
    "everything else": "old log-probabilities, reference, weights, validation, checkpoints",
}
"""By stage of a step; those of one word are metrics, gradalign/seconds/<stage>."""


@dataclass(frozen=True)
class Table:
    """A table of text; `bars` are lengths from 0 to 1 drawn beside the rows."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    bars: Sequence[float] = ()


def render(runs: Sequence[RunData], top: int = 30) -> str:
    """Return the report on the runs. Of more than five, the first five are shown in full, and all are compared."""
    in_full = runs[:MAX_RUNS_IN_FULL]
    num_shown = sum(min(top, len(run.suspects)) for run in in_full)
    # Four bytes hold a character of any language.
    fair_share = TEXT_BYTES // (4 * TEXTS_PER_PROBLEM * max(1, num_shown))
    environment = Environment(
        loader=PackageLoader("verl_gradalign.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    most = min(MOST_CHARS, max(LEAST_CHARS, fair_share))
    environment.filters |= {"short": short, "shown": partial(shown, most=most)}
    return environment.get_template("report.html.j2").render(
        pages=[_page(run, number, top) for number, run in enumerate(in_full, start=1)],
        comparison=_comparison_table(runs) if len(runs) > 1 else None,
        compared=compared(runs) if len(runs) > 1 else [],
        num_runs=len(runs),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=importlib.metadata.version("verl-gradalign"),
    )


def write_report(
    runs: Sequence[RunData], path: str | Path, top: int = 30, tell: Callable[[str], None] = lambda _: None
) -> Path:
    """Write the report and return its path. The file is whole or, as before, not there."""
    path = Path(path)
    tell("drawing")
    text = render(runs, top)
    # A unique name: two reports may be written to one place at a time.
    with replacing(path, path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="replace")
    return path


def _page(run: RunData, number: int, top: int) -> dict[str, Any]:
    """Return everything of one run. `top`: suspicious problems shown."""
    verdict, headline = headline_of(run)
    return {
        "anchor": f"run-{number}",
        "name": short(run.name, 120),
        "place": short(str(run.folder), 300),
        "facts": _facts(run),
        "verdict": verdict,
        "headline": headline,
        "findings": findings_of(run),
        "forecast": list(forecast_findings(run)),
        "sources": _sources_table(run) if run.forecast.has_picks else None,
        "missing": [short(text, 1500) for text in run.missing],
        "pictures": pictures_of(run),
        "composition": [_composition_table(run, column) for column in run.columns if run.steps.num_rows],
        "reasons": _reasons_table(run),
        "costs": _cost_table(run),
        "suspects": run.suspects,
        "shown_suspects": _suspects(run, top),
    }


def _facts(run: RunData) -> list[tuple[str, str]]:
    known = {label: run.key(path) for label, path in SETTINGS.items()}
    versions, created = run.about.get("versions"), run.about.get("created")
    facts = [("Size", f"{run.steps.num_rows:,} candidates in {len(run.steps.steps):,} steps")]
    facts += [(label, short(str(value))) for label, value in known.items() if value is not None]
    if isinstance(versions, dict):
        facts.append(("Versions", short(", ".join(f"{name} {version}" for name, version in versions.items()), 300)))
    return facts + ([("Started", short(str(created)))] if created else [])


def _comparison_table(runs: Sequence[RunData]) -> Table:
    """Return a row per run."""
    rows = []
    for run in runs:
        results = run.accuracy()
        form = ".1%" if run.held_out()[0] == "accuracy" else ".3g"
        before, after = (
            float(np.mean([r[end] for r in results])) if results else math.nan for end in ("before", "after")
        )
        reliabilities = (run.metrics.mean(f"gradalign/reliability/{name}") for name in ("scores", "direction"))
        rows.append(
            (
                short(run.name, 120),
                short(str(run.key("gradalign.score", "?")), 40),
                f"{len(run.steps.steps):,}",
                f"{_number(before, form)} \u2192 {_number(after, form)}",
                ", ".join(_number(value, ".2f") for value in reliabilities),
                f"{_number(run.steps.mean('success_rate', True), '.1%')}, "
                f"{_number(run.steps.mean('alignment', True), '+.3f')}",
                _number(run.metrics.mean("gradalign/seconds/share_of_step"), ".1%"),
                f"{len(run.suspects):,} of {run.suspects.num_measured:,}" if run.suspects.num_measured else UNKNOWN,
            )
        )
    return Table(
        COMPARED, rows, "Means over all steps; accuracies are means over data sources, first and last validation."
    )


def _composition_table(run: RunData, column: str) -> Table:
    values = run.composition(column)
    rows = [
        (short(value), f"{pool:.1%}", f"{kept:.1%}", f"{kept / pool:.2f}" if pool else UNKNOWN)
        for value, pool, kept in values[:MAX_TABLE_ROWS]
    ]
    name, rest = short(column.removeprefix(EXTRA)), len(values) - MAX_TABLE_ROWS
    cut = f"; the {MAX_TABLE_ROWS} most frequent values, {rest} more are not shown" if rest > 0 else ""
    pool, chosen = run.groups
    return Table((name, pool, chosen, f"{chosen} / {pool}"), rows, f"By {name}{cut}.")


def _sources_table(run: RunData) -> Table:
    """Return what was forecast and measured of each data source; of many the best and the worst."""
    sources = run.forecast.sources(list(run.columns["data_source"].values))
    half, rest = MAX_TABLE_ROWS // 2, len(sources) - MAX_TABLE_ROWS
    shown_sources = [*sources[:half], *sources[-half:]] if rest > 0 else sources
    rows = [
        (
            short(row.name),
            _number(row.mean_forecast, ".3g"),
            f"{_number(row.mean_observed, '.3g')} \u00b1 {_number(row.error, '.2g')}",
            _number(row.chosen_observed, ".3g"),
            _number(row.share_uniform, ".1%"),
            _number(row.share_forecast, ".1%"),
        )
        for row in shown_sources
    ]
    cut = f"; the best and the worst by forecast, {rest} between them are not shown" if rest > 0 else ""
    caption = f"Mean scores by data source; forecast and measured: of random draws, with the standard error{cut}."
    head = ("data_source", "forecast", "measured", "measured of forecast picks", "share of random draws")
    return Table((*head, "share of forecast picks"), rows, caption)


def _reasons_table(run: RunData) -> Table:
    kept, total = run.reasons.counts(True), max(1, run.steps.num_rows)
    rows = [
        (short(reason), "kept" if kept[reason].any() else "rejected", f"{count.sum():,}", f"{count.sum() / total:.1%}")
        for reason, count in run.reasons.counts(False).items()
        if count.any()
    ]
    return Table(("reason", "", "candidates", "share"), rows, "Why candidates were kept or rejected.")


def _cost_table(run: RunData) -> Table | None:
    """Return the mean seconds of a step by stage, None if they are not known."""
    num_steps, step_s = run.metrics.count("timing_s/step"), run.metrics.mean("timing_s/step")
    if not step_s > 0 or not run.metrics.count("gradalign/seconds/selection"):
        return None
    stages = ("rollout", "direction", "scores", "update", "selection")
    # A stage that not every step has counts with what it adds to the mean step.
    seconds = {s: float(np.nan_to_num(run.metrics.total(f"gradalign/seconds/{s}"))) / num_steps for s in stages}
    seconds["rest of the selection"] = max(0.0, seconds["selection"] - seconds["direction"] - seconds["scores"])
    seconds["everything else"] = max(0.0, step_s - seconds["selection"] - seconds["rollout"] - seconds["update"])
    rows = [(name, f"{seconds[name]:,.2f}", f"{seconds[name] / step_s:.1%}", what) for name, what in COSTS.items()]
    bars = [min(1.0, seconds[name] / step_s) for name in COSTS]
    return Table(("stage", "s / step", "share", ""), rows, f"Mean of {num_steps:,} steps: {step_s:,.1f} s each.", bars)


def _suspects(run: RunData, top: int) -> list[dict[str, Any]]:
    """Return the suspicious problems with their texts."""
    rows = run.suspects.table.slice(0, top).to_pylist()
    texts = problem_texts(run.reader, run.about, [row["problem_id"] for row in rows])
    return [
        row | {"success_rate": _number(row["success_rate"], ".0%"), "texts": texts[row["problem_id"]]} for row in rows
    ]


def _number(value: float, form: str) -> str:
    return UNKNOWN if math.isnan(value) else format(value, form)
