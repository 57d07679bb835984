# SPDX-License-Identifier: Apache-2.0
"""Candidates compared with their own pool in one pass: a random projection of every candidate's gradient is kept.

A matrix's gradient G (O x I) becomes S, K x K numbers (`projections.py`); a vector's becomes as many by one projection.
E<S_i, S_j> = <G_i, G_j>. G is never formed for it, though it is for the norms, which are exact: taps and rules are
those of `ghost`.

    scores = sketched_scores(engine, candidates, weights, rank=16, seed=0)
    learnalign_P = weight_P * scores.cosine_P * scores.direction_norm / len(candidates)

Projections are drawn where a layer's backward passes, and dropped: K (O + I) numbers, little beside the layer's own
work. Each candidate keeps K^2 numbers for each parameter tensor, in CPU memory.

Shape legend: N flattened positions, O output features (or tokens of the vocabulary), I input features, D numbers of a
vector, K the rank, R rows, P problems, L parameter tensors.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.ghost import tapped_scores
from verl_gradalign.probe.layer_rules import LayerCall, LayerRule, LayerScores
from verl_gradalign.probe.passes import MicroBatch, summed_over_ranks
from verl_gradalign.probe.projections import FACTORS, VECTOR_RULES, normal_matrix, normal_sides
from verl_gradalign.probe.tap_points import TapPoint, tap_points
from verl_gradalign.rank_correlation import MIN_RANKED, spearman, spearman_brown
from verl_gradalign.types import ProblemRows, ProblemScores, ratio

BatchSketch = tuple[list[int], Tensor]
"""Problems of one micro-batch of this rank, by position in the call, and their sketches in the accumulation dtype."""
REMEDY = "set gradalign.probe.pool_dots=exact"


def sketched_scores(
    engine: GradientEngine, problems: Sequence[ProblemRows], weights: Sequence[float] | None, rank: int, seed: int
) -> ProblemScores:
    """Return estimated scores of `problems` along u = sum_j w_j g_j / |g_j| of their own. Collective.

    Without weights, u = sum_j g_j. Norms are exact, and so is each problem's part in its own product with u; |u|, the
    direction's norm, is estimated too. Problems whose norm is zero or not finite are left out of u. Each problem's
    rows lie on one rank.

    Diagnostics: `fidelity/spearman`, the rank correlation of the sketched scores w_i <g_i, u> / |g_i| with the exact
    ones, as far as the sketch can tell from itself (`_fidelity`); nan below three problems.

    Units: dot products and norms are of the gradient of sum_t c_t log pi(y_t).
    Raises: ValueError that names the layer or the problem, and the remedy, if a layer has no sketch or a problem
        exceeds the budget; RuntimeError as `ghost.tapped_scores`.
    Source: LearnAlign (arXiv 2506.11480) section 3; the two-sided projection is LoGra's (arXiv 2405.13954).
    """
    assert rank >= 2 and rank % 2 == 0, "checked by ProbeConfig"
    engine.budget.require_room(problems, f"{REMEDY}, or raise gradalign.probe.max_tokens_per_rank.")
    sketcher = Sketcher(sketch_points(engine.module), rank, seed)
    # Halves are not distinguished: each problem counts as one row.
    whole = [replace(problem, is_split=False, halves=()) for problem in problems]
    sketches, scores = sketch_gradients(engine, whole, sketcher)
    norm_P = scores.norm_P
    assert norm_P is not None
    is_known_P = norm_P.isfinite() & (norm_P > 0)
    weight_P = torch.ones_like(norm_P) if weights is None else torch.tensor(weights, dtype=torch.float64)
    unit_P = torch.where(is_known_P, ratio(weight_P, norm_P), 0.0)
    factor_P = is_known_P.double() if weights is None else unit_P
    product_P3, total_norm = _products(engine, sketches, factor_P, norm_P, sketcher.shape)
    squared_norm = (factor_P * product_P3[:, 0])[is_known_P].sum().item()
    # Noise may outweigh a short sum. All scores are divided by the same number, which ranks nothing.
    direction_norm = squared_norm**0.5 if squared_norm > 0 else total_norm
    dot_P = product_P3[:, 0] / direction_norm if direction_norm > 0 else torch.zeros_like(norm_P)
    quarter_P2 = (product_P3[:, 1:] * unit_P.unsqueeze(1))[is_known_P]
    return replace(
        scores,
        dot_P=torch.where(norm_P == 0, 0.0, dot_P),
        direction_norm=direction_norm,
        half_dot_P2=None,
        diagnostics={"fidelity/spearman": _fidelity(quarter_P2)},
    )


def sketch_points(module: nn.Module) -> list[TapPoint]:
    """Return the taps of `ghost`.

    Raises: ValueError that names the layer and the remedy, if a layer has no rule, or none that a sketch is known for.
    """
    points = tap_points(module)
    for point in points:
        if point.rule not in FACTORS and (point.has_matrix or point.rule not in VECTOR_RULES):
            layer = f"{point.name} ({type(point.module).__name__})"
            rule = "a layer rule of its own, which gives products and norms but no sketch"
            raise ValueError(f"{layer} has {rule}. Remedy: {REMEDY}.")
    return points


class Sketcher:
    """Sketches a micro-batch's problems, each of which counts as one row, where the layers' rules run."""

    def __init__(self, points: Sequence[TapPoint], rank: int, seed: int) -> None:
        self._rank, self._seed = rank, seed
        names: dict[tuple[int, int], str] = {}
        for placement in (placement for point in points for placement in point.placements):
            names.setdefault(placement.identity, placement.name)
        self.names = list(names.values())
        """Of the parameters in the order of the sketches; a tied one is there once."""
        self.shape = (len(names), rank, rank)
        """Of one problem's sketch."""
        self.points = [replace(point, rule=partial(self._measure, point)) for point in points]
        self.batches: list[BatchSketch] = []
        self._place_of = {identity: place for place, identity in enumerate(names)}
        self._sketch_PLKK: Tensor | None = None

    def keep(self, batch: MicroBatch) -> None:
        """Keep the sketches of the micro-batch whose backward pass has ended, in CPU memory."""
        sketch_PLKK, self._sketch_PLKK = self._sketch_PLKK, None
        assert sketch_PLKK is not None, "some layer is tapped"
        if batch.problems:
            self.batches.append((list(batch.problems), sketch_PLKK.cpu()))

    def _measure(self, point: TapPoint, call: LayerCall) -> LayerScores:
        """Add the layer's parameters to the sketches, and return its squared norms."""
        if self._sketch_PLKK is None:
            self._sketch_PLKK = call.scale_R.new_zeros(len(call.scale_R), *self.shape)
        squared_norm_P = torch.zeros_like(call.scale_R)
        for placement in point.placements:
            place, attribute = self._place_of[placement.identity], placement.attribute
            name, direction = self.names[place], call.direction[attribute]
            is_vector = len(placement.shape) == 1
            if is_vector:
                # Rules multiply a vector's gradient from the right, so they take all projections at once.
                shape = (placement.shape[0], self._rank**2)
                direction = normal_matrix(self._seed, f"{name} vector", shape, call.delta.device)
            # One parameter at a time: the rule adds up what it is given, and each has a sketch for itself.
            scores = point.rule(replace(call, direction={attribute: direction}))
            squared_norm_P += scores.squared_norm_P
            part_PKK = (
                scores.derivative_R.view(-1, self._rank, self._rank)
                if is_vector
                else self._matrix_sketch(point.rule, name, placement.shape, call)
            )
            self._sketch_PLKK[:, place] += part_PKK * call.scale_R.view(-1, 1, 1)
        return LayerScores(torch.zeros_like(call.scale_R), squared_norm_P)

    def _matrix_sketch(self, rule: LayerRule, name: str, shape: torch.Size, call: LayerCall) -> Tensor:
        """Return (delta P_O)^T (input P_I) of each problem, (problems, K, K)."""
        sides = normal_sides(self._seed, name, shape, self._rank, call.delta.device)
        left_NK, right_NK = FACTORS[rule](call, *sides)
        if call.layout.is_padded:
            left_PTK, right_PTK = (each.view(call.layout.num_rows, -1, self._rank) for each in (left_NK, right_NK))
            return left_PTK.transpose(1, 2) @ right_PTK
        return torch.stack([left_NK[row].T @ right_NK[row] for row in call.layout.rows()])


def sketch_gradients(
    engine: GradientEngine, problems: Sequence[ProblemRows], sketcher: Sketcher
) -> tuple[list[BatchSketch], ProblemScores]:
    """Return this rank's sketches, and all problems' norms, from one pass over all problems. Collective."""
    # Products with a direction are not wanted; a zero that takes no memory stands for it.
    zero = torch.zeros((), device=engine.device)
    points, gather = sketcher.points, lambda p: zero.expand(p.shape)
    scores = tapped_scores(engine, problems, 0.0, points, gather, per_response=False, after_pass=sketcher.keep)
    return sketcher.batches, scores


def _products(
    engine: GradientEngine, sketches: Sequence[BatchSketch], factor_P: Tensor, norm_P: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, float]:
    """Return estimates of <g_i, u> with u = sum_j factor_j g_j, and the length of u's sketch. Collective.

    Shapes: (problems, 3): by the whole sketches, and by two independent quarters of them.
    """
    total_LKK = torch.zeros(shape, dtype=torch.float64)
    for problems, sketch_PLKK in sketches:
        factor = factor_P[problems]
        is_in = factor != 0  # others may not be finite
        total_LKK += torch.tensordot(factor[is_in], sketch_PLKK[is_in].double(), dims=1)
    total_LKK = summed_over_ranks(engine, total_LKK)
    rank = shape[-1]
    product_P3 = torch.zeros(len(factor_P), 3, dtype=torch.float64)
    for index, block in enumerate((slice(0, rank), slice(0, rank // 2), slice(rank // 2, rank))):
        # A quarter of the numbers has a quarter of the product.
        share = ((block.stop - block.start) / rank) ** 2
        total_G = total_LKK[:, block, block].flatten()
        for problems, sketch_PLKK in sketches:
            part_PG, factor = sketch_PLKK[:, :, block, block].flatten(1).double(), factor_P[problems]
            # A problem's own part is known exactly, so the sketch estimates only what the others add.
            others = part_PG @ total_G - factor * part_PG.square().sum(dim=1)
            product_P3[problems, index] = others / share + factor * norm_P[problems].square()
    return summed_over_ranks(engine, product_P3), total_LKK.norm().item()


def _fidelity(quarter_P2: Tensor) -> float:
    """Return the rank correlation with the exact scores, as the agreement of two quarters' scores tells it.

    Spearman-Brown's is that of the whole sketch with another one; with what both estimate it is the square root.
    Quarters, not halves: halves would share the projections of one side, and with them errors.
    """
    if len(quarter_P2) < MIN_RANKED:
        return math.nan
    correlation = spearman(quarter_P2[:, 0], quarter_P2[:, 1])
    return correlation if math.isnan(correlation) else math.sqrt(max(0.0, spearman_brown(correlation)))
