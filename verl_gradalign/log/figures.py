# SPDX-License-Identifier: Apache-2.0
"""Figures of a run, drawn from plain arrays. They hold no global state, so any thread may draw them.

    figure = score_against_success(success_rate_P, score_P, kept_P)
    figure.savefig("scores.png")

Names in them come from outside (data sources, values of extra_info, runs): none is read as mathematics.

Shape legend: P problems, S steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F4F24", "#4D4D4D")
"""Okabe and Ito's colours, distinguishable with any colour vision, without the yellow that is lost on white."""
GREY = "#8A8A8A"
INK = "#222222"

MAX_POINTS = 160
MIN_POINTS = 40
MAX_DOTS = 3000
MAX_BANDS = 24
MAX_NAME_CHARS = 32
MAX_LEGEND_NAMES = 12


def thinned(steps_S: np.ndarray, values_S: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `most` points: means of neighbouring ones. Values that are not finite are left out of them."""
    is_known_S = np.isfinite(values_S)
    steps_S, values_S = np.asarray(steps_S)[is_known_S], np.asarray(values_S)[is_known_S]
    if len(steps_S) <= most:
        return steps_S, values_S
    starts = np.linspace(0, len(steps_S), most, endpoint=False).astype(int)
    counts = np.diff([*starts, len(steps_S)])
    return np.add.reduceat(steps_S, starts) / counts, np.add.reduceat(values_S, starts) / counts


def score_against_success(
    success_rate_P: np.ndarray, score_P: np.ndarray, kept_P: np.ndarray, score_name: str = "score"
) -> Figure:
    """Return a scatter of scores against success rates, kept problems in colour, and the median score along it.

    Problems without a score or success rate are left out; of very many a random part is drawn (seeded).
    """
    is_known_P = np.isfinite(success_rate_P) & np.isfinite(score_P)
    rate, score, kept = success_rate_P[is_known_P], score_P[is_known_P], np.asarray(kept_P)[is_known_P].astype(bool)
    figure, (axes,) = _panels((9.4, 4.2))
    random = np.random.default_rng(0)
    middle, median = _medians(rate, score)
    if len(rate) > MAX_DOTS:
        chosen = random.permutation(len(rate))[:MAX_DOTS]
        rate, score, kept = rate[chosen], score[chosen], kept[chosen]
    # Success rates of groups are a few fractions: dots of one fraction would hide each other.
    jittered = rate + random.uniform(-0.012, 0.012, len(rate))
    for is_mine, colour, label in ((~kept, GREY, "not kept"), (kept, PALETTE[0], "kept")):
        dots = axes.scatter(jittered[is_mine], score[is_mine], s=9, c=colour, alpha=0.45, linewidths=0, label=label)
        dots.set_rasterized(True)
    if len(middle) > 1:
        axes.plot(middle, median, color=INK, linewidth=1.8, label="median of all")
    if len(score):
        axes.axhline(0, color=INK, linewidth=0.6, alpha=0.5)
        axes.set_ylim(*_span(score))
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("success rate of the group")
    axes.set_ylabel(score_name, parse_math=False)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)
    return figure


def composition_over_time(
    steps_S: np.ndarray,
    shares: Mapping[str, tuple[np.ndarray, np.ndarray]],
    title: str = "",
    groups: tuple[str, str] = ("candidates", "trained on"),
) -> Figure:
    """Return two stacked areas side by side: what the candidates were, and what was trained on (or other `groups`).

    `shares` gives, by name, the share of that kind among the candidates and among the kept ones, each (steps,), from 0
    to 1. A step in which nothing was kept is nan.
    """
    names = list(shares)
    figure, panels = _panels((9.4, 3.9), 2)
    for group, (axes, label) in enumerate(zip(panels, groups, strict=True)):
        _stack(axes, np.asarray(steps_S), [np.asarray(shares[name][group], dtype=float) for name in names])
        axes.set_title(label, fontsize=10.5, color=INK)
        axes.set_xlabel("step")
        axes.set_ylim(0, 1)
        axes.grid(False)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylabel(f"share by {title}" if title else "share", parse_math=False)
    handles = [Patch(facecolor=PALETTE[number % len(PALETTE)]) for number in range(len(names))]
    # The first area is at the bottom, so the list runs upwards like the areas.
    _legend(figure, handles[::-1], names[::-1])
    return figure


def curves(title: str, unit: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]], is_wide: bool = False) -> Figure:
    """Return lines over steps: `series` gives (steps_S, values_S) by name; a value that is not finite breaks the line.

    `unit` is written along the axis; "share" as percentages. Names share a legend where there are several. Of many
    points means of neighbouring ones are drawn.
    """
    figure, (axes,) = _panels((9.4, 3.6) if is_wide else (5.0, 3.0))
    handles: list[Artist] = []
    most = max(MIN_POINTS, min(MAX_POINTS, MAX_POINTS * 5 // max(1, len(series))))
    for number, (steps_S, values_S) in enumerate(series.values()):
        x, y = np.asarray(steps_S, dtype=float), np.asarray(values_S, dtype=float)
        if len(x) > most:
            x, y = thinned(x, y, most)
        marker = "o" if np.isfinite(y).sum() <= 25 else None
        style = ("-", "--", ":")[number // len(PALETTE) % 3]
        colour = PALETTE[number % len(PALETTE)]
        handles += axes.plot(x, y, style, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
    if unit == "share":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    else:
        axes.set_ylabel(unit, parse_math=False)
    if unit == "correlation":
        axes.set_ylim(min(0.0, *axes.get_ylim()) - 0.02, 1.02)
    axes.set_title(title, fontsize=11, color=INK, loc="left", parse_math=False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if len(series) > 1:
        _legend(figure, handles, list(series), is_below=not is_wide)
    return figure


def interval_over_time(
    title: str, unit: str, steps_S: np.ndarray, value_S: np.ndarray, low_S: np.ndarray, high_S: np.ndarray, even: float
) -> Figure:
    """Return a line over steps in the band of its interval, and where there is no effect, at `even`.

    Steps without a value are left out; of many, means of neighbouring ones are drawn.
    """
    figure, (axes,) = _panels((9.4, 3.6))
    is_known_S = np.isfinite(value_S) & np.isfinite(low_S) & np.isfinite(high_S)
    lines = [thinned(np.asarray(steps_S, float)[is_known_S], line_S[is_known_S]) for line_S in (value_S, low_S, high_S)]
    x, (value, low, high) = lines[0][0], [line for _, line in lines]
    axes.axhline(even, color=INK, linewidth=1.0, linestyle="--")
    axes.fill_between(x, low, high, color=PALETTE[0], alpha=0.2, linewidth=0)
    axes.plot(x, value, color=PALETTE[0], linewidth=1.8, marker="o" if len(x) <= 25 else None, markersize=3.5)
    if len(x):
        # The band is widest at the start, where little is known: it must not flatten what follows.
        axes.set_ylim(min(even, _span(low)[0]), max(even, _span(np.minimum(high, 4 * np.median(high)))[1]))
    axes.set_title(title, fontsize=11, color=INK, loc="left", parse_math=False)
    axes.set_ylabel(unit, parse_math=False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def alignments(
    mean_M: np.ndarray, suspect_S: np.ndarray, typical: float, unit: str = "mean cosine with the direction"
) -> Figure:
    """Return a histogram of problems by mean alignment, the suspicious ones in colour."""
    figure, (axes,) = _panels((9.4, 3.1))
    low, high = _span(mean_M)
    edges = np.linspace(low, high, 61)
    counts, suspects = (np.histogram(np.clip(values, low, high), edges)[0] for values in (mean_M, suspect_S))
    axes.stairs(counts, edges, fill=True, color="#B9C4CE", label="other problems")
    axes.stairs(suspects, edges, fill=True, color=PALETTE[1], label="suspicious")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.axvline(typical, color=PALETTE[0], linewidth=1.4, linestyle="--", label="typical (median)")
    axes.set_xlabel(unit)
    axes.set_ylabel("problems")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def _panels(size: tuple[float, float], num: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure and its axes, side by side."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = list(figure.subplots(1, num, sharey=True, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#777777")
        axes.grid(color="#E4E4E4", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK, labelsize=9.5, color="#777777")
        axes.xaxis.label.set_fontsize(10)
        axes.yaxis.label.set_fontsize(10)
    return figure, panels


def _span(values: np.ndarray) -> tuple[float, float]:
    """Return limits that a few far outliers do not stretch."""
    low, high = np.quantile(values, [0.002, 0.998])
    margin = 0.06 * (high - low) or max(1e-6, abs(high) * 0.1)
    return low - margin, high + margin


def _medians(rate: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median score in tenths of the success rate that have enough problems to have one."""
    tenth = np.clip((rate * 10).astype(int), 0, 9)
    filled = [t for t in range(10) if (tenth == t).sum() >= 5]
    middle = np.array([rate[tenth == t].mean() for t in filled])
    return middle, np.array([np.median(score[tenth == t]) for t in filled])


def _stack(axes: Axes, steps_S: np.ndarray, shares: Sequence[np.ndarray]) -> None:
    """Stack shares over steps: bars where there are few steps, areas of neighbouring steps' means else."""
    is_known_S = np.all([np.isfinite(share) for share in shares], axis=0) if shares else np.zeros(len(steps_S), bool)
    if not is_known_S.any():
        return
    points = [thinned(steps_S[is_known_S].astype(float), share[is_known_S], MAX_BANDS) for share in shares]
    x, colours = points[0][0], [PALETTE[number % len(PALETTE)] for number in range(len(shares))]
    if len(x) >= 4:
        axes.stackplot(x, [y for _, y in points], colors=colours, linewidth=0)
        axes.set_xlim(x[0], x[-1])
    else:
        bottom = np.zeros(len(x))
        for (_, y), colour in zip(points, colours, strict=True):
            axes.bar(x, y, 0.7, bottom=bottom, color=colour)
            bottom = bottom + y
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str], is_below: bool = False) -> None:
    """Put a legend outside the axes. Its texts are set afterwards: a label that begins with "_" would be left out."""
    shown = min(len(names), MAX_LEGEND_NAMES)
    placeholders = ["n" * min(len(name), MAX_NAME_CHARS) for name in names[:shown]]
    place: dict[str, Any] = {"loc": "outside right center"}
    if is_below:
        place = {"loc": "outside lower left", "ncols": 2 if shown > 1 else 1}
    legend = figure.legend(handles[:shown], placeholders, frameon=False, fontsize=9.5, handlelength=1.3, **place)
    for text, name in zip(legend.get_texts(), names, strict=False):
        text.set_parse_math(False)
        text.set_text(name if len(name) <= MAX_NAME_CHARS else name[: MAX_NAME_CHARS - 3] + "...")
