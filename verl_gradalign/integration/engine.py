# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engine as the probe's `GradientEngine`.

verl's own micro-batching, forward, gradient synchronisation and parameter handling run; this module only chooses
the rows and replaces the loss by a sum of token coefficients times log-probs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict
from torch.distributed import ProcessGroup
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.workers.engine.base import BaseEngine
from verl.workers.utils.padding import no_padding_2_padding

from verl_gradalign.probe.gradient import leave_no_trace, require_no_dropout
from verl_gradalign.types import ProblemRows

COEFFICIENTS = "gradalign_coefficients"
ROW_FIELDS = ("input_ids", "position_ids", "prompts", "responses", "response_mask", "loss_mask", COEFFICIENTS)
"""Fields of the row table, all nested (rows, ragged). Coefficients have the responses' lengths."""


def coefficient_loss(
    model_output: dict[str, Any], data: TensorDict, dp_group: Any = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return sum_t c_t log pi(y_t) over a micro-batch, as verl's loss functions do.

    The factor dp_size undoes FSDP's averaging over the data-parallel group, as in verl's own losses.
    """
    log_prob_RT = no_padding_2_padding(model_output["log_probs"], data)
    coefficient_RT = data[COEFFICIENTS].to_padded_tensor(0.0).to(log_prob_RT.dtype)
    return (coefficient_RT * log_prob_RT).sum() * data["dp_size"], {}


class VerlEngine:
    """One rank's table of rows on verl's engine.

    Args:
        engine: verl's FSDP engine (`actor.engine` of a worker).
        rows: the rank's rows; the last one is the spare row, run with zero coefficients where a rank has fewer rows
            than others, because every rank must run the same number of micro-batches.
        temperature: the sampling temperature, at which log-probs are taken.
    """

    def __init__(self, engine: BaseEngine, rows: TensorDict, temperature: float) -> None:
        self._engine = engine
        self._rows = rows
        self._spare_row = len(rows) - 1
        self._temperature = temperature

    @property
    def module(self) -> torch.nn.Module:
        return self._engine.module

    @property
    def shard_group(self) -> ProcessGroup | None:
        return self._engine.device_mesh["fsdp"].get_group()

    @property
    def gradient_scale(self) -> float:
        scaler = self._engine.scaler
        return 1.0 if scaler is None else 1.0 / scaler.get_scale()

    def backward(self, problems: Sequence[ProblemRows]) -> None:
        """Add the gradient of the problems' loss to `.grad`. Collective; see `GradientEngine.backward`."""
        dp_size = self._engine.get_data_parallel_size()
        rows = [row for problem in problems for row in problem.rows]
        num_rows = max(1, sum(math.ceil(problem.num_rows / dp_size) for problem in problems))
        num_rows, micro_batch_size = self._micro_batching(max(num_rows, len(rows)))
        data = self._select(rows, num_padding=num_rows - len(rows))
        config = self._engine.engine_config
        tu.assign_non_tensor(
            data,
            temperature=self._temperature,
            use_remove_padding=config.use_remove_padding,
            use_fused_kernels=config.use_fused_kernels,
            use_dynamic_bsz=config.use_dynamic_bsz,
            max_token_len_per_gpu=config.max_token_len_per_gpu,
            micro_batch_size_per_gpu=micro_batch_size,
        )
        self._engine.forward_backward_batch(data, coefficient_loss)

    def _micro_batching(self, num_rows: int) -> tuple[int, int | None]:
        """Return (rows to run, rows per micro-batch): verl wants fixed-size micro-batches to divide the batch."""
        limit = self._engine.engine_config.micro_batch_size_per_gpu
        if self._engine.engine_config.use_dynamic_bsz or not limit:
            return num_rows, limit
        num_micro_batches = math.ceil(num_rows / limit)
        micro_batch_size = math.ceil(num_rows / num_micro_batches)
        return num_micro_batches * micro_batch_size, micro_batch_size

    def _select(self, rows: list[int], num_padding: int) -> TensorDict:
        """Return the chosen rows followed by `num_padding` copies of the spare row without coefficients."""
        data = tu.index_select_tensor_dict(self._rows, rows + [self._spare_row] * num_padding)
        parts = list(data[COEFFICIENTS].unbind())
        parts = parts[: len(rows)] + [torch.zeros_like(part) for part in parts[len(rows) :]]
        data[COEFFICIENTS] = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
        return data


@contextmanager
def scoring_mode(engine: BaseEngine) -> Iterator[None]:
    """Load what the engine offloads, enter train mode (checkpointing is active only there), and undo all of it.

    Raises: ValueError if dropout is active: scores would depend on chance.
    """
    require_no_dropout(engine.module)
    offloads = engine.is_param_offload_enabled
    if offloads:
        engine.to(get_device_name(), model=True, optimizer=False, grad=True)
    try:
        with leave_no_trace(engine.module), engine.train_mode(disable_auto_offload=True):
            yield
    finally:
        if offloads:
            engine.to("cpu", model=True, optimizer=False, grad=True)
