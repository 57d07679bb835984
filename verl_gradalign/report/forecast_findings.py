# SPDX-License-Identifier: Apache-2.0
"""Does the forecast pay? Sentences with numbers on a run with schedule forecast.

for finding in forecast_findings(run):
    print(finding.level, finding.message, finding.remedy)
"""

from collections.abc import Iterator
from math import isnan

from verl_gradalign.findings import GOOD, NOTE, WATCH, Finding
from verl_gradalign.report.forecast import SourceRow
from verl_gradalign.report.run import RunData
from verl_gradalign.report.visible_text import short

MAX_STARVED = 4
AREA = "forecast"


def forecast_findings(run: RunData) -> Iterator[Finding]:
    """Yield what is to be said of a forecast: whether it pays, how true it is, what it prefers and what it starves, and
    what the direction costs. Nothing of a run of another schedule."""
    if run.forecast.has_picks:
        for rule in (_lift, _starved, _agreement, _sources, _trusted):
            yield from rule(run)


def _lift(run: RunData) -> Iterator[Finding]:
    lift, (num_forecast, num_uniform) = run.forecast.lift, run.forecast.num_observed
    if lift is None:
        text = (
            "Whether the forecast pays cannot be said yet: of what it chose "
            f"{num_forecast:,} problems were measured, of random draws {num_uniform:,}."
        )
        floor = run.key("gradalign.forecast.floor")
        remedy = "Set gradalign.forecast.floor=0.125, so that there are random draws to compare with."
        yield Finding(AREA, WATCH, text, remedy if floor == 0 else "")
        return
    remedy = (
        "Set gradalign.forecast.on_no_lift=uniform, or give the forecast what distinguishes problems "
        "(gradalign.log.columns, gradalign.forecast.features) and a steadier direction (gradalign.direction.part, "
        "gradalign.direction.replay)."
    )
    yield Finding(AREA, GOOD if lift.pays else WATCH, lift.in_words(), "" if lift.pays is not False else remedy)


def _starved(run: RunData) -> Iterator[Finding]:
    starved = run.forecast.starved(list(run.columns["data_source"].values))
    if starved:
        more = f"; and {len(starved) - MAX_STARVED} more" if len(starved) > MAX_STARVED else ""
        text = f"Hardly ever chosen: {'; '.join(short(s.in_words(), 400) for s in starved[:MAX_STARVED])}{more}."
        remedy = "Look at their answers and rewards; gradalign.forecast.floor goes on drawing from them."
        is_suspect = any(source.is_suspect for source in starved)
        yield Finding("starved sources", WATCH if is_suspect else NOTE, text, remedy if is_suspect else "")


def _agreement(run: RunData) -> Iterator[Finding]:
    correlation, count = run.forecast.spearman()
    if isnan(correlation):
        return
    text = (
        f"Forecasts and what was measured of the same problems afterwards agree by {correlation:.2f} (rank "
        f"correlation of {count:,} picks, out of sample); single measurements are noisy, which bounds it."
    )
    by_features, by_problems = (run.metrics.mean(f"gradalign/forecast/explained_{n}") for n in ("features", "problems"))
    if not isnan(by_features) and not isnan(by_problems):
        text += f" Features explain {by_features:.0%} of their variance, the problems' own parts {by_problems:.0%}."
    yield Finding("forecasts and measurements", NOTE, text)


def _sources(run: RunData) -> Iterator[Finding]:
    rows = [row for row in run.forecast.sources(list(run.columns["data_source"].values)) if row.num_observed]
    by_forecast = [row for row in rows if not isnan(row.mean_forecast)]
    if len(by_forecast) < 2:
        return

    def named(row: SourceRow, value: float) -> str:
        return f"{short(row.name)} ({value:.3g})"

    best, worst = by_forecast[0], by_forecast[-1]
    most, least = (pick(rows, key=lambda row: row.mean_observed) for pick in (max, min))
    text = (
        f"By forecast {named(best, best.mean_forecast)} is best and {named(worst, worst.mean_forecast)} worst; as "
        f"measured on random draws {named(most, most.mean_observed)} and {named(least, least.mean_observed)}."
    )
    yield Finding("sources", NOTE, text)


def _trusted(run: RunData) -> Iterator[Finding]:
    for unit in ("responses", "tokens"):
        trusted, generated = (run.metrics.total(f"gradalign/{unit}/{name}") for name in ("trusted", "generated"))
        if generated > 0:
            text = f"The trusted set's {unit} were {trusted / generated:.1%} of all that were generated."
            yield Finding("trusted responses", NOTE, text)
            return
