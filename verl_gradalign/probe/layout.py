# SPDX-License-Identifier: Apache-2.0
"""Where the rows and the problems of a micro-batch lie in its activations.

Activations have leading axes (lines, width): one row per line (padded), or all rows one after another in one line
(packed). Flattened, each row is a contiguous run of positions, padding included, and each problem a contiguous run of
rows, because a problem's gradient is cut out of the micro-batch at these boundaries.

    layout = padded_layout(num_rows=4, width=100, rows_per_problem=(3, 1))
    packed = packed_layout(row_lengths=(5, 9, 7), num_positions=24, rows_per_problem=(3,))

Under sequence parallelism a rank has a slice of the line: rows may be cut, or empty, and a problem's gradient is the
sum over the ranks that have slices of it (`summed`).

Shape legend: N flattened positions, F features, R rows, P problems.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Rows and problems of one micro-batch. Build it with `padded_layout` or `packed_layout`."""

    shape: tuple[int, int]
    """Leading axes of the activations: (lines, width)."""
    row_bounds: tuple[int, ...]
    """Flattened position at which each row begins, and the end of the last: num_rows + 1 numbers from 0 on."""
    problem_bounds: tuple[int, ...]
    """Row at which each problem begins, and the end of the last: num_problems + 1 numbers from 0 on."""
    group: ProcessGroup | None = None
    """Ranks that have the other slices of the same rows; None: this rank has all of them."""

    @property
    def num_rows(self) -> int:
        return len(self.row_bounds) - 1

    @property
    def num_problems(self) -> int:
        return len(self.problem_bounds) - 1

    @cached_property
    def is_padded(self) -> bool:
        """Whether all rows take the same number of positions."""
        lines, width = self.shape
        # Responses may all be empty. Of slices, what one rank finds must hold on all.
        return width > 0 and self.group is None and self.row_bounds == tuple(range(0, lines * width + 1, width))

    def rows(self) -> list[slice]:
        """Return the flattened positions of each row."""
        return [slice(start, end) for start, end in pairwise(self.row_bounds)]

    def problems(self) -> list[slice]:
        """Return the rows of each problem."""
        return [slice(start, end) for start, end in pairwise(self.problem_bounds)]

    def positions_of(self, rows: slice) -> slice:
        """Return the flattened positions of consecutive rows."""
        return slice(self.row_bounds[rows.start], self.row_bounds[rows.stop])

    def row_of_position(self, device: torch.device) -> Tensor:
        """Return the row of each flattened position, int64 (positions,)."""
        return self._once(("row", device), lambda: _run_of_element(self.row_bounds, device))

    def row_lengths(self, device: torch.device) -> Tensor:
        """Return the number of positions of each row, int64 (rows,)."""
        return self._once(("length", device), lambda: torch.tensor(self.row_bounds, device=device).diff())

    def problem_of_row(self, device: torch.device) -> Tensor:
        """Return the problem of each row, int64 (rows,)."""
        return self._once(("problem", device), lambda: _run_of_element(self.problem_bounds, device))

    def _once(self, name: Hashable, make: Callable[[], T]) -> T:
        """Return what was made for the first caller: a pass has hundreds of layers, which ask for the same."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    @cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}

    def merged(self, parts: Sequence[Sequence[int]]) -> Layout:
        """Return the layout in which some consecutive rows of a problem are one: `parts` counts them, per problem."""
        first_rows = accumulate((num_rows for problem in parts for num_rows in problem), initial=0)
        return _of_rows(tuple(self.row_bounds[row] for row in first_rows), map(len, parts), self.group)

    def of_responses(self, lengths: Sequence[int]) -> Layout:
        """Return the layout of each row's response alone, one after another."""
        rows_per_problem = (end - start for start, end in pairwise(self.problem_bounds))
        return _of_rows(tuple(accumulate(lengths, initial=0)), rows_per_problem, self.group)

    def sliced(self, window: slice, group: ProcessGroup) -> Layout:
        """Return the layout of one rank's slice of a line that the group's ranks have in slices."""
        row_bounds = tuple(min(max(bound, window.start), window.stop) - window.start for bound in self.row_bounds)
        return Layout((1, window.stop - window.start), row_bounds, self.problem_bounds, group)

    def summed(self, gradient: Tensor) -> Tensor:
        """Return this rank's share of a gradient: its features, the last axis, dealt to the ranks that have slices.

        Summed over those ranks; the whole, as it is, where there is no other. Collective; works in place.
        """
        if self.group is None:
            return gradient
        torch.distributed.all_reduce(gradient, group=self.group)
        return gradient[..., torch.distributed.get_rank(self.group) :: torch.distributed.get_world_size(self.group)]

    def of_all_slices(self, values_N: Tensor) -> Tensor:
        """Return the values at the positions of all slices, in their order. Collective."""
        if self.group is None:
            return values_N
        parts = [torch.empty_like(values_N) for _ in range(torch.distributed.get_world_size(self.group))]
        torch.distributed.all_gather(parts, values_N.contiguous(), group=self.group)
        return torch.cat(parts)

    def alike(self, max_rows: int) -> Iterator[slice]:
        """Yield runs of problems of equally many equally padded rows, at most `max_rows` rows or one problem each."""
        num_rows = [end - start for start, end in pairwise(self.problem_bounds)]
        start = 0
        for index in range(1, self.num_problems + 1):
            # A run ends with the last problem, where counts change, or where it has as many rows as one may have.
            is_same = self.is_padded and index < self.num_problems and num_rows[index] == num_rows[start]
            if not is_same or (index + 1 - start) * num_rows[start] > max_rows:
                yield slice(start, index)
                start = index

    def part(self, problems: slice) -> Layout:
        """Return the layout of some consecutive problems' positions alone."""

        def make() -> Layout:
            rows = slice(self.problem_bounds[problems.start], self.problem_bounds[problems.stop])
            row_bounds = tuple(b - self.row_bounds[rows.start] for b in self.row_bounds[rows.start : rows.stop + 1])
            problem_bounds = tuple(b - rows.start for b in self.problem_bounds[problems.start : problems.stop + 1])
            shape = (rows.stop - rows.start, self.shape[1]) if self.is_padded else (1, row_bounds[-1])
            return Layout(shape, row_bounds, problem_bounds, self.group)

        return self._once(("part", problems.start, problems.stop), make)

    def widened(self, factor: int) -> Layout:
        """Return the layout of activations with `factor` consecutive vectors per position, e.g. attention heads."""
        if factor == 1:
            return self

        def make() -> Layout:
            (lines, width), row_bounds = self.shape, tuple(b * factor for b in self.row_bounds)
            return Layout((lines, width * factor), row_bounds, self.problem_bounds, self.group)

        return self._once(("widened", factor), make)


def padded_layout(num_rows: int, width: int, rows_per_problem: Sequence[int]) -> Layout:
    """Return the layout of `num_rows` rows padded to `width` positions each."""
    return _checked((num_rows, width), tuple(range(0, num_rows * width + 1, width)), rows_per_problem)


def packed_layout(row_lengths: Sequence[int], num_positions: int, rows_per_problem: Sequence[int]) -> Layout:
    """Return the layout of rows packed into one line of `num_positions`; a padding suffix counts to the last row."""
    bounds = (*accumulate(row_lengths[:-1], initial=0), num_positions)
    return _checked((1, num_positions), bounds, rows_per_problem)


def _of_rows(row_bounds: tuple[int, ...], rows_per_problem: Iterable[int], group: ProcessGroup | None) -> Layout:
    """Return the layout of rows one after another; padded, in effect, where they are equally long."""
    widths = {end - start for start, end in pairwise(row_bounds)}
    shape = (len(row_bounds) - 1, widths.pop()) if len(widths) == 1 else (1, row_bounds[-1])
    return Layout(shape, row_bounds, tuple(accumulate(rows_per_problem, initial=0)), group)


def _checked(shape: tuple[int, int], row_bounds: tuple[int, ...], rows_per_problem: Sequence[int]) -> Layout:
    layout = Layout(shape, row_bounds, tuple(accumulate(rows_per_problem, initial=0)))
    if layout.problem_bounds[-1] != layout.num_rows:
        raise ValueError(f"problems have {sum(rows_per_problem)} rows, but the micro-batch has {layout.num_rows}")
    return layout


def _run_of_element(bounds: Sequence[int], device: torch.device) -> Tensor:
    length_R = torch.tensor(bounds, dtype=torch.int64, device=device).diff()
    # With its size given, no device is asked for it.
    return torch.arange(len(length_R), device=device).repeat_interleave(length_R, output_size=bounds[-1])


def row_sums(values_NF: Tensor, layout: Layout, dtype: torch.dtype, factor_N: Tensor | None = None) -> Tensor:
    """Return the sum of `factor_N * values_NF` over the positions of each row, (rows, features), in `dtype`.

    Without a factor, values_N of one number each are summed too, to (rows,). With a factor, in the dtype of the
    product: matrix products sum without a copy of the values.
    """
    if layout.is_padded:
        values_RTF = values_NF.view(layout.num_rows, -1, *values_NF.shape[1:])
        if factor_N is None:
            return values_RTF.sum(dim=1, dtype=dtype)
        return (factor_N.view(layout.num_rows, 1, -1) @ values_RTF).squeeze(1)
    if factor_N is None and values_NF.dim() == 1:
        # One kernel: a pass has hundreds of layers, and a packed micro-batch some dozen rows.
        lengths = layout.row_lengths(values_NF.device)
        return torch.segment_reduce(values_NF.to(dtype), "sum", lengths=lengths)
    if factor_N is None:
        return torch.stack([values_NF[row].sum(dim=0, dtype=dtype) for row in layout.rows()])
    return torch.cat([factor_N[row].unsqueeze(0) @ values_NF[row] for row in layout.rows()])
