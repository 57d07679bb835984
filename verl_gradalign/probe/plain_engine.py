# SPDX-License-Identifier: Apache-2.0
"""A `GradientEngine` over a plain or FSDP-wrapped transformers model: padded passes, nothing of verl.

    engine = PlainEngine(model, responses, temperature=1.0)

Shape legend: R rows of a pass, S tokens of prompt and response (padded), T response tokens, V vocabulary, M predicted
tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from verl_gradalign.probe.fsdp import data_parallel_group
from verl_gradalign.probe.layout import Layout, padded_layout
from verl_gradalign.probe.log_probs import token_log_probs
from verl_gradalign.probe.passes import largest_of_ranks, size_of
from verl_gradalign.probe.planning import TokenBudget, pack
from verl_gradalign.types import ProblemRows, TokenRow


class PlainEngine:
    """Runs rows of a table through the model, at most `max_tokens` padded positions at a time.

    Args:
        module: a causal language model of transformers, plain, or wrapped by FSDP1 or FSDP2 over one group of ranks.
        rows: this rank's rows.
        temperature: the sampling temperature, at which log-probs are taken.
        max_tokens: positions of a micro-batch, padding included.
        autocast_dtype: what to compute in under autocast. None: the model's own dtype.
    """

    gradient_scale = 1.0

    def __init__(
        self,
        module: nn.Module,
        rows: Sequence[TokenRow],
        temperature: float = 1.0,
        max_tokens: int = 16384,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        self.module = module
        self.budget = TokenBudget(max_tokens, is_padded=True)
        self.shard_group = data_parallel_group(module)
        self.data_group = self.shard_group
        self._rows = rows
        self._temperature = temperature
        self._autocast_dtype = autocast_dtype
        self._device = next(module.parameters()).device

    @property
    def spare_row(self) -> int:
        return min(range(len(self._rows)), key=self.row_length)

    def row_length(self, row: int) -> int:
        return self._rows[row].num_tokens

    def coefficients(self, row: int) -> tuple[Tensor, Tensor]:
        """Return (c_t, mask_t) of the row's response tokens; see `GradientEngine.coefficients`."""
        coefficient_T = self._rows[row].coefficient
        return coefficient_T, torch.ones_like(coefficient_T)

    def forward(self, rows: Sequence[int], rows_per_problem: Sequence[int]) -> tuple[Tensor, Layout]:
        """Return the log-probs of the rows' responses (rows, longest) and the layout; see `GradientEngine.forward`."""
        chosen = [self._rows[row] for row in rows]
        width = max(row.num_tokens for row in chosen)
        ids_RS = torch.zeros(len(chosen), width, dtype=torch.int64)
        mask_RS = torch.zeros_like(ids_RS)
        for index, row in enumerate(chosen):
            ids_RS[index, : row.num_tokens] = torch.cat([row.prompt, row.response])
            mask_RS[index, : row.num_tokens] = 1
        ids_RS, mask_RS = ids_RS.to(self._device), mask_RS.to(self._device)
        autocast: Any = nullcontext()
        if self._autocast_dtype is not None:
            autocast = torch.autocast(self._device.type, dtype=self._autocast_dtype)
        with autocast:
            logits_RSV = self.module(input_ids=ids_RS, attention_mask=mask_RS, use_cache=False).logits
        lengths = [(row.prompt.numel(), row.response.numel()) for row in chosen]
        log_prob_RT = response_log_probs(
            logits_RSV.flatten(0, 1),
            ids_RS.flatten(),
            [(index * width + prompt, response) for index, (prompt, response) in enumerate(lengths)],
            self._temperature,
        )
        return log_prob_RT, padded_layout(len(chosen), width, rows_per_problem)

    def backward(self, problems: Sequence[ProblemRows]) -> None:
        """Add the gradient of the problems' loss to `.grad`. Collective; see `GradientEngine.backward`."""
        rows = [(row, problem.scale) for problem in problems for row in problem.rows]
        # Row by row: the sum over rows does not ask where a problem ends, so large problems fit too.
        one_row_each = [ProblemRows("", (row,), 1, self.row_length(row), self.row_length(row)) for row, _ in rows]
        batches = [[rows[i] for i in members] for members in pack([size_of(p) for p in one_row_each], self.budget)]
        num_batches = largest_of_ranks(len(batches), self.data_group, self._device)
        # FSDP averages gradients over the group; this undoes it.
        num_ranks = 1 if self.data_group is None else self.data_group.size()
        for batch in batches + [[]] * (num_batches - len(batches)):
            members = batch or [(self.spare_row, 0.0)]
            log_prob_RT, _ = self.forward([row for row, _ in members], (len(members),))
            coefficient_RT = torch.zeros_like(log_prob_RT)
            for index, (row, scale) in enumerate(batch):
                coefficient_T = self._rows[row].coefficient
                coefficient_RT[index, : len(coefficient_T)] = coefficient_T * scale
            ((coefficient_RT * log_prob_RT).sum() * num_ranks).backward()  # type: ignore[no-untyped-call]


def response_log_probs(
    logits_NV: Tensor, ids_N: Tensor, spans: Sequence[tuple[int, int]], temperature: float
) -> Tensor:
    """Return the log-probs of runs of tokens, (runs, longest), zero beyond a run's end.

    Shapes: logits_NV (positions, vocabulary) and ids_N (positions,) of the same flattened pass; `spans` are (first
        token's position, number of tokens), and the logits one position before predict a token.
    """
    position_M = torch.cat([torch.arange(start, start + length) for start, length in spans]).to(ids_N.device)
    log_prob_M = token_log_probs(logits_NV, position_M - 1, ids_N[position_M], temperature)
    width = max(length for _, length in spans)
    place_M = torch.cat([torch.arange(length) + index * width for index, (_, length) in enumerate(spans)])
    flat = log_prob_M.new_zeros(len(spans) * width)
    return flat.index_put((place_M.to(ids_N.device),), log_prob_M).view(len(spans), width)
