# SPDX-License-Identifier: Apache-2.0
"""What the probe asks of a training engine, whoever built it.

The estimators and the direction are written against this protocol only, so the same code runs on verl's FSDP
actor (`integration/engine.py`) and on a plain transformers model in a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from verl_gradalign.types import ProblemRows


class GradientEngine(Protocol):
    """A model, sharded or not, that can run one backward pass over the rows of some problems."""

    @property
    def module(self) -> torch.nn.Module:
        """The (possibly FSDP-wrapped) model whose trainable parameters carry the gradient."""
        ...

    @property
    def shard_group(self) -> ProcessGroup | None:
        """Ranks over which the parameters are sharded, where sums over shards are reduced. None: unsharded."""
        ...

    @property
    def gradient_scale(self) -> float:
        """Factor by which `.grad` must be multiplied to be the gradient (1.0 unless an fp16 scaler is in use)."""
        ...

    def backward(self, problems: Sequence[ProblemRows]) -> None:
        """Add to every trainable parameter's `.grad` the gradient of sum_t c_t log pi(y_t). Collective.

        The sum runs over the rows of `problems` on *all* ranks, with the token coefficients c_t that came with the
        rows (`objective.token_coefficients`). Every rank of the job must call it with the same problems, also where
        it holds none of their rows.
        """
        ...
