# SPDX-License-Identifier: Apache-2.0
"""The update and the estimators on verl's FSDP2 actor: verl's `train_batch`, and scoring as the worker does it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry

from tests.benchmarks.cases import Case, draw_problems, save_model
from tests.distributed.engines import make_row_table
from verl_gradalign.config import ProbeConfig
from verl_gradalign.integration.engine import VerlEngine, coefficient_loss, scoring_mode
from verl_gradalign.integration.requests import ProblemKeys, Shares, build_shares, keys_by_rank, owners_of
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.types import ProblemScores, TokenRow

NUM_TRUSTED = 4
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class VerlBench:
    """verl's engine, and this rank's row tables for the update, the direction and the estimators."""

    def __init__(self, case: Case, root: Path, device: str) -> None:
        folder = root / f"model-{dist.get_rank()}"
        self._case = case
        self._verl = build_engine(case, save_model(case, folder))
        self.num_parameters = case_parameters(self._verl.module)
        self._budget = TokenBudget(case.max_tokens, is_padded=True)
        self._problems = draw_problems(case)
        self._keys = [
            ProblemKeys(
                str(index),
                tuple(f"{index}_{k}_0" for k in range(len(problem))),
                tuple(row.num_tokens for row in problem),
            )
            for index, problem in enumerate(self._problems)
        ]
        self._candidates = self._keys[NUM_TRUSTED:]
        spread: list[int | None] = [None] * case.num_problems
        whole = owners_of(self._candidates, "ghost", self._budget, case.num_ranks, "accumulate")
        self._tables = {True: self._table(self._candidates, whole), False: self._table(self._candidates, spread)}
        self._update_rows = make_row_table(self._rows(self._candidates, spread)[1])
        trusted, trusted_shares = self._table(self._keys[:NUM_TRUSTED], [None] * NUM_TRUSTED)
        with scoring_mode(self._verl):
            self._direction = compute_direction(VerlEngine(self._verl, trusted, 1.0, self._budget), trusted_shares)

    def update(self) -> None:
        """Take one training step on all candidates, in verl's micro-batches of the same token budget."""
        data = self._update_rows.copy()
        tu.assign_non_tensor(
            data,
            temperature=1.0,
            use_remove_padding=False,
            use_fused_kernels=False,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=self._case.max_tokens,
        )
        with self._verl.train_mode():
            self._verl.train_batch(data, coefficient_loss)

    def score(self, estimator: str, config: ProbeConfig | None = None) -> ProblemScores:
        """Score all candidates."""
        method = ESTIMATORS[estimator](config)
        rows, shares = self._tables[method.needs_whole_problems]
        with scoring_mode(self._verl):
            return method.score(VerlEngine(self._verl, rows, 1.0, self._budget), shares, self._direction)

    def _table(self, problems: list[ProblemKeys], owners: list[int | None]) -> tuple[TensorDict, Shares]:
        """Return this rank's rows, one of them again as the spare row, and its shares."""
        mine, rows = self._rows(problems, owners)
        positions = {key: position for position, key in enumerate(key for keys in mine.values() for key in keys)}
        return make_row_table([*rows, self._problems[0][0]]), build_shares(problems, mine, positions)

    def _rows(
        self, problems: list[ProblemKeys], owners: list[int | None]
    ) -> tuple[dict[int, list[str]], list[TokenRow]]:
        """Return this rank's keys by problem, and the rows of all these keys."""
        mine = keys_by_rank(problems, owners, self._case.num_ranks)[dist.get_rank()]
        places = [key.split("_") for keys in mine.values() for key in keys]
        return mine, [self._problems[int(problem)][int(row)] for problem, row, _ in places]


def build_engine(case: Case, folder: Path) -> Any:
    """Return verl's FSDP2 engine as a worker builds it."""
    dtype = DTYPES[case.dtype]
    engine_class = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    engine = engine_class(
        model_config=HFModelConfig(
            path=str(folder),
            load_tokenizer=False,
            override_config={"attn_implementation": "sdpa"},
            enable_gradient_checkpointing=case.has_checkpointing,
            use_remove_padding=False,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            use_remove_padding=False,
            use_dynamic_bsz=True,
            max_token_len_per_gpu=case.max_tokens,
            use_torch_compile=False,
            mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-6, total_training_steps=1000),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def case_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
