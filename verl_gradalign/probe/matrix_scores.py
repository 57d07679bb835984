# SPDX-License-Identifier: Apache-2.0
"""The products that cost: a weight matrix's gradient delta^T input, cut at row and problem boundaries.

Three exact forms give each row's product with the direction and each problem's squared norm; the cheapest is taken
for each problem.

* `per_row`: form each row's gradient, multiply it with the direction, add the rows up. The multiplications of the
  ordinary weight gradient, and some reads of each row's gradient: for long rows.
* `per_problem`: multiply delta with the direction once, which gives the products, and form the problem's gradient for
  its norm. Twice the multiplications, one gradient to read: for short rows.
* `gram`: the same products, and the norm as the sum of (delta delta^T) * (input input^T). Nothing of the size of the
  weight is formed: for short problems.

Shape legend: T positions of a problem, I input features, O output features, B a block of output features, R rows of
the problem (in `matrix_scores`: of the micro-batch), P problems, N positions of the micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_gradalign.probe.layout import Layout, row_sums

MAX_GRADIENT_ELEMENTS = 2**26
"""A gradient is formed in blocks of at most this many elements (256 MiB in float32)."""
BALANCE_POSITIONS = {"cpu": 24, "cuda": 1024}
"""Positions whose multiplications take as long as the reads and writes that each formed gradient costs besides. On
the CPU measured (tests/benchmarks/forms.py); on a GPU computed for an H200 (16 bytes an element at 4.8 TB/s against
600 TFLOP/s), not measured."""


@dataclass(frozen=True)
class Segment:
    """One problem's share of a layer call."""

    delta_TO: Tensor
    input_TI: Tensor
    direction_OI: Tensor
    layout: Layout
    """Of this problem alone."""
    scale_R: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_R.dtype


Form = Callable[[Segment], tuple[Tensor, Tensor]]


def matrix_scores(
    delta_NO: Tensor, input_NI: Tensor, direction_OI: Tensor, layout: Layout, scale_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each row's gradient product with the direction (rows,), and each problem's squared norm (problems,).

    Shapes: delta_NO (positions, out), input_NI (positions, in), direction_OI (out, in), scale_R (rows,).
    Units: gradients of the summed objective; the products of unscaled rows, the norms of scaled and summed ones. In
        the dtype of scale_R, which everything is accumulated in.
    Source: ghost dot product, Wang et al. 2024 (arXiv 2406.11011) section 4.2, cut at row and problem boundaries; the
        Gram form is ghost clipping's, Li et al. 2022 (arXiv 2110.05679).
    """
    if delta_NO.device.type == "cpu":
        # A CPU has no product of half-precision matrices that accumulates in float32.
        delta_NO, input_NI = delta_NO.to(scale_R.dtype), input_NI.to(scale_R.dtype)
    input_NI = input_NI.to(delta_NO.dtype)  # under autocast a layer may be given more than it computes in
    direction_OI = direction_OI.to(scale_R.dtype)
    derivatives, squared_norms = [scale_R[:0]], [scale_R[:0]]
    for rows in layout.problems():
        positions = layout.positions_of(rows)
        segment = Segment(
            delta_NO[positions], input_NI[positions], direction_OI, layout.problem(rows), scale_R[rows]
        )
        derivative_R, squared_norm = cheapest_form(segment)(segment)
        derivatives.append(derivative_R)
        squared_norms.append(squared_norm.reshape(1))
    return torch.cat(derivatives), torch.cat(squared_norms)


def cheapest_form(segment: Segment) -> Form:
    """Return the form with the least estimated time, counted in positions that are multiplied by the whole weight."""
    num_outputs, num_inputs = segment.direction_OI.shape
    num_positions, num_rows = len(segment.delta_TO), segment.layout.num_rows
    balance = BALANCE_POSITIONS.get(segment.delta_TO.device.type, BALANCE_POSITIONS["cuda"])
    costs: dict[Form, float] = {
        per_row: num_positions + num_rows * balance,
        per_problem: 2 * num_positions + balance,
        gram: num_positions + num_positions**2 * (num_outputs + num_inputs) / (num_outputs * num_inputs),
    }
    return min(costs, key=costs.__getitem__)


def per_row(segment: Segment) -> tuple[Tensor, Tensor]:
    """Return (derivative_R, squared norm) by forming every row's gradient."""
    delta_TO, input_TI, layout = segment.delta_TO, segment.input_TI, segment.layout
    derivative_R = torch.zeros_like(segment.scale_R)
    squared_norm = segment.scale_R.new_zeros(())
    for block in _blocks(segment, num_gradients=layout.num_rows + 1 if layout.is_padded else 2):
        direction_BI = segment.direction_OI[block]
        if layout.is_padded:
            delta_RSB = delta_TO[:, block].reshape(layout.num_rows, -1, direction_BI.shape[0])
            input_RSI = input_TI.view(layout.num_rows, -1, input_TI.shape[-1])
            grad_RF = _multiply(delta_RSB.transpose(1, 2), input_RSI, segment.dtype).flatten(1)
            derivative_R += grad_RF @ direction_BI.flatten()
            total_F = segment.scale_R @ grad_RF
        else:
            total_F = torch.zeros_like(direction_BI).flatten()
            for index, row in enumerate(layout.rows()):
                grad_F = _multiply(delta_TO[row, block].T, input_TI[row], segment.dtype).flatten()
                derivative_R[index] += grad_F.dot(direction_BI.flatten())
                total_F.addcmul_(grad_F, segment.scale_R[index])
        squared_norm += total_F.dot(total_F)
    return derivative_R, squared_norm


def per_problem(segment: Segment) -> tuple[Tensor, Tensor]:
    """Return (derivative_R, squared norm) by forming the problem's gradient, and products position by position."""
    delta_TO, input_TI = _scaled(segment)
    squared_norm = segment.scale_R.new_zeros(())
    for block in _blocks(segment, num_gradients=1):
        total_F = _multiply(delta_TO[:, block].T, input_TI, segment.dtype).flatten()
        squared_norm += total_F.dot(total_F)
    return _products(segment), squared_norm


def gram(segment: Segment) -> tuple[Tensor, Tensor]:
    """Return (derivative_R, squared norm) without forming anything of the size of the weight."""
    delta_TO, input_TI = _scaled(segment)
    delta_TT = _multiply(delta_TO, delta_TO.T, segment.dtype)
    input_TT = _multiply(input_TI, input_TI.T, segment.dtype)
    return _products(segment), delta_TT.flatten().dot(input_TT.flatten())


def _products(segment: Segment) -> Tensor:
    """Return each row's gradient product with the direction, as sum_t (delta_t V) . input_t."""
    delta_direction_TI = _multiply(segment.delta_TO, segment.direction_OI.to(segment.delta_TO.dtype), segment.dtype)
    product_T1 = (delta_direction_TI * segment.input_TI).sum(dim=-1, keepdim=True)
    return row_sums(product_T1, segment.layout, segment.dtype).squeeze(-1)


def _scaled(segment: Segment) -> tuple[Tensor, Tensor]:
    """Return (delta, input), the narrower of them multiplied by each row's scale."""
    row_T = segment.layout.row_of_position(segment.scale_R.device)
    scale_T1 = segment.scale_R[row_T].unsqueeze(-1)
    if segment.delta_TO.shape[1] < segment.input_TI.shape[1]:
        return segment.delta_TO * scale_T1.to(segment.delta_TO.dtype), segment.input_TI
    return segment.delta_TO, segment.input_TI * scale_T1.to(segment.input_TI.dtype)


def _blocks(segment: Segment, num_gradients: int) -> Iterator[slice]:
    """Yield blocks of output features of which `num_gradients` gradients fit the limit together."""
    num_outputs, num_inputs = segment.direction_OI.shape
    size = max(1, MAX_GRADIENT_ELEMENTS // (num_gradients * num_inputs))
    for start in range(0, num_outputs, size):
        yield slice(start, min(start + size, num_outputs))


def _multiply(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix product (or batch of them) accumulated and returned in `dtype`."""
    if first.dtype == dtype:
        return first @ second
    return (torch.mm if first.dim() == 2 else torch.bmm)(first, second, out_dtype=dtype)
