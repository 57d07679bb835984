# SPDX-License-Identifier: Apache-2.0
"""The norm of a problem that runs in several micro-batches: of the sum of their gradients, kept whole or projected.

`WholeSum` keeps the gradient of all tapped parameters, 4 bytes for each, and gives its norm exactly. `ProjectedSum`
keeps K x K numbers of each matrix (`projections.py`), and vectors as they are: it estimates the norm, and says by how
much it may be off.

Shape legend: N flattened positions, K the rank, M matrices in a parameter (one, or one for each expert).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.fsdp import Placement
from verl_gradalign.probe.layer_rules import LayerCall
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.projections import normal_sides, projected_parts
from verl_gradalign.probe.ranks import summed
from verl_gradalign.probe.tap_points import TapPoint


class GradientSum(ABC):
    """A problem's (scaled, summed) gradient, added up over its micro-batches."""

    is_exact: bool
    """Whether the norm is exact."""

    def __init__(self) -> None:
        self._whole: dict[tuple[int, int], Tensor] = {}
        """Of parameters that are kept as they are, by `Placement.identity`: the uses of a tied one add up."""

    def totals(self, point: TapPoint, like: Tensor) -> dict[str, Tensor]:
        """Return what the layer's rule is to add its gradient to, by attribute; in the dtype, and where `like` lies."""
        kept = [placement for placement in point.placements if self._is_kept_whole(placement)]
        for placement in kept:
            if placement.identity not in self._whole:
                self._whole[placement.identity] = like.new_zeros(placement.shape)
        return {placement.attribute: self._whole[placement.identity] for placement in kept}

    def add(self, point: TapPoint, call: LayerCall) -> None:  # noqa: B027  (a rule adds what is kept whole itself)
        """Add what is not kept whole."""

    @abstractmethod
    def finish(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the squared norm of the sum, and the estimated variance of that, (1,) each, and forget the sum.

        Of slices of rows this rank's share of both. Collective over the ranks that have slices.
        """

    @abstractmethod
    def _is_kept_whole(self, placement: Placement) -> bool: ...

    def _finish_whole(self, layout: Layout) -> Tensor:
        """Return the squared norm of what is kept whole, a scalar, added up in float64."""
        parts = [layout.summed(part) for part in self._whole.values()]
        self._whole.clear()
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


class WholeSum(GradientSum):
    """Keeps every parameter's gradient."""

    is_exact = True

    def finish(self, layout: Layout) -> tuple[Tensor, Tensor]:
        squared_norm = self._finish_whole(layout).view(1)
        return squared_norm, torch.zeros_like(squared_norm)

    def _is_kept_whole(self, placement: Placement) -> bool:
        return True


class ProjectedSum(GradientSum):
    """Keeps projections of matrices' gradients.

    The estimate |S|^2 of |G|^2 has no bias; with M = G G^T its variance is (2/K) ((2 + 1/K) tr M^2 + (tr M)^2 / K). For
    each matrix other projections are drawn, so that over the matrices of a model relative errors average out.
    """

    is_exact = False

    def __init__(self, rank: int, seed: int = 0) -> None:
        super().__init__()
        assert rank >= 2 and rank % 2 == 0, "checked by ProbeConfig"
        self._rank, self._seed = rank, seed
        self._projected: dict[tuple[int, int], Tensor] = {}
        """Of each parameter with matrices, (M, K, K), in float64."""
        self._name_of: dict[tuple[int, int], str] = {}
        self._drawn: tuple[str, tuple[Tensor, Tensor]] | None = None
        """The last projections: an output layer comes in many blocks, each of which needs the same."""

    def add(self, point: TapPoint, call: LayerCall) -> None:
        for placement in point.placements:
            if not self._is_kept_whole(placement):
                self._add_matrices(point, placement, call)

    def _add_matrices(self, point: TapPoint, placement: Placement, call: LayerCall) -> None:
        # Both uses of a tied weight by one name, so that they are projected alike.
        name, device = self._name_of.setdefault(placement.identity, placement.name), call.delta.device
        if self._drawn is None or self._drawn[0] != name:
            self._drawn = name, normal_sides(self._seed, name, placement.shape, self._rank, device)
        if placement.identity not in self._projected:
            shape = (*placement.shape[:-2], self._rank, self._rank)
            zeros = torch.zeros(shape, dtype=torch.float64, device=device)
            self._projected[placement.identity] = zeros.view(-1, self._rank, self._rank)
        total_MKK = self._projected[placement.identity]
        for place, left_NK, right_NK, layout in projected_parts(point.rule, call, placement.attribute, *self._drawn[1]):
            scale_N1 = call.scale_R[layout.row_of_position(device)].unsqueeze(-1)
            total_MKK[place] += (left_NK * scale_N1).T @ right_NK

    def finish(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return the estimate, and its variance by how far two independent quarters of each projection differ.

        A quarter with half of the projections on each side estimates |G|^2 too, with twice the variance or more: the
        squared difference of two that share none is, on average, four times that of the whole, or more. Quarters, not
        halves: halves would share the projections of one side, and with them errors.
        """
        parts = list(self._projected.values())
        total_MKK = summed(torch.cat(parts) if parts else torch.zeros(0, self._rank, self._rank), layout.group)
        self._projected.clear()
        self._drawn = None
        half = self._rank // 2
        quarters = total_MKK[:, :half, :half], total_MKK[:, half:, half:]
        first_M, second_M = (4 * quarter.square().sum(dim=(1, 2)) for quarter in quarters)
        # All ranks that have slices know the sum: each gives an equal share.
        num_sharing = 1 if layout.group is None else torch.distributed.get_world_size(layout.group)
        squared_norm = self._finish_whole(layout).to(total_MKK.device) + total_MKK.square().sum() / num_sharing
        return squared_norm.view(1), (first_M - second_M).square().sum().view(1) / (4 * num_sharing)

    def _is_kept_whole(self, placement: Placement) -> bool:
        return len(placement.shape) == 1


def gradient_sum(config: ProbeConfig) -> GradientSum:
    """Return the sum that `probe.oversized` asks for."""
    return ProjectedSum(config.sketch_rank) if config.oversized == "sketch" else WholeSum()
