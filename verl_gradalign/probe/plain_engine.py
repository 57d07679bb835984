# SPDX-License-Identifier: Apache-2.0
"""A `GradientEngine` over a plain or FSDP-wrapped transformers model: padded passes, nothing of verl.

    engine = PlainEngine(model, responses, temperature=1.0)

Shape legend: R rows of a pass, S tokens of prompt and response (padded), T response tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from verl_gradalign.probe.engine import OnBlock, PreparedPass, TokenBudget
from verl_gradalign.probe.fsdp import compute_device, data_parallel_group
from verl_gradalign.probe.gradient import in_eval_mode
from verl_gradalign.probe.head import plain_head, response_log_probs
from verl_gradalign.probe.layout import Layout, padded_layout
from verl_gradalign.probe.passes import pack, power_of_two, weighed_sums
from verl_gradalign.probe.ranks import largest
from verl_gradalign.types import ProblemRows, TokenRow

OnPass = Callable[[Sequence[int], Layout], None]
"""Called between the forward and the backward pass of a micro-batch, with its rows and their layout."""


class PlainEngine:
    """Runs rows of a table through the model, at most `max_tokens` padded positions at a time.

    Args:
        module: a causal language model of transformers, plain, or wrapped by FSDP1 or FSDP2 over one group of ranks.
        rows: this rank's rows.
        temperature: the sampling temperature, at which log-probs are taken.
        max_tokens: positions of a micro-batch, padding included.
        autocast_dtype: what to compute in under autocast. None: the model's own dtype.

    Made on all ranks alike: under FSDP float16 asks them for the largest coefficient of all.
    """

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
        self.shard_group = self.data_group = data_parallel_group(module)
        self.sequence_group = None
        self._rows = rows
        self._temperature = temperature
        self._autocast_dtype = autocast_dtype
        self.device = compute_device(module)
        # In float16 gradients vanish below 6e-8, which a long problem's coefficients come close to.
        is_float16 = torch.float16 in (autocast_dtype, next(module.parameters()).dtype)
        self.gradient_scale = self._largest_coefficient() if is_float16 else 1.0

    def _largest_coefficient(self) -> float:
        """Return the power of two next below the largest |coefficient| of all ranks' rows. Collective."""
        sizes = [float(row.coefficient.abs().max()) for row in self._rows if row.coefficient.numel()]
        exponent = round(math.log2(power_of_two(max(sizes, default=0.0))))
        return 2.0 ** largest(exponent, self.data_group, self.device)

    @property
    def spare_row(self) -> int:
        return min(range(len(self._rows)), key=self.row_length)

    def row_length(self, row: int) -> int:
        return self._rows[row].num_tokens

    def coefficients(self, row: int) -> tuple[Tensor, Tensor]:
        """Return (c_t, mask_t) of the row's response tokens; see `GradientEngine.coefficients`."""
        coefficient_T = self._rows[row].coefficient
        return coefficient_T, torch.ones_like(coefficient_T)

    def forward(
        self,
        rows: Sequence[int],
        rows_per_problem: Sequence[int],
        on_block: OnBlock | None = None,
        whole_logits: bool = False,
    ) -> tuple[Tensor, Layout]:
        """Return the log-probs of the rows' responses (rows, longest) and the layout; see `GradientEngine.forward`."""
        head, passed = None if whole_logits else plain_head(self), self.prepare(rows)
        chosen = [self._rows[row] for row in rows]
        spans = [(start + len(row.prompt), len(row.response)) for start, row in zip(passed.starts, chosen, strict=True)]
        log_prob_RT = response_log_probs(passed, spans, self._temperature, head, on_block)
        return log_prob_RT, self._layout(chosen, passed.ids.shape[1], rows_per_problem)

    def _layout(self, chosen: Sequence[TokenRow], width: int, rows_per_problem: Sequence[int]) -> Layout:
        """Return where rows lie in what `prepare` makes of them, whose lines are so wide."""
        return padded_layout(len(chosen), width, rows_per_problem)

    def prepare(self, rows: Sequence[int]) -> PreparedPass:
        """Return a pass over the rows, padded to the longest; see `GradientEngine.prepare`."""
        chosen = [self._rows[row] for row in rows]
        ids_RS = pad_sequence([torch.cat([row.prompt, row.response]) for row in chosen], batch_first=True)
        mask_RS = pad_sequence([torch.ones(row.num_tokens, dtype=torch.int64) for row in chosen], batch_first=True)
        ids_RS, mask_RS = ids_RS.to(self.device), mask_RS.to(self.device)

        def run() -> Tensor:
            dtype = self._autocast_dtype
            with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype):
                logits: Tensor = self.module(input_ids=ids_RS, attention_mask=mask_RS, use_cache=False).logits
            return logits

        return PreparedPass(ids_RS, tuple(index * ids_RS.shape[1] for index in range(len(chosen))), run)

    def row_sums(self, rows: Sequence[int]) -> Tensor:
        """Return the rows' sums of coefficient times log-prob, and of log-probs; see `GradientEngine.row_sums`."""
        sums_2R = torch.zeros(2, len(rows), dtype=torch.float64)
        with torch.no_grad(), in_eval_mode(self.module):
            for members in self._batches(rows):
                log_prob_RT, _ = self._pass([rows[i] for i in members])
                for i, log_prob_T in zip(members, log_prob_RT, strict=False):
                    sums_2R[:, i] = weighed_sums(log_prob_T, *self.coefficients(rows[i]))
        return sums_2R

    def backward(self, problems: Sequence[ProblemRows], on_pass: OnPass | None = None) -> None:
        """Add the gradient of the problems' loss, over `gradient_scale`, to `.grad`. Collective.

        See `GradientEngine.backward`. With `on_pass` the passes form logits, as those of training do, for taps on all
        layers to measure them (`update.measuring`); a pass that this rank only runs along with others is not told.
        """
        rows = [(row, problem.scale) for problem in problems for row in problem.rows]
        # FSDP averages gradients over the group; this undoes it.
        num_ranks = 1 if self.data_group is None else self.data_group.size()
        for members in self._batches([row for row, _ in rows]):
            log_prob_RT, layout = self._pass([rows[i][0] for i in members], whole_logits=on_pass is not None)
            coefficient_RT = torch.zeros_like(log_prob_RT)
            for index, (row, scale) in enumerate(rows[i] for i in members):
                coefficient_T = self._rows[row].coefficient
                coefficient_RT[index, : len(coefficient_T)] = coefficient_T * scale
            if on_pass is not None and members:
                on_pass([rows[i][0] for i in members], layout)
            loss = (coefficient_RT / self.gradient_scale * log_prob_RT).sum() * num_ranks
            loss.backward()  # type: ignore[no-untyped-call]

    def _pass(self, rows: Sequence[int], whole_logits: bool = False) -> tuple[Tensor, Layout]:
        # A rank without rows left runs the spare one, whose coefficients stay zero: every pass is collective.
        return self.forward(list(rows) or [self.spare_row], (max(1, len(rows)),), whole_logits=whole_logits)

    def _batches(self, rows: Sequence[int]) -> list[list[int]]:
        """Return places in `rows` by micro-batch, equally many micro-batches on every rank. Collective."""
        # Row by row: sums over rows do not ask where a problem ends, so large problems fit too.
        lengths = [(row, self.row_length(row)) for row in rows]
        one_row_each = [ProblemRows(f"row {row}", (row,), 1, length, length) for row, length in lengths]
        batches = pack(one_row_each, self.budget)
        num_batches = largest(len(batches), self.data_group, self.device)
        return batches + [[]] * (num_batches - len(batches))
