# SPDX-License-Identifier: Apache-2.0
"""The squared norms of a weight that an embedding and the output layer share.

Shape legend: P problems, N positions, T positions of a problem, U its distinct tokens, H hidden features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from verl_gradalign.probe.layer_rules import LayerCall, LayerScores, embedding_delta
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.ranks import summed
from verl_gradalign.probe.tap_points import REMEDY, TapPoint


@dataclass(frozen=True)
class HeadRows:
    """Of one problem: the rows of its head gradient that belong to its own tokens."""

    ids_U: Tensor
    place_T: Tensor
    """Of each position's token among them."""
    grad_UH: Tensor


class TiedWeight:
    """What is missing when the two uses of a weight, by an embedding and an output layer, are scored apart.

    Products with the direction add up. Squared norms do not: |G_head + G_embedding|^2 has the cross term
    2 <G_head, G_embedding>. G_embedding is non-zero only in the rows of the problem's own tokens, so those rows of
    G_head are kept from the head's backward until the embedding's, and nothing else.
    """

    def __init__(self, embedding: TapPoint, head: TapPoint) -> None:
        self.embedding, self.head = embedding, head
        self.ids_N = torch.zeros(0, dtype=torch.int64)
        """Token ids of the forward pass, which the head's backward needs."""
        self._head_rows: list[HeadRows] = []
        """Of each problem."""

    @classmethod
    def find(cls, points: Sequence[TapPoint]) -> TiedWeight | None:
        """Return the tied weight among the tapped layers, None if no weight is used twice.

        Raises: ValueError that names the layers if a weight is shared in any other way.
        """
        uses = Counter(placement.identity for point in points for placement in point.placements)
        users = [point for point in points if any(uses[placement.identity] > 1 for placement in point.placements)]
        if not users:
            return None
        embeddings = [point for point in users if isinstance(point.module, nn.Embedding)]
        heads = [point for point in users if isinstance(point.module, nn.Linear)]
        if len(users) != 2 or len(embeddings) != 1 or len(heads) != 1:
            names = ", ".join(point.name for point in users)
            rule = "only one embedding tied to one linear layer has a rule"
            raise ValueError(f"{names} share a weight, and {rule}. {REMEDY}.")
        return cls(embeddings[0], heads[0])

    def keep_head_rows(self, call: LayerCall, layout: Layout) -> None:
        """Keep the rows of each problem's head gradient that belong to its tokens, as far as the call has them.

        `layout` is that of the whole pass; the call's may be of responses alone.
        """
        if not self._head_rows:
            self._head_rows = self._rows_of(call, layout)
        scale_N1 = call.scale_R[call.layout.row_of_position(call.delta.device)].unsqueeze(-1)
        input_NH = call.input.to(call.dtype) * scale_N1
        first = call.outputs.start or 0
        for rows, kept in zip(call.layout.problems(), self._head_rows, strict=True):
            positions = call.layout.positions_of(rows)
            # Only the columns of tokens that occur: the whole gradient has the vocabulary's size.
            is_in_U = (kept.ids_U >= first) & (kept.ids_U < first + call.delta.shape[-1])
            delta_NU = call.delta[positions].index_select(1, kept.ids_U[is_in_U] - first)
            kept.grad_UH[is_in_U] = delta_NU.to(call.dtype).T @ input_NH[positions]

    def _rows_of(self, call: LayerCall, layout: Layout) -> list[HeadRows]:
        """Return each problem's tokens, on all ranks that have slices of it, with a gradient of zero."""
        device, head = self.ids_N.device, cast(nn.Linear, call.module)
        num_tokens = head.out_features
        problem_N = layout.problem_of_row(device)[layout.row_of_position(device)]
        key_U = torch.unique(layout.of_all_slices(problem_N * num_tokens + self.ids_N), sorted=True)
        counts = torch.bincount(key_U // num_tokens, minlength=layout.num_problems).tolist()
        kept = []
        for rows, ids_U in zip(layout.problems(), torch.split(key_U % num_tokens, counts), strict=True):
            place_T = torch.searchsorted(ids_U, self.ids_N[layout.positions_of(rows)])
            kept.append(HeadRows(ids_U, place_T, call.scale_R.new_zeros(len(ids_U), call.input.shape[-1])))
        return kept

    def cross_term(self, call: LayerCall) -> LayerScores:
        """Return 2 <G_head, G_embedding> of each problem as squared norms, from the embedding's backward."""
        kept, self._head_rows = self._head_rows, []
        assert kept, "the output layer's backward runs before the embedding's"
        if call.layout.group is not None:
            for rows in kept:
                summed(rows.grad_UH, call.layout.group)
        rows_NH = torch.cat([rows.grad_UH[rows.place_T] for rows in kept])
        row_N = call.layout.row_of_position(call.delta.device)
        product_N = (rows_NH * embedding_delta(call).to(call.dtype)).sum(dim=-1) * call.scale_R[row_N]
        problem_N = call.layout.problem_of_row(call.delta.device)[row_N]
        cross_P = call.scale_R.new_zeros(call.layout.num_problems).index_add(0, problem_N, 2 * product_N)
        return LayerScores(torch.zeros_like(call.scale_R), cross_P)
