# SPDX-License-Identifier: Apache-2.0
"""What the update measured of its rows, as scores of their groups.

    scores = scores_of_update(partition_id, live_groups, direction_norm, diagnostics)

Shape legend: P problems, K rows of a problem.
"""

from collections.abc import Mapping, Sequence

import torch
import transfer_queue as tq
from torch import Tensor

from verl_gradalign.selection.groups import Group
from verl_gradalign.types import ProblemScores

CONTRIBUTION = "gradalign_contribution"
DERIVATIVE = "gradalign_derivative"


def scores_of_update(
    partition_id: str, groups: Sequence[Group], direction_norm: float, diagnostics: Mapping[str, float]
) -> ProblemScores:
    """Return the scores of live groups whose rows an update has measured; a row that it did not measure is nan."""
    keys = [key for group in groups for key in group.keys]
    columns: dict[str, Tensor] = {}
    if keys:
        rows = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=[CONTRIBUTION, DERIVATIVE])
        columns = {name: rows[name].double().flatten() for name in (CONTRIBUTION, DERIVATIVE)}
    counts = [len(group.keys) for group in groups]

    def table(name: str) -> Tensor:
        value_PK = torch.full((len(groups), max(counts, default=0)), torch.nan, dtype=torch.float64)
        for value_K, of_group in zip(value_PK, torch.split(columns[name], counts) if keys else (), strict=True):
            value_K[: len(of_group)] = of_group
        return value_PK

    contribution_PK = table(CONTRIBUTION)
    of_groups = list(zip(groups, contribution_PK, strict=True))
    # A row that was not measured makes its whole group unknown, and the places beyond a group's rows do not.
    dot = [contribution_K[: len(group.keys)].sum() for group, contribution_K in of_groups]
    halves = [
        [contribution_K[[k for k, half in enumerate(group.halves) if half == which]].sum() for which in (0, 1)]
        for group, contribution_K in of_groups
    ]
    return ProblemScores(
        uid=tuple(group.problem.uid for group in groups),
        dot_P=torch.stack(dot) if dot else torch.zeros(0, dtype=torch.float64),
        norm_P=None,
        num_tokens_P=torch.tensor([group.num_tokens for group in groups], dtype=torch.int64),
        response_derivative_PR=table(DERIVATIVE),
        direction_norm=direction_norm,
        half_dot_P2=torch.tensor(halves, dtype=torch.float64).reshape(len(groups), 2),
        contribution_PR=contribution_PK,
        diagnostics=diagnostics,
    )
