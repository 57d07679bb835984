# SPDX-License-Identifier: Apache-2.0
"""The direction replicated on every rank before an update, whole or cut to a rank, so that its passes gather nothing.

Whole: exact, as large as the model in the dtype it computes in; for small models and adapters. Cut: of each matrix
`rank` directions, by a randomised subspace iteration. v is new in every step, so it must be cheap: the ranks share the
matrices among them, and each needs a few products with a narrow matrix.

    replica = cut_replica(gather, product_points(module, are_factored=True), rank=16, group=group)
    with measuring(module, [replica.reading], num_rows, device) as meter: ...
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from verl_gradalign.probe.cut_direction import cut_direction, in_dtype
from verl_gradalign.probe.tap_points import TapPoint, distinct_uses
from verl_gradalign.probe.taps import Gather
from verl_gradalign.probe.update import Reading

POWER_ITERATIONS = 1


@dataclass(frozen=True)
class Replica:
    """The direction in this rank's memory."""

    reading: Reading
    energy_kept: float
    """|V_r|^2 / |V|^2, the share of the direction's square that is left of it."""
    is_whole: bool = False


def whole_replica(whole: Gather, points: Sequence[TapPoint], dtype: torch.dtype | None = None) -> Replica:
    """Return all of the direction, in `dtype` if given: the one that layers compute in. Collective."""
    parts = {use.identity: in_dtype(whole(use), dtype) for use in distinct_uses(points)}
    return Replica(Reading(points, lambda placement: parts[placement.identity]), 1.0, is_whole=True)


def cut_replica(
    whole: Gather,
    points: Sequence[TapPoint],
    rank: int,
    group: ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
) -> Replica:
    """Return the direction with its matrices cut to `rank` (`cut_direction`). Collective over `group`."""
    parts, energy_kept = cut_direction(whole, distinct_uses(points), rank, group, POWER_ITERATIONS, dtype)
    return Replica(Reading(points, lambda placement: parts[placement.identity]), energy_kept)
