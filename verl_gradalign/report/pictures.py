# SPDX-License-Identifier: Apache-2.0
"""The pictures of a run, and of several runs side by side, each with a caption and a text in its place."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from verl_gradalign.log.figures import alignments, composition_over_time, curves, score_against_success
from verl_gradalign.log.selection_log import EXTRA
from verl_gradalign.report.rules_outcome import held_out
from verl_gradalign.report.run import RunData
from verl_gradalign.report.tallies import ValueTally
from verl_gradalign.report.visible_text import short

__all__ = ["Picture", "compared", "composition", "cost", "outcome", "picture", "problems", "reliability", "scores"]

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]

MAX_VALUES = 7
MAX_COLUMNS = 3
MAX_OUTCOMES = 8
STAGES = {
    "rollout": "gradalign/seconds/rollout",
    "selection": "gradalign/seconds/selection",
    "update": "gradalign/seconds/update",
}


def outcome(run: RunData) -> list[Picture]:
    """Return the curves of what a run achieves and trains on."""
    word, names = held_out(run)
    accuracy = {short(source, 40): run.metrics.points(name) for source, name in list(names.items())[:MAX_OUTCOMES]}
    reward = next((n for n in ("critic/rewards/mean", "critic/score/mean") if run.metrics.count(n)), "")
    drawn = [
        _curves(f"Held-out {word}", _unit(word), accuracy, "verl's val-core metrics, by data source."),
        _curves("Reward of what is trained on", "reward", {"reward": run.metrics.curve(reward)}, f"verl's {reward}."),
        _curves("Success rate", "share", _pool_and_kept(run, "success_rate"), "Candidates, and what was kept of them."),
        _curves("Alignment", "mean cosine", _pool_and_kept(run, "alignment"), "Cosine with the direction."),
        _curves("Response length", "tokens", _pool_and_kept(run, "tokens"), "Mean tokens of a response."),
        _curves("Entropy", "nats", {"entropy": run.metrics.curve("actor/entropy")}, "verl's actor/entropy."),
    ]
    return [one for one in drawn if one is not None]


def scores(run: RunData) -> list[Picture]:
    """Return the score against the success rate."""
    rate, score, kept = run.points.points()
    if not len(score):
        return []
    name = short(str(run.key("gradalign.score", "score")), 40)
    with np.errstate(invalid="ignore"):
        related = (
            float(np.corrcoef(rate, score)[0, 1]) if len(score) > 2 and rate.std() and score.std() else float("nan")
        )
    said = "" if np.isnan(related) else f" Their correlation is {round(related, 2) + 0.0:+.2f}."
    caption = (
        f"Each dot is a candidate in a step, a random part of the {run.steps.num_scored:,} that were scored; dots are "
        f"moved sideways a little so that they do not hide each other.{said}"
    )
    alt = f"Scatter plot of {name} against the success rate of the group, kept problems in colour.{said}"
    return [picture(score_against_success(rate, score, kept, name), alt, caption)]


def composition(run: RunData) -> list[Picture]:
    """Return the composition over time, by data source and other columns that have several values, at most three."""
    drawn: list[Picture] = []
    for column, tally in run.columns.items():
        if len(tally.values) > 1 and len(drawn) < MAX_COLUMNS:
            name = short(column.removeprefix(EXTRA), 40)
            steps, shares = shares_over_time(tally)
            alt = f"Stacked areas over steps: shares of the candidates and of what was trained on, by {name}."
            drawn.append(
                picture(
                    composition_over_time(steps, shares, name),
                    alt,
                    f"By {name}. Neighbouring steps are taken together.",
                )
            )
    return drawn


def shares_over_time(tally: ValueTally) -> tuple[np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return steps, and by value the shares of candidates and of kept ones; rare values are put together."""
    counts = [tally.counts(of_kept) for of_kept in (False, True)]
    totals = [np.sum(list(count.values()), axis=0) for count in counts]
    is_there_B = totals[0] > 0
    names = list(counts[0])
    groups = {short(name, 60): [name] for name in names[:MAX_VALUES]}
    if len(names) > MAX_VALUES:
        groups[f"{len(names) - MAX_VALUES} others"] = names[MAX_VALUES:]
    shares = {}
    for label, members in groups.items():
        pool, kept = (
            np.where(total > 0, np.sum([count[m] for m in members], axis=0) / np.maximum(total, 1), np.nan)[is_there_B]
            for count, total in zip(counts, totals, strict=True)
        )
        shares[label] = (pool, kept)
    return tally.bins.steps[is_there_B], shares


def reliability(run: RunData) -> list[Picture]:
    """Return the curves of how far scores and direction can be trusted."""
    named = {"scores": "gradalign/reliability/scores", "direction": "gradalign/reliability/direction"}
    agreement = {"with the one before": run.metrics.curve("gradalign/direction/cosine_previous")}
    age = (
        {"age": run.metrics.curve("gradalign/direction/age")} if run.metrics.most("gradalign/direction/age") > 0 else {}
    )
    drawn = [
        _curves(
            "Reliability", "correlation", _series(run, named), "1: a repetition would give the same; 0: pure noise."
        ),
        _curves("Direction", "cosine", agreement, "Agreement of a direction with the one before it."),
        _curves(
            "Length of the direction",
            "norm",
            {"norm": run.metrics.curve("gradalign/direction/norm")},
            "A direction that grows or vanishes: the trusted set is being learned, or has few live groups.",
        ),
        _curves("Age of the direction", "steps", age, "Steps since the direction in use was made."),
    ]
    return [one for one in drawn if one is not None]


def cost(run: RunData) -> list[Picture]:
    """Return the curves of seconds and of the share that selection takes."""
    shares = {
        "selection itself": "gradalign/seconds/share_of_step",
        "with unused rollouts": "gradalign/cost/share_of_step",
    }
    drawn = [
        _curves(
            "Seconds of a step",
            "s",
            _series(run, {"whole step": "timing_s/step", **STAGES}),
            "The whole step, and its largest stages.",
        ),
        _curves(
            "Selection's share of a step",
            "share",
            _series(run, shares),
            "With unused rollouts: those of candidates that are not trained on count too.",
        ),
    ]
    return [one for one in drawn if one is not None]


def problems(run: RunData) -> list[Picture]:
    """Return the histogram of problems by alignment."""
    suspects = run.suspects
    if suspects.num_measured < 2:
        return []
    unit = "mean cosine with the direction" if suspects.is_cosine else "mean dot product with the direction"
    figure = alignments(suspects.mean_M, suspects.mean_S, suspects.typical, unit)
    alt = f"Histogram of {suspects.num_measured:,} problems by {unit}; {len(suspects):,} of them are suspicious."
    return [picture(figure, alt, f"All {suspects.num_measured:,} problems whose alignment and its error are known.")]


def compared(runs: Sequence[RunData]) -> list[Picture]:
    """Return the curves of several runs, one line each."""
    word = next((held_out(run)[0] for run in runs if held_out(run)[1]), "accuracy")
    tables = {
        f"Held-out {word}": (_unit(word), {run.name: _mean_accuracy(run) for run in runs}),
        "Reward of what is trained on": ("reward", {run.name: run.metrics.curve("critic/score/mean") for run in runs}),
        "Success rate of what was kept": ("share", {run.name: _of(run, "success_rate", True) for run in runs}),
        "Reliability of the scores": (
            "correlation",
            {run.name: run.metrics.curve("gradalign/reliability/scores") for run in runs},
        ),
        "Selection's share of a step": (
            "share",
            {run.name: run.metrics.curve("gradalign/seconds/share_of_step") for run in runs},
        ),
        "Seconds of a step": ("s", {run.name: run.metrics.curve("timing_s/step") for run in runs}),
    }
    drawn = [_curves(title, unit, series, "One line per run.") for title, (unit, series) in tables.items()]
    return [one for one in drawn if one is not None]


def _mean_accuracy(run: RunData) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over data sources, at the steps that all of them were validated at."""
    points = [dict(zip(*run.metrics.points(name), strict=True)) for name in held_out(run)[1].values()]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return np.array(steps), np.array([np.mean([values[step] for values in points]) for step in steps])


def _unit(word: str) -> str:
    return "share" if word == "accuracy" else word


def _of(run: RunData, name: str, of_kept: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return a mean by bin: only of bins that have one, and nan where steps are missing, so that the line breaks."""
    values_B = run.steps.means(name, of_kept)
    is_shown_B = np.isfinite(values_B) | ~run.steps.has_rows
    return run.steps.bins.steps[is_shown_B], values_B[is_shown_B]


def _pool_and_kept(run: RunData, name: str) -> Series:
    return {"candidates": _of(run, name, False), "kept": _of(run, name, True)}


def _series(run: RunData, names: Mapping[str, str]) -> Series:
    return {label: run.metrics.curve(name) for label, name in names.items()}


def _curves(title: str, unit: str, series: Series, caption: str) -> Picture | None:
    """Return lines as a picture, None if there is nothing to draw."""
    known = {short(name, 60): (x, y) for name, (x, y) in series.items() if len(y) and np.isfinite(y).any()}
    if not known:
        return None
    ends = []
    for name, (x, y) in list(known.items())[:MAX_OUTCOMES]:
        there = np.flatnonzero(np.isfinite(y))
        first, last = there[0], there[-1]
        ends.append(
            f"{name} {_number(y[first], unit)} at step {x[first]:,.0f}, {_number(y[last], unit)} at {x[last]:,.0f}"
        )
    return picture(
        curves(title, unit, known), f"Line chart of {title.lower()} by step: {'; '.join(ends)}.", caption, False
    )


def _number(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "share" else f"{value:,.3g}"


# Text stays text: small, sharp, and in scripts that matplotlib's own font lacks. Equal figures give equal files.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "verl-gradalign", "font.family": "DejaVu Sans"}
NO_DATE = {"Date": None, "Creator": None}
RASTER_DPI = 110
# Of a path's coordinates, a hundredth of a point is enough; the digits after it are half of the file.
PATH = re.compile(rb' d="[^"]*"')
DIGITS = re.compile(rb"(\.\d\d)\d+")


@dataclass(frozen=True)
class Picture:
    """An image and what is said of it."""

    src: str
    alt: str
    caption: str
    is_wide: bool = True


def picture(figure: Figure, alt: str, caption: str, is_wide: bool = True) -> Picture:
    """Return a figure as a picture."""
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts may have it
        figure.savefig(file, format="svg", dpi=RASTER_DPI, metadata=NO_DATE)
    drawing = PATH.sub(lambda path: DIGITS.sub(rb"\1", path[0]), file.getvalue())
    src = "data:image/svg+xml;base64," + base64.b64encode(drawing).decode("ascii")
    return Picture(src, alt, caption, is_wide)
