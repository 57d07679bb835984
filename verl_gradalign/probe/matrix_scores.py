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

Problems of equally many equally long rows are taken together, as many as fit the limit on formed gradients.

Shape legend: N positions of the micro-batch, T positions of a problem, S of a row, I input features, O output features,
B a block of output features, F = B * I, R rows, P problems.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_gradalign.probe.layout import Layout, row_sums
from verl_gradalign.probe.sizes import MAX_GRADIENT_ELEMENTS, fastest_form


@dataclass(frozen=True)
class Segment:
    """Some consecutive problems' share of a layer call: one problem, or several of equal, equally padded rows."""

    delta_NO: Tensor
    input_NI: Tensor
    direction_OI: Tensor
    layout: Layout
    """Of these problems alone."""
    scale_R: Tensor
    total_OI: Tensor | None = None
    """What the gradient of the one problem is added to, if it is wanted."""

    @property
    def dtype(self) -> torch.dtype:
        return self.scale_R.dtype


Form = Callable[[Segment], tuple[Tensor, Tensor]]


def matrix_scores(
    delta_NO: Tensor,
    input_NI: Tensor,
    direction_OI: Tensor,
    layout: Layout,
    scale_R: Tensor,
    total_OI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each row's gradient product with the direction (rows,), and each problem's squared norm (problems,).

    With `total_OI`, of a layout of one problem, its (scaled, summed) gradient is added to that; the squared norm may be
    left out then. Of slices the norm is of this rank's share (`Layout.summed`): shares add up.

    Shapes: delta_NO (positions, out), input_NI (positions, in), direction_OI (out, in), scale_R (rows,).
    Units: gradients of the summed objective; the products of unscaled rows, the norms of scaled and summed ones. In
        the dtype of scale_R, which everything is accumulated in.
    Source: ghost dot product, Wang et al. 2024 (arXiv 2406.11011) section 4.2, cut at row and problem boundaries; the
        Gram form is ghost clipping's, Li et al. 2022 (arXiv 2110.05679).
    """
    if delta_NO.device.type == "cpu":
        # A CPU has no product of half-precision matrices that accumulates in float32.
        delta_NO = delta_NO.to(scale_R.dtype)
    input_NI = input_NI.to(delta_NO.dtype)  # under autocast a layer may be given more than it computes in
    direction_OI = direction_OI.to(scale_R.dtype)
    derivatives, squared_norms = [scale_R[:0]], [scale_R[:0]]
    for problems in layout.alike(max_rows=max(1, _limit(delta_NO) // direction_OI.numel())):
        rows = slice(layout.problem_bounds[problems.start], layout.problem_bounds[problems.stop])
        positions = layout.positions_of(rows)
        part = layout.part(problems)
        segment = Segment(delta_NO[positions], input_NI[positions], direction_OI, part, scale_R[rows], total_OI)
        derivative_R, squared_norm_P = cheapest_form(segment)(segment)
        derivatives.append(derivative_R)
        squared_norms.append(squared_norm_P)
    return torch.cat(derivatives), torch.cat(squared_norms)


def cheapest_form(segment: Segment) -> Form:
    """Return the form that is expected to take the least time."""
    num_outputs, num_inputs = segment.direction_OI.shape
    num_problems, device = segment.layout.num_problems, segment.delta_NO.device.type
    num_positions, num_rows = (n / num_problems for n in (len(segment.delta_NO), segment.layout.num_rows))
    name = fastest_form(num_positions, num_rows, num_outputs, num_inputs, device)
    if segment.total_OI is not None and name == "gram":
        name = "per_problem"  # gram forms no gradient
    if segment.layout.group is not None:
        name = "per_row"  # on all ranks that have slices the same, whatever they have of the problem
    return {"per_row": per_row, "per_problem": per_problem, "gram": gram}[name]


def per_row(segment: Segment) -> tuple[Tensor, Tensor]:
    """Return (derivative_R, squared_norm_P) by forming every row's gradient."""
    layout, num_rows, num_problems = segment.layout, segment.layout.num_rows, segment.layout.num_problems
    derivative_R = torch.zeros_like(segment.scale_R)
    squared_norm_P = segment.scale_R.new_zeros(num_problems)
    for block in _blocks(segment, num_gradients=num_rows if layout.is_padded else 2):
        direction_F = segment.direction_OI[block].flatten()
        if layout.is_padded:
            delta_RSB = _split(segment.delta_NO, num_rows)[:, :, block]
            input_RSI = _split(segment.input_NI, num_rows)
            grad_RF = _multiply(delta_RSB.transpose(1, 2), input_RSI, segment.dtype).flatten(1)
            derivative_R += grad_RF @ direction_F
            # Of one row each: no total is formed, which would be as large as the rows' gradients.
            if num_rows == num_problems and segment.total_OI is None:
                squared_norm_P += _squared_norms(grad_RF) * segment.scale_R.square()
                continue
            scale_P1R = segment.scale_R.view(num_problems, 1, -1)
            total_PF = (scale_P1R @ _split(grad_RF, num_problems)).squeeze(1)
        else:
            total_PF = torch.zeros_like(direction_F).unsqueeze(0)
            for index, row in enumerate(layout.rows()):
                grad_F = _multiply(segment.delta_NO[row, block].T, segment.input_NI[row], segment.dtype).flatten()
                derivative_R[index] += grad_F.dot(direction_F)
                total_PF[0].addcmul_(grad_F, segment.scale_R[index])
        _add_total(segment, block, total_PF, 1.0)
        if segment.total_OI is None:
            squared_norm_P += _squared_norms(layout.summed(total_PF))
    return derivative_R, squared_norm_P


def per_problem(segment: Segment) -> tuple[Tensor, Tensor]:
    """Return (derivative_R, squared_norm_P) by forming problems' gradients, and products position by position."""
    delta_PTO, input_PTI, size_P = scaled_rows(segment)
    squared_norm_P = segment.scale_R.new_zeros(len(delta_PTO))
    for block in _blocks(segment, num_gradients=len(delta_PTO)):
        total_PF = _multiply(delta_PTO[:, :, block].transpose(1, 2), input_PTI, segment.dtype).flatten(1)
        squared_norm_P += _squared_norms(total_PF)
        _add_total(segment, block, total_PF, size_P)
    return _products(segment), squared_norm_P * size_P.square()


def gram(segment: Segment) -> tuple[Tensor, Tensor]:
    """Return (derivative_R, squared_norm_P) without forming anything of the size of the weight."""
    delta_PTO, input_PTI, size_P = scaled_rows(segment)
    delta_PTT = _multiply(delta_PTO, delta_PTO.transpose(1, 2), segment.dtype)
    input_PTT = _multiply(input_PTI, input_PTI.transpose(1, 2), segment.dtype)
    squared_norm_P = torch.linalg.vecdot(delta_PTT.flatten(1), input_PTT.flatten(1))
    return _products(segment), squared_norm_P * size_P.square()


def _products(segment: Segment) -> Tensor:
    """Return each row's gradient product with the direction, as sum_t (delta_t V) . input_t."""
    direction_OI = segment.direction_OI.to(segment.delta_NO.dtype)
    delta_direction_NI = _multiply(segment.delta_NO, direction_OI, segment.dtype)
    product_N = torch.linalg.vecdot(delta_direction_NI, segment.input_NI.to(segment.dtype))
    return row_sums(product_N, segment.layout, segment.dtype)


def scaled_rows(segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
    """Return (delta_PTO, input_PTI, size_P), the narrower multiplied by each row's scale over the problem's largest."""
    num_problems = segment.layout.num_problems
    # All problems of a segment have equally many rows.
    scale_PR = segment.scale_R.view(num_problems, -1)
    size_P = scale_PR.abs().amax(dim=1)
    size_P = torch.where(size_P > 0, size_P, torch.ones_like(size_P))
    row_N = segment.layout.row_of_position(segment.scale_R.device)
    # Multiplied in the accumulation dtype: a scale rounded to half precision would be wrong for the whole row alike,
    # and a small one would be lost.
    factor_N1 = (scale_PR / size_P.unsqueeze(1)).flatten()[row_N].unsqueeze(-1)
    delta_NO, input_NI = segment.delta_NO, segment.input_NI
    if delta_NO.shape[1] < input_NI.shape[1]:
        delta_NO = (delta_NO * factor_N1).to(delta_NO.dtype)
    else:
        input_NI = (input_NI * factor_N1).to(input_NI.dtype)
    return _split(delta_NO, num_problems), _split(input_NI, num_problems), size_P


def _split(values_NF: Tensor, num_parts: int) -> Tensor:
    """Return a view of equally long parts, (parts, positions or rows of each, features)."""
    return values_NF.view(num_parts, -1, values_NF.shape[1])


def _blocks(segment: Segment, num_gradients: int) -> Iterator[slice]:
    """Yield blocks of output features of which `num_gradients` gradients fit the limit together."""
    num_outputs, num_inputs = segment.direction_OI.shape
    size = max(1, _limit(segment.delta_NO) // (num_gradients * num_inputs))
    for start in range(0, num_outputs, size):
        yield slice(start, min(start + size, num_outputs))


def _add_total(segment: Segment, block: slice, total_PF: Tensor, factor: Tensor | float) -> None:
    """Add a block of the one problem's gradient, times a factor, to where it is wanted."""
    if segment.total_OI is not None:
        total_BI = segment.total_OI[block]
        total_BI += (total_PF * factor).view_as(total_BI)


def _limit(tensor: Tensor) -> int:
    return MAX_GRADIENT_ELEMENTS.get(tensor.device.type, MAX_GRADIENT_ELEMENTS["cuda"])


def _squared_norms(values_PF: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values_PF, dim=-1).square()


def _multiply(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix product (or batch of them) accumulated and returned in `dtype`."""
    # Half precision multiplied, float32 added up: what tensor cores do, without a float32 copy of the factors.
    if first.dtype == dtype:
        return first @ second
    return (torch.mm if first.dim() == 2 else torch.bmm)(first, second, out_dtype=dtype)
