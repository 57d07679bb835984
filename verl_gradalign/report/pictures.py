# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run, and of several runs side by side, each with a caption and a text in its place.

Shape legend: B bins of steps.
"""

import base64
import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from verl_gradalign.log.figures import (
    alignments,
    composition_over_time,
    curves,
    interval_over_time,
    score_against_success,
)
from verl_gradalign.log.selection_log import EXTRA
from verl_gradalign.report.run import RunData
from verl_gradalign.report.tallies import ValueTally
from verl_gradalign.report.visible_text import short

Curve = tuple[np.ndarray, np.ndarray]
"""Steps and values."""
Chart = tuple[str, str, Mapping[str, Curve], str]
"""Title, unit, curves by name, caption."""

MAX_VALUES = 7
MAX_COLUMNS = 3
MAX_CURVES = 8
AGE = "gradalign/direction/age"
RELIABILITIES = {"scores": "gradalign/reliability/scores", "direction": "gradalign/reliability/direction"}
LIFTS = (
    ("lift", "Lift of the forecast", "times", 1.0),
    ("difference", "Forecast picks above random draws", "score", 0.0),
)
ENDS = ("", "_low", "_high")
SECONDS = {"whole step": "timing_s/step"} | {s: f"gradalign/seconds/{s}" for s in ("rollout", "selection", "update")}
SHARES = {"selection itself": "gradalign/seconds/share_of_step", "with unused rollouts": "gradalign/cost/share_of_step"}


@dataclass(frozen=True)
class Picture:
    """An image and what is said of it."""

    src: str
    alt: str
    caption: str
    is_wide: bool = True


def pictures_of(run: RunData) -> dict[str, list[Picture]]:
    """Return a run's pictures by section of its page: what it achieves and trains on, whether its forecast pays, the
    score against the success rate, composition over time, how far scores and direction can be trusted, cost, problems
    by alignment."""
    return {
        "outcome": _drawn(_outcome(run)),
        "forecast": _forecast(run),
        "scores": _scores(run),
        "composition": _compositions(run),
        "reliability": _drawn(_reliability(run)),
        "cost": _drawn(
            [
                ("Seconds of a step", "s", _metrics(run, SECONDS), "The whole step, and its largest stages."),
                (
                    *("Selection's share of a step", "share", _metrics(run, SHARES)),
                    "With unused rollouts: those of candidates that are not trained on count too.",
                ),
            ]
        ),
        "problems": _problems(run),
    }


def compared(runs: Sequence[RunData]) -> list[Picture]:
    """Return the curves of several runs, one line each."""
    word = next((run.held_out()[0] for run in runs if run.held_out()[1]), "accuracy")

    def each(title: str, unit: str, curve_of: Callable[[RunData], Curve]) -> Chart:
        return title, unit, {run.name: curve_of(run) for run in runs}, "One line per run."

    def metric(title: str, unit: str, name: str) -> Chart:
        return each(title, unit, lambda run: run.metrics.curve(name))

    return _drawn(
        [
            each(f"Held-out {word}", _unit(word), _mean_accuracy),
            metric("Reward of what is trained on", "reward", "critic/score/mean"),
            each("Success rate of what was kept", "share", lambda run: _mean_by_step(run, "success_rate", True)),
            metric("Reliability of the scores", "correlation", "gradalign/reliability/scores"),
            metric("Selection's share of a step", "share", "gradalign/seconds/share_of_step"),
            metric("Seconds of a step", "s", "timing_s/step"),
        ]
    )


def _outcome(run: RunData) -> list[Chart]:
    word, names = run.held_out()
    held_out = {short(source, 40): run.metrics.points(name) for source, name in list(names.items())[:MAX_CURVES]}
    reward = next((n for n in ("critic/rewards/mean", "critic/score/mean") if run.metrics.count(n)), "")

    def means(column: str) -> dict[str, Curve]:
        return {name: _mean_by_step(run, column, bool(chosen)) for chosen, name in enumerate(run.groups)}

    return [
        (f"Held-out {word}", _unit(word), held_out, "verl's val-core metrics, by data source."),
        ("Reward of what is trained on", "reward", {"reward": run.metrics.curve(reward)}, f"verl's {reward}."),
        (
            *("Success rate", "share", means("success_rate")),
            "What the forecast chose, and random draws."
            if run.forecast.has_picks
            else "Candidates, and what was kept of them.",
        ),
        ("Alignment", "mean cosine", means("alignment"), "Cosine with the direction."),
        ("Response length", "tokens", means("response_tokens"), "Mean tokens of a response."),
        ("Entropy", "nats", {"entropy": run.metrics.curve("actor/entropy")}, "verl's actor/entropy."),
    ]


def _forecast(run: RunData) -> list[Picture]:
    """Return the lift with its interval, or the difference where there is no lift, and what stands behind it."""
    drawn: list[Picture] = []
    said = "What forecast picks were worth beside random draws, over the steps before; the band is the 90% interval."
    for name, title, unit, even in LIFTS:
        (steps, value), (_, low), (_, high) = (run.metrics.curve(f"gradalign/forecast/{name}{e}") for e in ENDS)
        if not drawn and len(value) == len(low) == len(high) > 0:
            figure = interval_over_time(title, unit, steps, value, low, high, even)
            last = f"{value[-1]:.3g} at step {steps[-1]:,.0f}, 90% interval {low[-1]:.3g} to {high[-1]:.3g}"
            drawn = [picture(figure, f"Line chart of {title.lower()} by step: {last}.", said)]
    agreement = {"correlation": "gradalign/forecast/spearman"}
    floor = {"drawn uniformly": "gradalign/forecast/floor", "trusted of trained": "gradalign/cost/trusted_share"}
    return drawn + _drawn(
        [
            (
                *("Forecasts and measurements", "correlation", _metrics(run, agreement)),
                "Rank correlation of forecasts with what was measured of the same problems afterwards.",
            ),
            (
                *("Shares of a batch", "share", _metrics(run, floor) if run.forecast.has_picks else {}),
                "Problems drawn uniformly, and trusted responses by those that are trained on.",
            ),
        ]
    )


def _reliability(run: RunData) -> list[Chart]:
    agreement = {"with the one before": "gradalign/direction/cosine_previous"}
    age = {"age": AGE} if run.metrics.most(AGE) > 0 else {}
    return [
        (
            *("Reliability", "correlation", _metrics(run, RELIABILITIES)),
            "1: a repetition would give the same; 0: pure noise.",
        ),
        ("Direction", "cosine", _metrics(run, agreement), "Agreement of a direction with the one before it."),
        (
            *("Length of the direction", "norm", _metrics(run, {"norm": "gradalign/direction/norm"})),
            "A direction that grows or vanishes: the trusted set is being learned, or has few live groups.",
        ),
        ("Age of the direction", "steps", _metrics(run, age), "Steps since the direction in use was made."),
    ]


def _metrics(run: RunData, names: Mapping[str, str]) -> dict[str, Curve]:
    return {label: run.metrics.curve(name) for label, name in names.items()}


def _scores(run: RunData) -> list[Picture]:
    """Return the score against the success rate."""
    rate, score, kept = run.points.points()
    if not len(score):
        return []
    name = short(str(run.key("gradalign.score", "score")), 40)
    with np.errstate(invalid="ignore"):
        related = np.corrcoef(rate, score)[0, 1] if len(score) > 2 and rate.std() and score.std() else np.nan
    said = "" if np.isnan(related) else f" Their correlation is {round(float(related), 2) + 0.0:+.2f}."
    caption = (
        f"Each dot is a candidate in a step, a random part of the {run.steps.num_scored:,} that were scored; dots are "
        f"moved sideways a little so that they do not hide each other.{said}"
    )
    alt = f"Scatter plot of {name} against the success rate of the group, kept problems in colour.{said}"
    return [picture(score_against_success(rate, score, kept, name), alt, caption)]


def _compositions(run: RunData) -> list[Picture]:
    """Return the composition over time, by data source and other columns that have several values, at most three."""
    drawn = []
    for column in [column for column, tally in run.columns.items() if len(tally.values) > 1][:MAX_COLUMNS]:
        name = short(column.removeprefix(EXTRA), 40)
        groups = run.groups if run.forecast.has_picks else ("candidates", "trained on")
        figure = composition_over_time(*_shares_over_time(run.columns[column]), name, groups)
        alt = f"Stacked areas over steps: shares of {groups[0]} and of {groups[1]}, by {name}."
        drawn.append(picture(figure, alt, f"By {name}. Neighbouring steps are taken together."))
    return drawn


def _shares_over_time(tally: ValueTally) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return steps, and by value the shares of candidates and of kept ones; rare values are put together."""
    names = [short(name, 60) for name in tally.counts(False)]
    counts = np.stack([list(tally.counts(of_kept).values()) for of_kept in (False, True)])
    if len(names) > MAX_VALUES:
        names[MAX_VALUES:] = [f"{len(names) - MAX_VALUES} others"]
        counts = np.concatenate([counts[:, :MAX_VALUES], counts[:, MAX_VALUES:].sum(1, keepdims=True)], 1)
    totals = counts.sum(1, keepdims=True)
    is_there_B = totals[0, 0] > 0
    pool, kept = np.where(totals > 0, counts / np.maximum(totals, 1), np.nan)[..., is_there_B]
    return tally.bins.steps[is_there_B], dict(zip(names, zip(pool, kept, strict=True), strict=True))


def _problems(run: RunData) -> list[Picture]:
    """Return the histogram of problems by alignment."""
    suspects = run.suspects
    if suspects.num_measured < 2:
        return []
    unit = f"mean {suspects.unit} with the direction"
    figure = alignments(suspects.mean_M, suspects.table["alignment"].to_numpy(), suspects.typical, unit)
    alt = f"Histogram of {suspects.num_measured:,} problems by {unit}; {len(suspects):,} of them are suspicious."
    return [picture(figure, alt, f"All {suspects.num_measured:,} problems whose alignment and its error are known.")]


def _mean_accuracy(run: RunData) -> Curve:
    """Return the mean over data sources, at the steps that all of them were validated at."""
    points = [dict(zip(*run.metrics.points(name), strict=True)) for name in run.held_out()[1].values()]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return np.array(steps), np.array([np.mean([values[step] for values in points]) for step in steps])


def _unit(word: str) -> str:
    return "share" if word == "accuracy" else word


def _mean_by_step(run: RunData, name: str, of_kept: bool) -> Curve:
    """Return a mean by bin: only of bins that have one, and nan where steps are missing, so that the line breaks."""
    value_B = run.steps.means(name, of_kept)
    is_shown_B = np.isfinite(value_B) | ~run.steps.has_rows_B
    return run.steps.bins.steps[is_shown_B], value_B[is_shown_B]


def _drawn(charts: Iterable[Chart]) -> list[Picture]:
    """Return the charts that have anything to draw as pictures."""
    drawn = []
    for title, unit, series, caption in charts:
        known = {short(name, 60): (x, y) for name, (x, y) in series.items() if len(y) and np.isfinite(y).any()}
        ends = []
        for name, (x, y) in list(known.items())[:MAX_CURVES]:
            first, last = np.flatnonzero(np.isfinite(y))[[0, -1]]
            start, end = _number(y[first], unit), _number(y[last], unit)
            ends.append(f"{name} {start} at step {x[first]:,.0f}, {end} at {x[last]:,.0f}")
        if known:
            alt = f"Line chart of {title.lower()} by step: {'; '.join(ends)}."
            drawn.append(picture(curves(title, unit, known), alt, caption, is_wide=False))
    return drawn


def _number(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{value:,.3g}"


# Text stays text: small, sharp, and in scripts that matplotlib's own font lacks. Equal figures give equal files.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "verl-gradalign", "font.family": "DejaVu Sans"}
RASTER_DPI = 110
# Of a path's coordinates, a hundredth of a point is enough; the digits after it are half of the file.
PATH = re.compile(rb' d="[^"]*"')
DIGITS = re.compile(rb"(\.\d\d)\d+")


def picture(figure: Figure, alt: str, caption: str, is_wide: bool = True) -> Picture:
    """Return a figure as a picture."""
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts may have it
        figure.savefig(file, format="svg", dpi=RASTER_DPI, metadata={"Date": None, "Creator": None})
    drawing = PATH.sub(lambda path: DIGITS.sub(rb"\1", path[0]), file.getvalue())
    src = "data:image/svg+xml;base64," + base64.b64encode(drawing).decode("ascii")
    return Picture(src, alt, caption, is_wide)
