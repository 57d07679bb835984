# SPDX-License-Identifier: Apache-2.0
"""The update and the estimators on a transformers model without verl, FSDP2 where there are several ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.benchmarks.cases import Case, build_model, draw_problems
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.passes import assign
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemRows, ProblemScores

NUM_TRUSTED = 4


class PlainBench:
    """A model, its optimizer, and the rows of a case."""

    def __init__(self, case: Case, root: Path, device: str) -> None:
        module = build_model(case).to(device)
        if case.has_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        dtype = getattr(torch, case.dtype)
        if case.num_ranks > 1 or dtype != torch.float32:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
            for layer in module.model.layers:
                fully_shard(layer, mp_policy=policy)
            fully_shard(module, mp_policy=policy)
        self.module = module.train()
        self._optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)
        problems = draw_problems(case)
        rows = [row for problem in problems for row in problem]
        self._engine = PlainEngine(module, rows, 1.0, case.max_tokens)
        num_rows = case.rows_per_problem
        shares = [
            ProblemRows(
                uid=str(index),
                rows=tuple(range(index * num_rows, (index + 1) * num_rows)),
                num_rows=num_rows,
                num_tokens=num_rows * case.tokens_per_row,
                longest_row=case.tokens_per_row,
            )
            for index in range(len(problems))
        ]
        owners = assign([share.num_tokens for share in shares], case.num_ranks)
        rank = dist.get_rank()
        self._whole = [
            share if owner == rank else replace(share, rows=()) for share, owner in zip(shares, owners, strict=True)
        ][NUM_TRUSTED:]
        self._spread = [replace(share, rows=share.rows[rank :: case.num_ranks]) for share in shares]
        with leave_no_trace(module):
            self._direction = compute_direction(self._engine, self._spread[:NUM_TRUSTED])

    def update(self) -> None:
        """Take one training step on all candidates."""
        self._engine.backward(self._spread[NUM_TRUSTED:])
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def score(self, estimator: str, config: ProbeConfig | None = None) -> ProblemScores:
        """Score all candidates."""
        method = ESTIMATORS[estimator](config)
        problems = self._whole if method.needs_whole_problems else self._spread[NUM_TRUSTED:]
        with leave_no_trace(self.module):
            return method.score(self._engine, problems, self._direction)
