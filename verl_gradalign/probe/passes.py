# SPDX-License-Identifier: Apache-2.0
"""Passes over whole problems: on which rank, which rows together, and sums over ranks of what they gave.

A norm needs all of a problem's tokens on one rank, or on ranks that share its rows. A problem that one micro-batch does
not hold runs in several, one after another, and its gradient is added up over them.

    ranks = assign([problem.num_tokens for problem in problems], num_ranks=8)
    for batch in micro_batches(engine, problems):
        log_prob_RT, layout = engine.forward(batch.rows, batch.rows_per_problem)
        ...

Shape legend: P problems, R rows of a problem or of a micro-batch, T response tokens.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_gradalign.probe.engine import GradientEngine, TokenBudget
from verl_gradalign.probe.ranks import largest, summed
from verl_gradalign.types import ProblemRows, ProblemScores


def assign(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Return the rank of each problem: longest first, each to the rank with the least so far.

    No rank gets more than 4/3 of the best possible (Graham, 1969).
    """
    # Ties go to the lowest rank, so that every process finds the same assignment.
    loads = [(0, rank) for rank in range(num_ranks)]
    ranks = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        ranks[index] = rank
        heapq.heappush(loads, (load + costs[index], rank))
    return ranks


REMEDY = "raise gradalign.probe.max_tokens_per_rank (max_tokens, without verl), or set gradalign.estimator=backward"


def pack(problems: Sequence[ProblemRows], budget: TokenBudget) -> list[list[int]]:
    """Return micro-batches of problem indices, each within the budget: longest first, into the first that has room.

    Raises: ValueError if a problem alone exceeds the budget.
    """
    budget.require_room(problems, REMEDY)
    micro_batches: list[list[int]] = []
    # By the longest row, so that rows padded to one width have similar lengths.
    for index in sorted(range(len(problems)), key=lambda i: (-problems[i].longest_row, -problems[i].num_tokens)):
        for members in micro_batches:
            if budget.holds([problems[i] for i in [*members, index]]):
                members.append(index)
                break
        else:
            micro_batches.append([index])
    return micro_batches


def cut(problem: ProblemRows, lengths: Sequence[int], budget: TokenBudget) -> list[slice]:
    """Return runs of a problem's rows, of these lengths, as many together as a micro-batch holds, and one at least."""

    def size(rows: slice) -> ProblemRows:
        mine = lengths[rows]
        return ProblemRows(problem.uid, (), len(mine), sum(mine), max(mine))

    start, runs = 0, []
    for end in range(2, len(lengths) + 1):
        if not budget.holds([size(slice(start, end))]):
            runs.append(slice(start, end - 1))
            start = end - 1
    return [*runs, slice(start, len(lengths))]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank runs together: whole problems, or some rows of one that is larger than a micro-batch.

    No problem where it only runs as many passes as other ranks.
    """

    problems: tuple[int, ...]
    """Positions in the scoring call's sequence of problems."""
    rows: tuple[int, ...]
    rows_per_problem: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    """Rows of each problem's halves that are in it, or of the whole problem where it is not split."""
    halves: tuple[tuple[int, ...], ...]
    """Which half each part is."""
    first_row: int = 0
    """Rows of the problem before these."""
    is_whole: bool = True
    """Whether all rows of its problems are in it."""
    is_last: bool = True
    """Whether none of the problem's rows come in a later one."""


def micro_batches(engine: GradientEngine, problems: Sequence[ProblemRows]) -> list[MicroBatch]:
    """Return this rank's micro-batches, equally many on every rank. Collective.

    A problem that no micro-batch holds is cut into several, one after another.

    Raises: ValueError if one row is larger than the engine's budget, or if a problem's rows are spread over ranks.
    """
    mine = _own_problems(engine, problems)
    fitting = [index for index in mine if engine.budget.holds([problems[index]])]
    packed = pack([problems[index] for index in fitting], engine.budget)
    batches = [_micro_batch(problems, [fitting[member] for member in members]) for members in packed]
    for index in sorted(set(mine) - set(fitting)):
        batches += _cut_problem(problems[index], index, engine)
    padding = MicroBatch((), (engine.spare_row,), (1,), ((1,),), ((0,),))
    # Every pass gathers parameters: a rank that ran fewer would leave the others waiting.
    num_batches = largest(len(batches), engine.data_group, engine.device)
    return batches + [padding] * (num_batches - len(batches))


def rows_together(engine: GradientEngine, problems: Sequence[ProblemRows]) -> MicroBatch:
    """Return all rows of this rank's problems, as one batch that the engine cuts itself (`GradientEngine.row_sums`).

    Raises: as `micro_batches`.
    """
    return _micro_batch(problems, _own_problems(engine, problems))


def _own_problems(engine: GradientEngine, problems: Sequence[ProblemRows]) -> list[int]:
    """Return the positions of the problems whose rows this rank has."""
    for problem in problems:  # of all ranks, for one alone that stopped would leave the others waiting
        uid, longest = f"{problem.uid}, one response alone,", problem.longest_row
        engine.budget.require_room([ProblemRows(uid, (), 1, longest, longest)], REMEDY)
    mine = [index for index, problem in enumerate(problems) if problem.rows]
    for problem in (problems[index] for index in mine):
        if len(problem.rows) != problem.num_rows:
            held = f"problem {problem.uid} has {len(problem.rows)} of its {problem.num_rows} rows on this rank"
            raise ValueError(f"{held}; this estimator needs whole problems (passes.assign)")
    return mine


def _micro_batch(problems: Sequence[ProblemRows], chosen: Sequence[int]) -> MicroBatch:
    members = [problems[index] for index in chosen]
    parts = [_parts(problem, slice(None)) for problem in members]
    return MicroBatch(
        problems=tuple(chosen),
        rows=tuple(row for problem in members for row in problem.rows),
        rows_per_problem=tuple(problem.num_rows for problem in members),
        parts=tuple(tuple(of_problem.values()) for of_problem in parts),
        halves=tuple(tuple(of_problem) for of_problem in parts),
    )


def _cut_problem(problem: ProblemRows, index: int, engine: GradientEngine) -> list[MicroBatch]:
    runs = cut(problem, [engine.row_length(row) for row in problem.rows], engine.budget)
    parts = [_parts(problem, run) for run in runs]
    return [
        MicroBatch(
            problems=(index,),
            rows=problem.rows[run],
            rows_per_problem=(run.stop - run.start,),
            parts=(tuple(of_run.values()),),
            halves=(tuple(of_run),),
            first_row=run.start,
            is_whole=False,
            is_last=run is runs[-1],
        )
        for run, of_run in zip(runs, parts, strict=True)
    ]


def _parts(problem: ProblemRows, rows: slice) -> dict[int, int]:
    """Return how many of some of a problem's rows belong to each half, without a half that has none."""
    # Without an empty half: it has no positions in the activations.
    return dict(Counter(problem.halves[rows] if problem.is_split else [0] * len(problem.rows[rows])))


def pass_weights(
    engine: GradientEngine, batch: MicroBatch, width: int, dtype: torch.dtype, per_response: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how rows enter a pass and its sums: (weight_RT, scale_R, gives_R) with weight * scale the coefficient.

    The weight is of each token's log-probability in the summed objective, the scale of a row's gradient in its
    problem's; `gives_R` marks rows whose gradient is that of their plain log-probability.
    With `per_response` the weight is 1 on every token where all of a row have one coefficient, as under group-relative
    advantages; then the row's gradient is that of log pi(y), whatever its advantage, zero included. Without, the scales
    are of each problem's *parts*. A padding batch has weight 0.
    No problem's weights are all small: the coefficients of long problems (1e-5 a token) would vanish in float16.

    Shapes: (rows, width), and (rows,) or (parts,) twice; on the CPU.
    """
    weight_RT = torch.zeros(len(batch.rows), width, dtype=dtype)
    scales: list[float] = []
    gives: list[bool] = []
    for parts in batch.parts if batch.problems else ((1,),):
        first = len(gives)
        numbers = range(first, first + sum(parts))
        # A padding batch's row has coefficients too, which do not count.
        rows = [engine.coefficients(batch.rows[index]) if batch.problems else NO_TOKENS for index in numbers]
        size = power_of_two(max((_size(coefficient_T) for coefficient_T, _ in rows), default=0.0))
        for index, (coefficient_T, mask_T) in zip(numbers, rows, strict=True):
            chosen = coefficient_T[mask_T.bool()]
            # Exactly: where a response has one advantage and one weight, its coefficients are equal bit for bit.
            is_one = per_response and bool((chosen == chosen[:1]).all())
            weight_RT[index, : len(mask_T)] = mask_T if is_one else coefficient_T / size
            gives.append(is_one)
            if per_response:
                scales.append(size if not is_one else float(chosen[0]) if len(chosen) else 1.0)
        if not per_response:
            scales += [size] * len(parts)
    gives_R = torch.tensor(gives if per_response else [False] * len(scales), dtype=torch.bool)
    return weight_RT, torch.tensor(scales, dtype=dtype), gives_R


def weighed_sums(log_prob_T: Tensor, coefficient_T: Tensor, mask_T: Tensor) -> Tensor:
    """Return a response's sum of coefficient times log-prob, and of log-probs: (2,), float64, on the CPU.

    Log-probs may be longer than the response, by padding.
    """
    # In float64 before the sum: of two nearly equal sums subtracted, rounding would be all that is left.
    log_prob_T = log_prob_T[: len(mask_T)].double().cpu()
    return torch.stack([(coefficient_T * log_prob_T).sum(), (mask_T * log_prob_T).sum()])


NO_TOKENS = (torch.zeros(0), torch.zeros(0))


def _size(values: Tensor) -> float:
    return float(values.abs().max()) if len(values) else 0.0


def power_of_two(size: float) -> float:
    """Return the power of two next below a size, which a division by is exact; 1 for one of zero or not finite."""
    return math.ldexp(1.0, math.frexp(size)[1] - 1) if 0 < size < math.inf else 1.0


class ProblemSums:
    """Adds up what micro-batches give for rows and problems, on this rank and then over all ranks."""

    def __init__(self, problems: Sequence[ProblemRows]) -> None:
        num_rows = max((problem.num_rows for problem in problems), default=0)
        self._problems = problems
        # One tensor, so that one reduction brings all of it together: the halves' dots, the squared norm, derivatives.
        # In float64: adding up micro-batches and ranks adds no rounding to what estimators give.
        self._sums = torch.zeros(len(problems), 3 + num_rows, dtype=torch.float64)

    def add_rows(self, batch: MicroBatch, dot_R: Tensor, derivative_R: Tensor) -> None:
        """Note each row's part of its problem's dot product, and its derivative."""
        if not batch.parts:  # this rank has no rows
            return
        # Not strict: a padding batch has a row, but no problem.
        by_problem = torch.split(derivative_R.double().cpu(), list(batch.rows_per_problem))
        for index, mine_R in zip(batch.problems, by_problem, strict=False):
            first = 3 + batch.first_row
            self._sums[index, first : first + len(mine_R)] = mine_R
        by_part = torch.split(dot_R.double().cpu(), [num_rows for parts in batch.parts for num_rows in parts])
        self.add_parts(batch, torch.stack([part_R.sum() for part_R in by_part]))

    def add_parts(self, batch: MicroBatch, dot_of_parts: Tensor) -> None:
        """Note the dot products of each problem's parts, (parts,): its halves, or all of it."""
        by_problem = torch.split(dot_of_parts.double().cpu(), [len(parts) for parts in batch.parts])
        for index, dots, halves in zip(batch.problems, by_problem, batch.halves, strict=False):
            self._sums[index, list(halves)] += dots

    def add_norms(self, batch: MicroBatch, squared_norm_P: Tensor) -> None:
        """Note each problem's squared norm."""
        if batch.problems:
            self._sums[list(batch.problems), 2] += squared_norm_P.double().cpu()

    def reduce(self, engine: GradientEngine, direction_norm: float) -> ProblemScores:
        """Return the problems' scores, summed over all ranks; what was not noted is zero. Collective."""
        sums = summed_over_ranks(engine, self._sums)
        num_rows_P = torch.tensor([problem.num_rows for problem in self._problems], dtype=torch.int64)
        is_row_PR = torch.arange(sums.shape[1] - 3) < num_rows_P.unsqueeze(1)
        derivative_PR = sums[:, 3:].masked_fill(~is_row_PR, torch.nan)
        # A tied weight's cross term, or rounding, can take a norm of zero below it.
        norm_P = sums[:, 2].clamp(min=0).sqrt()
        return problem_scores(self._problems, sums[:, :2], norm_P, derivative_PR, direction_norm)


def problem_scores(
    problems: Sequence[ProblemRows], dot_P2: Tensor, norm_P: Tensor, derivative_PR: Tensor | None, direction_norm: float
) -> ProblemScores:
    """Return the scores of problems by the halves' dot products; one that is not split has all of it in the first."""
    is_split_P = torch.tensor([problem.is_split for problem in problems], dtype=torch.bool)
    return ProblemScores(
        uid=tuple(problem.uid for problem in problems),
        dot_P=dot_P2.sum(dim=1),
        norm_P=norm_P,
        num_tokens_P=torch.tensor([problem.num_tokens for problem in problems], dtype=torch.int64),
        response_derivative_PR=derivative_PR,
        direction_norm=direction_norm,
        half_dot_P2=dot_P2.masked_fill(~is_split_P.unsqueeze(1), torch.nan),
    )


def summed_over_ranks(engine: GradientEngine, values: Tensor) -> Tensor:
    """Return the sum, on the CPU, over the ranks that hold different rows. Collective."""
    return values if engine.data_group is None else summed(values.to(engine.device), engine.data_group).cpu()
