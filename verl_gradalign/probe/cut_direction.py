# SPDX-License-Identifier: Apache-2.0
"""A direction whose matrices are cut to a few singular directions each, by ranks that share the work.

Each matrix V becomes L R^T, by a randomised subspace iteration; vectors stay whole. |V_r|^2 / |V|^2, the energy kept,
is known.

    parts, energy_kept = cut_direction(gather, placements, rank=16, group=group)

Shape legend: O output features (or tokens of the vocabulary), I input features, K the rank and what is added to it.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from verl_gradalign.probe.fsdp import Placement
from verl_gradalign.probe.ranks import summed
from verl_gradalign.probe.taps import Gather

OVERSAMPLING = 8
"""Directions beyond the rank that the randomised decomposition works with (Halko et al., arXiv 0909.4061: 5 to 10)."""


def cut_direction(
    whole: Gather,
    uses: Iterable[Placement],
    rank: int,
    group: ProcessGroup | None,
    power_iterations: int,
    dtype: torch.dtype | None = None,
) -> tuple[dict[tuple[int, int], Tensor], float]:
    """Return the direction by parameter, matrices stacked (L; R), and the energy kept. Collective over `group`.

    It depends on the direction alone, so that a resumed run reads what the run it resumes would have read. Matrices are
    gathered one after another; each rank keeps one of as many as there are ranks, and these are then cut side by side.
    No more than one whole matrix lies in a rank's memory besides its shards. Factors are exchanged at the end, all that
    a rank has made at once.

    Shapes: (O + I, K) of a matrix; of experts one more axis in front. In `dtype`, if given.
    """
    cutting = _Cutting(rank, power_iterations, group, dtype)
    for use in uses:
        cutting.take(use, whole(use))
    return cutting.exchanged(), cutting.energy_kept()


def cut(matrix_OI: Tensor, rank: int, power_iterations: int) -> Tensor:
    """Return L and R with matrix ~ L R^T, stacked to (out + in, rank): the best in the subspace that was found.

    R is the matrix' transpose times an orthonormal L, so |R|^2 is the square that is kept.
    Source: Halko, Martinsson, Tropp (arXiv 0909.4061), algorithm 4.4.
    """
    if matrix_OI.dim() > 2:  # of experts, one after another
        return torch.stack([cut(matrix, rank, power_iterations) for matrix in matrix_OI])
    rank = min(rank, *matrix_OI.shape)
    width = min(rank + OVERSAMPLING, *matrix_OI.shape)
    generator = torch.Generator(matrix_OI.device).manual_seed(0)
    random_IK = matrix_OI.new_empty(matrix_OI.shape[1], width).normal_(generator=generator)
    left_OK = _orthonormal(matrix_OI @ random_IK)
    for _ in range(power_iterations):
        left_OK = _orthonormal(matrix_OI @ _orthonormal(matrix_OI.T @ left_OK))
    right_IK = matrix_OI.T @ left_OK
    # Of the subspace the largest `rank` directions; eigenvalues ascend.
    turn_KK = torch.linalg.eigh(right_IK.T @ right_IK).eigenvectors[:, -rank:]
    return torch.cat([left_OK @ turn_KK, right_IK @ turn_KK])


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


class _Cutting:
    """One rank's share in cutting matrices."""

    def __init__(self, rank: int, power_iterations: int, group: ProcessGroup | None, dtype: torch.dtype | None) -> None:
        self._rank, self._power_iterations, self._group, self._dtype = rank, power_iterations, group, dtype
        is_alone = group is None
        self._place = 0 if is_alone else torch.distributed.get_rank(group)
        self._num_places = 1 if is_alone else torch.distributed.get_world_size(group)
        self._dealt: list[list[Placement]] = [[] for _ in range(self._num_places)]
        """The matrices that each rank cuts."""
        self._num_dealt = 0
        self._waiting = torch.zeros(0)
        """This rank's matrix of the present round, until the others have theirs."""
        self._mine: list[Tensor] = []
        """What this rank has cut."""
        self._empty = torch.zeros(0)
        """Of the dtype, and on the device, of what is exchanged."""
        # (kept, all), in float64; on the device once there is one.
        self._energy_2 = torch.zeros(2, dtype=torch.float64)
        self._parts: dict[tuple[int, int], Tensor] = {}

    def take(self, use: Placement, part: Tensor) -> None:
        """Take the next parameter's direction; matrices are cut when every rank has one."""
        self._energy_2 = self._energy_2.to(part.device)
        if part.dim() < 2:
            self._parts[use.identity] = in_dtype(part, self._dtype)
            if self._place == 0:
                self._energy_2 += _energy(part)
            return
        place, self._num_dealt = self._num_dealt % self._num_places, self._num_dealt + 1
        self._dealt[place].append(use)
        self._empty = in_dtype(part.new_empty(0), self._dtype)
        if place == self._place:
            self._waiting = part
        if place == self._num_places - 1:
            self._cut()

    def _cut(self) -> None:
        """Cut the matrix that this rank holds, if it holds one."""
        matrix, self._waiting = self._waiting, self._waiting[:0]
        if matrix.numel():
            factors = cut(matrix, self._rank, self._power_iterations)
            kept = factors[..., matrix.shape[-2] :, :]
            self._energy_2 += torch.stack([_energy(kept), _energy(matrix)])
            self._mine.append(in_dtype(factors, self._dtype))

    def exchanged(self) -> dict[tuple[int, int], Tensor]:
        """Return all parameters' parts, after every rank has given the others what it has cut. Collective."""
        self._cut()
        for place, uses in enumerate(self._dealt):
            shapes = [(*use.shape[:-2], sum(use.shape[-2:]), min(self._rank, *use.shape[-2:])) for use in uses]
            sizes = [math.prod(shape) for shape in shapes]
            flat = torch.cat([part.flatten() for part in self._mine]) if place == self._place and uses else None
            if self._group is not None and uses:
                flat = self._empty.new_empty(sum(sizes)) if flat is None else flat
                source = torch.distributed.get_global_rank(self._group, place)
                torch.distributed.broadcast(flat, source, group=self._group)
            if flat is not None:
                parts = (part.view(shape) for part, shape in zip(torch.split(flat, sizes), shapes, strict=True))
                self._parts |= zip((use.identity for use in uses), parts, strict=True)
        return self._parts

    def energy_kept(self) -> float:
        """Return the share of |v|^2 that is kept. Collective."""
        kept, total = summed(self._energy_2, self._group).tolist()
        return kept / total if total else 1.0


def _energy(values: Tensor) -> Tensor:
    """Return the sum of squares, added up in float64 without a copy in it."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()


def in_dtype(part: Tensor, dtype: torch.dtype | None) -> Tensor:
    return part if dtype is None else part.to(dtype)
