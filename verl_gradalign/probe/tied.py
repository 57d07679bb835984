# SPDX-License-Identifier: Apache-2.0
"""A weight that is both embedding and output layer: what is missing when the two uses are scored apart.

Products with the direction add up. Squared norms do not: |G_head + G_embedding|^2 has the cross term
2 <G_head, G_embedding>. G_embedding is non-zero only in the rows of the problem's own tokens, so those rows of G_head
are kept from the head's backward until the embedding's, and nothing else.

Shape legend: T positions of a problem, U distinct tokens of a problem, N positions, H hidden features, P problems.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from verl_gradalign.probe.layer_rules import LayerCall, LayerScores, without_padding_index
from verl_gradalign.probe.tap_points import TapPoint


class TiedWeight:
    """The cross term of one embedding and one linear layer that share their weight."""

    def __init__(self, embedding: TapPoint, head: TapPoint) -> None:
        self._embedding = embedding
        self._head = head
        self._ids_N = torch.zeros(0, dtype=torch.int64)
        self._head_rows_NH: Tensor | None = None

    @classmethod
    def find(cls, points: Sequence[TapPoint]) -> TiedWeight | None:
        """Return the tied weight among the tapped layers, None if no weight is used twice.

        Raises: ValueError that names the layers if a weight is shared in any other way.
        """
        uses = Counter(placement.identity for point in points for placement in point.placements)
        shared = [identity for identity, count in uses.items() if count > 1]
        if not shared:
            return None
        users = [point for point in points if any(p.identity in shared for p in point.placements)]
        embeddings = [point for point in users if isinstance(point.module, nn.Embedding)]
        heads = [point for point in users if isinstance(point.module, nn.Linear)]
        if len(shared) != 1 or len(embeddings) != 1 or len(heads) != 1 or len(users) != 2:
            raise ValueError(
                f"{', '.join(point.name for point in users)} share a weight, and only one embedding tied to one linear "
                "layer has a rule. Remedy: set gradalign.estimator=backward (exact) or finite_difference."
            )
        return cls(embeddings[0], heads[0])

    def note_input(self, point: TapPoint, layer_input: Tensor) -> None:
        """Remember the token ids that the embedding was given, which the head's backward needs."""
        if point is self._embedding:
            self._ids_N = layer_input.flatten()

    def cross_term(self, point: TapPoint, call: LayerCall) -> LayerScores:
        """Return 2 <G_head, G_embedding> when the embedding is reached, zeros before."""
        none = LayerScores(torch.zeros_like(call.scale_R), call.scale_R.new_zeros(call.layout.num_problems))
        # The head's backward comes first, the embedding's last: the rows wait for it.
        if point is self._head:
            self._head_rows_NH = self._rows_of_head_gradient(call)
        if point is not self._embedding:
            return none
        rows_NH, self._head_rows_NH = self._head_rows_NH, None
        assert rows_NH is not None, "the output layer's backward runs before the embedding's"
        row_N = call.layout.row_of_position(call.delta.device)
        delta_NH = without_padding_index(call.delta, call.input, self._embedding.module.padding_idx)  # type: ignore[arg-type]
        product_N = (rows_NH * delta_NH.to(call.dtype)).sum(dim=-1) * call.scale_R[row_N]
        problem_N = call.layout.problem_of_row(call.delta.device)[row_N]
        squared_norm_P = none.squared_norm_P.index_add(0, problem_N, 2 * product_N)
        return LayerScores(none.derivative_R, squared_norm_P)

    def _rows_of_head_gradient(self, call: LayerCall) -> Tensor:
        """Return, for each position, the row of its problem's head gradient that belongs to its token (N, H)."""
        scale_N1 = call.scale_R[call.layout.row_of_position(call.delta.device)].unsqueeze(-1)
        input_NH = call.input.to(call.dtype) * scale_N1
        parts = []
        for rows in call.layout.problems():
            positions = call.layout.positions_of(rows)
            ids_U, place_T = torch.unique(self._ids_N[positions], return_inverse=True)
            grad_UH = call.delta[positions][:, ids_U].to(call.dtype).T @ input_NH[positions]
            parts.append(grad_UH[place_T])
        return torch.cat(parts)
