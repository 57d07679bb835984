# SPDX-License-Identifier: Apache-2.0
"""The direction of one or several trusted sets, and how far two halves of their responses agree on it.

Each set gives a gradient, from two halves of its responses that add up to it: no pass is made twice. Sets are combined
as unit directions by weight; refreshes may be averaged.

    direction, reports = trusted_direction(engine, [TrustedRows("amc", 1.0, problems)], config, previous)
    reports["amc"].half_cosine
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from verl_gradalign.config import DirectionConfig
from verl_gradalign.probe.direction import (
    Direction,
    Shards,
    combined,
    inner,
    no_direction,
    summed_gradient,
    unit_direction,
)
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.backward import BackwardEstimator
from verl_gradalign.types import ProblemRows

__all__ = ["COMBINED", "SetReport", "TrustedRows", "trusted_direction"]

Term = tuple[float, Shards]
"""A factor and what it is of."""

COMBINED = ""
"""Name of the report on all sets together."""


@dataclass(frozen=True)
class TrustedRows:
    """One trusted set's live problems, as the engine holds them."""

    name: str
    weight: float
    problems: tuple[ProblemRows, ...]


@dataclass(frozen=True)
class SetReport:
    """What is known of one set's direction."""

    norm: float
    """|v_s|, in units of the gradient (of all sets together: of the weighted sum of unit directions)."""
    half_cosine: float
    """Cosine between the gradients of two halves of the responses; nan if the problems are not split."""
    cosine: float
    """Cosine of v_s with the combined direction; nan if it has none."""


def trusted_direction(
    engine: GradientEngine, sets: Sequence[TrustedRows], config: DirectionConfig, previous: Direction | None
) -> tuple[Direction, dict[str, SetReport]]:
    """Return the direction of the trusted sets and a report on each, and on all under `COMBINED`. Collective.

    Sets without a gradient are left out; without any, the direction is degenerate. With `ema` it is the bias-corrected
    average over refreshes, of which `previous` is the last.
    """
    gradients = {s.name: _halves(engine, _weighed(engine, s.problems, config.aggregation)) for s in sets if s.problems}
    norms = {name: _norm(engine, halves) for name, halves in gradients.items()}
    usable = [s for s in sets if 0.0 < norms.get(s.name, 0.0) < math.inf]
    if not usable:
        return replace(no_direction(engine.module), norm=next(iter(norms.values()), 0.0)), {}
    is_single = len(sets) == 1
    factors = {s.name: 1.0 if is_single else s.weight / norms[s.name] for s in usable}
    terms = [[(factors[s.name], gradients[s.name][which]) for s in usable] for which in (0, 1)]
    scale = engine.gradient_scale
    fresh = unit_direction(engine, combined([*terms[0], *terms[1]]), scale if is_single else 1.0)
    reports = {
        s.name: SetReport(
            norm=norms[s.name] * scale,
            half_cosine=_half_cosine(engine, *([(1.0, half)] for half in gradients[s.name])),
            cosine=sum(inner(engine, half, fresh.shards) for half in gradients[s.name]) / norms[s.name],
        )
        for s in usable
    }
    reports[COMBINED] = SetReport(fresh.norm, _half_cosine(engine, *terms), 1.0)
    return _averaged(engine, fresh, previous, config.ema), reports


def _weighed(engine: GradientEngine, problems: Sequence[ProblemRows], aggregation: str) -> list[ProblemRows]:
    """Return the problems, scaled to unit gradients if the aggregation asks for them. Collective."""
    if aggregation == "aggregate":
        return list(problems)
    norm_P = BackwardEstimator().score(engine, problems, no_direction(engine.module)).norm_P
    assert norm_P is not None
    known = [(problem, norm) for problem, norm in zip(problems, norm_P.tolist(), strict=True) if 0 < norm < math.inf]
    return [replace(problem, scale=1.0 / (norm * len(known))) for problem, norm in known]


def _halves(engine: GradientEngine, problems: Sequence[ProblemRows]) -> tuple[Shards, Shards]:
    """Return the gradients of the two halves of all responses; without split problems the second is nothing."""
    nothing = no_direction(engine.module).shards
    if not problems:
        return nothing, nothing
    if not all(problem.is_split for problem in problems):
        return summed_gradient(engine, problems), nothing
    return tuple(summed_gradient(engine, [p.half(which) for p in problems]) for which in (0, 1))  # type: ignore[return-value]


def _norm(engine: GradientEngine, halves: tuple[Shards, Shards]) -> float:
    """Return the norm of the sum of two halves. Collective."""
    terms = [(1.0, half) for half in halves]
    squared = _inner(engine, terms, terms)
    return math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.nan


def _half_cosine(engine: GradientEngine, first: Sequence[Term], second: Sequence[Term]) -> float:
    """Return the cosine of two sums, nan if one is zero. Collective."""
    squares = _inner(engine, first, first) * _inner(engine, second, second)
    return _inner(engine, first, second) / math.sqrt(squares) if squares > 0 else math.nan


def _inner(engine: GradientEngine, first: Sequence[Term], second: Sequence[Term]) -> float:
    """Return the inner product of two sums, term by term: no sum is formed, which would be a model's size each."""
    return sum(a * b * inner(engine, x, y) for a, x in first for b, y in second)


def _averaged(engine: GradientEngine, fresh: Direction, previous: Direction | None, ema: float) -> Direction:
    """Return the bias-corrected moving average m / (1 - ema^k) of the gradients of k refreshes, as a direction."""
    if ema == 0 or previous is None or previous.is_degenerate:
        return fresh
    num_refreshes = previous.num_refreshes + 1
    # `previous` is bias-corrected too: its uncorrected average has the weight 1 - ema^(k - 1).
    before = ema * (1 - ema**previous.num_refreshes)
    now = 1 - ema
    terms = [(before * previous.norm, previous.shards), (now * fresh.norm, fresh.shards)]
    # The fresh one first: sums are formed on the first term's device, and the previous one may lie in CPU memory.
    average = combined([(factor / (before + now), shards) for factor, shards in reversed(terms)])
    return replace(unit_direction(engine, average), num_refreshes=num_refreshes)
