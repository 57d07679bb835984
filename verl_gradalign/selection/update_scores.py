# SPDX-License-Identifier: Apache-2.0
"""What an update has measured of its rows, as scores of their groups.

Shape legend: R rows of the update, P problems, K rows of a problem.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from verl_gradalign.selection.groups import Group
from verl_gradalign.types import ProblemScores


def scores_of_update(
    groups: Sequence[Group],
    keys: Sequence[str],
    contribution_R: Tensor,
    derivative_R: Tensor,
    direction_norm: float,
    diagnostics: Mapping[str, float],
) -> ProblemScores:
    """Return the scores of groups whose rows were trained on; of a row that was not measured all are nan.

    `keys` are those of the update's rows. There are no norms: an update forms no problem's gradient.
    """
    place_of = {key: place for place, key in enumerate(keys)}
    width = max((len(group.keys) for group in groups), default=0)
    place_PK = torch.full((len(groups), width), len(keys), dtype=torch.int64)
    half_PK = torch.full((len(groups), width), -1, dtype=torch.int64)
    for row, group in enumerate(groups):
        num = len(group.keys)
        place_PK[row, :num] = torch.tensor([place_of.get(key, len(keys)) for key in group.keys])
        half_PK[row, :num] = torch.tensor(group.halves) if group.halves else 0
    unknown = torch.full((1,), torch.nan, dtype=torch.float64)
    contribution_PK, derivative_PK = (torch.cat([v, unknown])[place_PK] for v in (contribution_R, derivative_R))
    halves = [torch.where(half_PK == which, contribution_PK, 0.0).sum(dim=1) for which in (0, 1)]
    is_split_P = (half_PK == 1).any(dim=1) if width else torch.zeros(0, dtype=torch.bool)
    half_dot_P2 = torch.stack(halves, dim=1)
    return ProblemScores(
        uid=tuple(group.problem.uid for group in groups),
        dot_P=half_dot_P2.sum(dim=1),
        norm_P=None,
        num_tokens_P=torch.tensor([group.num_tokens for group in groups], dtype=torch.int64),
        response_derivative_PR=derivative_PK,
        direction_norm=direction_norm,
        half_dot_P2=half_dot_P2.masked_fill(~is_split_P.unsqueeze(1), torch.nan),
        contribution_PR=contribution_PK,
        diagnostics=diagnostics,
    )
