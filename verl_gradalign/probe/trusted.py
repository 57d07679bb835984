# SPDX-License-Identifier: Apache-2.0
"""The direction of one or several trusted sets, how far two halves of their responses agree on it, and its metric.

Each set gives a gradient, from two halves of its responses that add up to it: no pass is made twice. Sets are combined
as unit directions by weight; refreshes may be averaged. A diagonal metric then divides v, coordinate by coordinate, by
how large gradients are there; every estimator works on the result unchanged, norms of problems stay plain.

    direction, reports = trusted_direction(engine, {"amc": problems}, {"amc": 1.0}, config, previous)
    reports["amc"].half_cosine
    direction = with_adam_metric(direction, engine, optimizer)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from verl_gradalign.config import DirectionConfig
from verl_gradalign.probe.direction import (
    Direction,
    Shards,
    combined,
    inner,
    mapped,
    no_direction,
    summed_gradient,
    unit_direction,
)
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.backward import BackwardEstimator
from verl_gradalign.probe.fsdp import local_part, trainable_placements
from verl_gradalign.probe.gradient import trainable_parameters
from verl_gradalign.types import ProblemRows

Term = tuple[float, Shards]
"""A factor and what it is of."""
COMBINED = ""
"""Name of the report on all sets together."""
FLOOR = 0.1
"""with_candidates_metric: what is added to each coordinate's root mean square, as a share of their mean."""


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
    engine: GradientEngine,
    trusted: Mapping[str, Sequence[ProblemRows]],
    weights: Mapping[str, float],
    config: DirectionConfig,
    previous: Direction | None,
) -> tuple[Direction, dict[str, SetReport]]:
    """Return the direction of the trusted sets and a report on each, and on all under `COMBINED`. Collective.

    `trusted` has the live problems of every set that `weights` names. Sets without a gradient are left out; without
    any, the direction is degenerate. With `ema` it is the bias-corrected average over refreshes, of which `previous` is
    the last.
    """
    gradients = {
        name: _halves(engine, _weighed(engine, trusted[name], config.aggregation)) for name in weights if trusted[name]
    }
    norms = {name: _norm(engine, halves) for name, halves in gradients.items()}
    usable = [name for name, norm in norms.items() if 0.0 < norm < math.inf]
    if not usable:
        return replace(no_direction(engine.module), norm=next(iter(norms.values()), 0.0)), {}
    # A single set keeps its length, which the moving average weighs refreshes by; of several only directions compare.
    is_single, scale = len(weights) == 1, engine.gradient_scale
    factors = {name: 1.0 if is_single else weights[name] / norms[name] for name in usable}
    terms = [[(factors[name], gradients[name][which]) for name in usable] for which in (0, 1)]
    fresh = unit_direction(engine, combined([*terms[0], *terms[1]]), scale if is_single else 1.0)
    reports = {
        name: SetReport(
            norm=norms[name] * scale,
            half_cosine=_half_cosine(engine, *([(1.0, half)] for half in gradients[name])),
            cosine=sum(inner(engine, half, fresh.shards) for half in gradients[name]) / norms[name],
        )
        for name in usable
    }
    reports[COMBINED] = SetReport(fresh.norm, _half_cosine(engine, *terms), 1.0)
    return _averaged(engine, fresh, previous, config.ema or 0.0), reports


def _weighed(engine: GradientEngine, problems: Sequence[ProblemRows], aggregation: str) -> Sequence[ProblemRows]:
    """Return the problems, scaled to unit gradients if the aggregation asks for them. Collective."""
    if aggregation == "aggregate":
        return problems
    # A pass for the norms first, as a problem's scale must be known when its rows run among those of others; by
    # `backward`, because trusted rows are spread over the ranks and other estimators need whole problems.
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
    first, second = (summed_gradient(engine, [problem.half(which) for problem in problems]) for which in (0, 1))
    return first, second


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
    # `previous` is bias-corrected too: its uncorrected average has the weight 1 - ema^(k - 1).
    before, now = ema * (1 - ema**previous.num_refreshes), 1 - ema
    # The fresh one first: sums are formed on the first term's device, and the previous one may lie in CPU memory.
    terms = [(now * fresh.norm, fresh.shards), (before * previous.norm, previous.shards)]
    average = combined([(factor / (before + now), shards) for factor, shards in terms])
    return replace(unit_direction(engine, average), num_refreshes=previous.num_refreshes + 1)


def with_adam_metric(direction: Direction, engine: GradientEngine, optimizer: torch.optim.Optimizer) -> Direction:
    """Return v / (sqrt(v_hat) + eps), normalised, with Adam's bias-corrected second moments v_hat. Collective.

    Before the optimizer's first step there are no moments: the direction is returned as it is. Its `norm` stays that
    of the plain v.

    Raises: ValueError if the optimizer keeps no second moments.
    Source: GradAlign's `use_optimizer` and LESS (arXiv 2402.04333) section 3, there for the trusted side too.
    """
    if direction.is_degenerate or not optimizer.state:
        return direction
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}

    def divided(name: str, parameter: nn.Parameter, shard: Tensor) -> Tensor:
        state, group = optimizer.state.get(parameter, {}), groups.get(id(parameter), {})
        if "exp_avg_sq" not in state:
            trouble = f"{type(optimizer).__name__} keeps no second moments of {name}"
            remedy = "Remedy: use an Adam optimizer, or set gradalign.direction.metric=none."
            raise ValueError(f"gradalign.direction.metric=adam: {trouble}. {remedy}")
        # The direction's shards or the moments may lie in CPU memory.
        moment = local_part(state["exp_avg_sq"]).to(shard.device)
        return shard / (moment / (1 - group["betas"][1] ** float(state["step"]))).sqrt().add_(group["eps"])

    pairs = zip(trainable_parameters(engine.module), direction.shards, strict=True)
    shards = tuple(None if shard is None else divided(*named, shard) for named, shard in pairs)
    return _normalised(direction, engine, shards)


def with_candidates_metric(direction: Direction, engine: GradientEngine, problems: Sequence[ProblemRows]) -> Direction:
    """Return v / (rms + a tenth of its mean), normalised, with rms over the problems' gradients. Collective.

    One backward pass for each problem. Without problems, or if their gradients are zero or not finite, the direction
    is returned as it is. Its `norm` stays that of the plain v.
    """
    if direction.is_degenerate or not problems:
        return direction
    # One at a time: each is a gradient of the model's size.
    squares = (mapped(torch.square, summed_gradient(engine, [problem])) for problem in problems)
    total = reduce(lambda before, square: combined([(1.0, before), (1.0, square)]), squares)
    rms = mapped(lambda shard: (shard / len(problems)).sqrt(), total)
    # Of whole parameters, a tied one once: a rank's shards may be padded or missing.
    num_numbers = sum({use.identity: use.shape.numel() for use in trainable_placements(engine.module)}.values())
    mean = inner(engine, rms, mapped(torch.ones_like, rms)) / num_numbers
    if not (math.isfinite(mean) and mean > 0):
        return direction
    shards = tuple(
        v if v is None or size is None else v / (size + FLOOR * mean).to(v.device)
        for v, size in zip(direction.shards, rms, strict=True)
    )
    return _normalised(direction, engine, shards)


def _normalised(direction: Direction, engine: GradientEngine, shards: Shards) -> Direction:
    norm = math.sqrt(inner(engine, shards, shards))
    return replace(direction, shards=mapped(lambda shard: shard / norm, shards))
