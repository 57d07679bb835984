# SPDX-License-Identifier: Apache-2.0
"""Passes over whole problems: which rows run together on this rank, and sums over ranks of what they gave.

    for batch in micro_batches(engine, problems):
        log_prob_RT, layout = engine.forward(batch.rows, batch.rows_per_problem)
        ...

Shape legend: P problems, R rows of a problem or of a micro-batch, T response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.planning import ProblemSize, pack
from verl_gradalign.types import ProblemRows


@dataclass(frozen=True)
class MicroBatch:
    """Whole problems that one rank runs together; none where it only runs as many passes as other ranks."""

    problems: tuple[int, ...]
    """Positions in the scoring call's sequence of problems."""
    rows: tuple[int, ...]
    rows_per_problem: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    """Rows of each problem's halves, or of the whole problem where it is not split."""


def micro_batches(engine: GradientEngine, problems: Sequence[ProblemRows]) -> list[MicroBatch]:
    """Return this rank's micro-batches, equally many on every rank. Collective.

    Raises: ValueError if a problem is larger than the engine's budget, or if its rows are spread over ranks.
    """
    mine = [index for index, problem in enumerate(problems) if problem.rows]
    for index in mine:
        if len(problems[index].rows) != problems[index].num_rows:
            raise ValueError(
                f"problem {problems[index].uid} has {len(problems[index].rows)} of its {problems[index].num_rows} rows "
                "on this rank; this estimator needs whole problems (planning.assign)"
            )
    packed = pack([size_of(problems[index]) for index in mine], engine.budget)
    batches = []
    for members in packed:
        chosen = tuple(mine[member] for member in members)
        rows = tuple(row for index in chosen for row in problems[index].rows)
        rows_per_problem = tuple(len(problems[index].rows) for index in chosen)
        batches.append(MicroBatch(chosen, rows, rows_per_problem, tuple(parts_of(problems[i]) for i in chosen)))
    padding = MicroBatch((), (engine.spare_row,), (1,), ((1,),))
    # Every pass gathers parameters: a rank that ran fewer would leave the others waiting.
    num_batches = largest_of_ranks(len(batches), engine.data_group, next(engine.module.parameters()).device)
    return batches + [padding] * (num_batches - len(batches))


def parts_of(problem: ProblemRows) -> tuple[int, ...]:
    """Return the rows of each half of a problem that is whole on this rank, or of all of it if it is not split."""
    num_second = sum(problem.halves) if problem.is_split else 0
    return tuple(n for n in (len(problem.rows) - num_second, num_second) if n)


def size_of(problem: ProblemRows) -> ProblemSize:
    """Return the room that a problem takes."""
    return ProblemSize(problem.num_rows, problem.num_tokens, problem.longest_row)


@dataclass(frozen=True)
class RowWeights:
    """How the rows of a micro-batch enter a pass and its sums."""

    weight_RT: Tensor
    """Weight of each token's log-probability in the summed objective."""
    scale_R: Tensor
    """Factor by which a row's gradient enters its problem's."""
    gives_derivative_R: Tensor
    """Whether the row's gradient is that of its plain log-probability."""


def problem_weights(engine: GradientEngine, batch: MicroBatch, width: int, dtype: torch.dtype) -> RowWeights:
    """Return the coefficients as weights, and scale 1 for each *part*, where responses are not distinguished.

    Shapes: (rows, width), (parts,), (parts,); on the CPU.
    """
    weight_RT = torch.zeros(len(batch.rows), width, dtype=dtype)
    for index, row in enumerate(batch.rows if batch.problems else ()):
        coefficient_T, _ = engine.coefficients(row)
        weight_RT[index, : len(coefficient_T)] = coefficient_T
    num_parts = sum(map(len, batch.parts))
    return RowWeights(weight_RT, torch.ones(num_parts, dtype=dtype), torch.zeros(num_parts, dtype=torch.bool))


def row_weights(engine: GradientEngine, batch: MicroBatch, width: int, dtype: torch.dtype) -> RowWeights:
    """Return weights such that weight * scale is the coefficient, with weight 1 on every token where that is possible.

    It is where all tokens of a row have one coefficient, as under group-relative advantages; then the row's gradient
    is that of log pi(y), whatever its advantage, zero included. Padding rows have scale and weight 0.

    Shapes: (rows, width), (rows,), (rows,); on the CPU.
    """
    weight_RT = torch.zeros(len(batch.rows), width, dtype=dtype)
    scale_R = torch.zeros(len(batch.rows), dtype=dtype)
    gives_R = torch.zeros(len(batch.rows), dtype=torch.bool)
    for index, row in enumerate(batch.rows if batch.problems else ()):
        coefficient_T, mask_T = (t.to(dtype) for t in engine.coefficients(row))
        chosen = coefficient_T[mask_T.bool()]
        # Exactly: where a response has one advantage and one weight, its coefficients are equal bit for bit.
        gives_R[index] = bool((chosen == chosen[:1]).all())
        scale_R[index] = chosen[0] if gives_R[index] and len(chosen) else 1.0
        weight_RT[index, : len(mask_T)] = mask_T if gives_R[index] else coefficient_T
    return RowWeights(weight_RT, scale_R, gives_R)


@dataclass(frozen=True)
class ReducedSums:
    """Sums over all ranks, on the CPU."""

    dot_P: Tensor
    squared_norm_P: Tensor
    half_dot_P2: Tensor
    """nan for problems that are not split."""
    derivative_PR: Tensor
    """nan beyond a problem's rows."""


class ProblemSums:
    """Adds up what micro-batches give for rows and problems, on this rank and then over all ranks."""

    def __init__(self, problems: Sequence[ProblemRows]) -> None:
        num_rows = max((problem.num_rows for problem in problems), default=0)
        self._problems = problems
        # One tensor, so that one reduction brings all of it together: the halves' dots, the squared norm, derivatives.
        self._sums = torch.zeros(len(problems), 3 + num_rows, dtype=torch.float64)

    def add_rows(self, batch: MicroBatch, dot_R: Tensor, derivative_R: Tensor) -> None:
        """Note each row's part of its problem's dot product, and its derivative."""
        dot_R, derivative_R = dot_R.double().cpu(), derivative_R.double().cpu()
        rows = torch.split(torch.arange(sum(batch.rows_per_problem)), list(batch.rows_per_problem))
        for index, mine in zip(batch.problems, rows, strict=False):
            self._sums[index, 3 : 3 + len(mine)] = derivative_R[mine]
        self.add_parts(batch, torch.cat([torch.stack([p.sum() for p in part]) for part in self._parts(batch, dot_R)]))

    def add_parts(self, batch: MicroBatch, dot_of_parts: Tensor) -> None:
        """Note the dot products of each problem's parts, (parts,): its halves, or all of it."""
        parts = torch.split(dot_of_parts.double().cpu(), [len(part) for part in batch.parts])
        for index, part in zip(batch.problems, parts, strict=False):
            self._sums[index, : len(part)] += part

    def add_norms(self, batch: MicroBatch, squared_norm_P: Tensor) -> None:
        """Note each problem's squared norm."""
        if batch.problems:
            self._sums[list(batch.problems), 2] += squared_norm_P.double().cpu()

    def reduce(self, engine: GradientEngine) -> ReducedSums:
        """Return the sums over all ranks. Collective."""
        sums = self._sums
        if engine.data_group is not None:
            # On the model's device: NCCL reduces nothing that lies in CPU memory.
            sums = sums.to(next(engine.module.parameters()).device)
            torch.distributed.all_reduce(sums, group=engine.data_group)
            sums = sums.cpu()
        derivative_PR, half_dot_P2 = sums[:, 3:], sums[:, :2].clone()
        for index, problem in enumerate(self._problems):
            derivative_PR[index, problem.num_rows :] = torch.nan
            if not problem.is_split:
                half_dot_P2[index] = torch.nan
        return ReducedSums(sums[:, :2].sum(dim=1), sums[:, 2], half_dot_P2, derivative_PR)

    @staticmethod
    def _parts(batch: MicroBatch, values_R: Tensor) -> list[tuple[Tensor, ...]]:
        by_problem = torch.split(values_R, list(batch.rows_per_problem))
        return [torch.split(values, list(part)) for values, part in zip(by_problem, batch.parts, strict=True)]


def largest_of_ranks(value: int, group: ProcessGroup | None, device: torch.device | int) -> int:
    """Return the largest `value` of the group's ranks; every rank must run as many passes as any other. Collective."""
    if group is None:
        return value
    largest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    return int(largest.item())
