# SPDX-License-Identifier: Apache-2.0
"""What the probe asks of a training engine, whoever built it.

Estimators and directions are written against this protocol only, so the same code runs on verl's FSDP actor
(`integration/engine.py`) and on a plain or FSDP-wrapped transformers model (`probe/plain_engine.py`).

Shape legend: R rows, T response tokens, M those of all rows of a pass, H hidden features, B outputs of a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from verl_gradalign.probe.layout import Layout
from verl_gradalign.types import ProblemRows


@dataclass(frozen=True)
class TokenBudget:
    """What one micro-batch of one rank may hold."""

    max_tokens: int
    """Positions, padding included."""
    is_padded: bool
    """Whether rows are padded to the longest of the micro-batch, or packed."""

    def positions(self, problems: Sequence[ProblemRows]) -> int:
        """Return the positions that `problems` take together."""
        if self.is_padded:
            return sum(p.num_rows for p in problems) * max((p.longest_row for p in problems), default=0)
        return sum(p.num_tokens for p in problems)

    def holds(self, problems: Sequence[ProblemRows]) -> bool:
        return self.positions(problems) <= self.max_tokens

    def require_room(self, problems: Sequence[ProblemRows], remedy: str) -> None:
        """Raise ValueError, with the remedy, that names the first of `problems` that exceeds the budget alone."""
        for problem in problems:
            if not self.holds([problem]):
                size = f"{self.positions([problem])} positions, more than the {self.max_tokens} of a micro-batch"
                raise ValueError(f"problem {problem.uid} takes {size}. Remedy: {remedy}")


@dataclass(frozen=True)
class HeadBlock:
    """Some of the output layer's outputs in a backward pass, at the positions that response tokens are predicted at."""

    input_MH: Tensor
    delta_MB: Tensor
    """Gradient of the summed objective by these outputs."""
    outputs: slice
    is_last: bool
    lengths: tuple[int, ...]
    """Of each row's response; rows follow one another."""


OnBlock = Callable[[HeadBlock], None]


@dataclass(frozen=True)
class PreparedPass:
    """A forward pass over some rows that has not run yet."""

    ids: Tensor
    """Token ids at all positions, (lines, width)."""
    starts: tuple[int, ...]
    """The flattened position at which each row begins."""
    run: Callable[[], Tensor]
    """Calls the model and returns what it puts out as logits, (lines, width, vocabulary). Collective."""
    window: slice | None = None
    """Under sequence parallelism the flattened positions that this rank runs, and gives logits of; None: all."""


class GradientEngine(Protocol):
    """A model, sharded or not, with this rank's table of rows (one response with its prompt each)."""

    @property
    def module(self) -> torch.nn.Module:
        """The (possibly FSDP-wrapped) model whose trainable parameters carry the gradient."""

    @property
    def device(self) -> torch.device:
        """Where passes compute, and collectives take their tensors. The parameters may lie elsewhere: FSDP2's offload
        policy keeps them, and their gradients, in CPU memory."""

    @property
    def shard_group(self) -> ProcessGroup | None:
        """Ranks over which the parameters are sharded, where sums over shards are reduced. None: unsharded."""

    @property
    def data_group(self) -> ProcessGroup | None:
        """Ranks that hold different rows, or other positions of the same, where sums over positions are reduced. None:
        this rank holds all."""

    @property
    def sequence_group(self) -> ProcessGroup | None:
        """Ranks that have slices of the same rows; they are in `data_group` too, where partial sums add up. None: this
        rank has its rows whole."""

    @property
    def gradient_scale(self) -> float:
        """Factor by which `.grad` must be multiplied to be the gradient (1.0 unless an fp16 scaler is in use)."""

    @property
    def budget(self) -> TokenBudget:
        """What one micro-batch of one rank may hold."""

    @property
    def spare_row(self) -> int:
        """A short row, run without effect where a rank has fewer micro-batches than others."""

    def row_length(self, row: int) -> int:
        """Return the tokens of a row, prompt included."""

    def coefficients(self, row: int) -> tuple[Tensor, Tensor]:
        """Return (c_t, mask_t) of the row's response tokens, (T,) each, on the CPU."""

    def forward(
        self,
        rows: Sequence[int],
        rows_per_problem: Sequence[int],
        on_block: OnBlock | None = None,
        whole_logits: bool = False,
    ) -> tuple[Tensor, Layout]:
        """Return log pi(y_t) of the rows' response tokens, differentiable, and the layout of the pass. Collective.

        One forward pass; every rank of the job must call it equally often, with whatever rows it has. Gradients are
        recorded if the ambient grad mode says so. Where the model allows it no logits are formed (`probe/head.py`);
        `on_block` then gets the output layer's part of the backward pass. `whole_logits`: form them, as the model does.

        Shapes: (rows, longest response), zero beyond a row's response, and where another rank has the position.
        """

    def prepare(self, rows: Sequence[int]) -> PreparedPass:
        """Return a pass over the rows, for the caller to run once, as often as every other rank."""

    def row_sums(self, rows: Sequence[int]) -> Tensor:
        """Return each row's sum of coefficient times log-prob, and of its response's log-probs. Collective.

        Without gradients, in eval mode. Every rank of the job must call it equally often, with whatever rows it has,
        also none. The same rows run in the same micro-batches each time: in half precision log-probs depend on them.

        Shapes: (2, rows), float64, on the CPU; zero where another rank of `sequence_group` has the same rows' sums.
        """

    def backward(self, problems: Sequence[ProblemRows]) -> None:
        """Add to every trainable parameter's `.grad` the gradient of sum_t c_t log pi(y_t). Collective.

        The sum runs over the rows of `problems` on *all* ranks, with the token coefficients c_t that came with the
        rows (`objective.token_coefficients`), times each problem's `scale`. Every rank of the job must call it with
        the same problems, also where it holds none of their rows.
        """
