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
    added,
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
    is_single, scale = len(weights) == 1, engine.gradient_scale
    sums, norms, reports = _Sums(engine, is_alone=is_single), dict[str, float](), dict[str, SetReport]()
    for name in (name for name in weights if trusted[name]):
        halves = _halves(engine, _weighed(engine, trusted[name], config.aggregation))
        norms[name] = norm = _norm(engine, halves)
        if 0.0 < norm < math.inf:
            reports[name] = SetReport(norm * scale, _half_cosine(engine, *halves), math.nan)
            # A single set keeps its length, which the moving average weighs refreshes by; of several only directions
            # compare.
            sums.add(name, 1.0 if is_single else weights[name] / norm, halves)
        del halves  # the next set's take their place
    if not reports:
        return replace(no_direction(engine.module), norm=next(iter(norms.values()), 0.0)), {}
    half_cosine = sums.half_cosine()
    fresh = unit_direction(engine, sums.total(), scale if is_single else 1.0)
    cosines = {name: sums.cosine(name, norms[name], fresh) for name in reports}
    reports = {name: replace(report, cosine=cosines[name]) for name, report in reports.items()}
    reports[COMBINED] = SetReport(fresh.norm, half_cosine, 1.0)
    return _averaged(engine, fresh, previous, config.ema or 0.0), reports


class _Sums:
    """The halves of several sets' gradients added up, and each set's own for its products later.

    Of more than one set they lie in CPU memory, so that the device holds one set's halves, however many sets there are.
    """

    def __init__(self, engine: GradientEngine, is_alone: bool) -> None:
        self._engine, self._is_alone, self._home = engine, is_alone, engine.device
        self._halves: list[Shards] = []
        self._wholes: dict[str, Shards] = {}

    def add(self, name: str, factor: float, halves: tuple[Shards, Shards]) -> None:
        """Add a set's halves times a factor."""
        if self._is_alone:  # its length is kept
            self._halves = list(halves)
            return
        self._home = next((shard.device for half in halves for shard in half if shard is not None), self._home)
        mine = [mapped(Tensor.cpu, half) for half in halves]
        terms = [[(factor, half)] for half in mine]
        if self._halves:
            terms = [[(1.0, before), *term] for before, term in zip(self._halves, terms, strict=True)]
        self._halves = [combined(term) for term in terms]
        self._wholes[name] = added(*mine)

    def half_cosine(self) -> float:
        """Return the cosine of the two sums. Collective; before `total`."""
        return _half_cosine(self._engine, *self._halves)

    def total(self) -> Shards:
        """Return the sum of both, where the gradients were; it takes their place."""
        total = added(*self._halves)
        self._halves = []
        return mapped(lambda shard: shard.to(self._home), total)

    def cosine(self, name: str, norm: float, fresh: Direction) -> float:
        """Return the cosine of a set's gradient, of this norm, with the direction. Collective."""
        return 1.0 if self._is_alone else inner(self._engine, self._wholes[name], fresh.shards) / norm


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
    """Return the norm of the sum of two halves, which is not formed. Collective."""
    first, second = halves
    squared = sum(inner(engine, *pair) for pair in ((first, first), (second, second))) + 2 * inner(engine, *halves)
    return math.sqrt(max(squared, 0.0)) if math.isfinite(squared) else math.nan


def _half_cosine(engine: GradientEngine, first: Shards, second: Shards) -> float:
    """Return the cosine of two gradients, nan if one is zero. Collective."""
    squares = inner(engine, first, first) * inner(engine, second, second)
    return inner(engine, first, second) / math.sqrt(squares) if squares > 0 else math.nan


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
