# SPDX-License-Identifier: Apache-2.0
"""verl's own update of the actor, measured in passing: what `gradalign.measure=update` asks of a worker.

verl calls the loss function between the forward and the backward pass of every micro-batch; while the update runs,
the loss function is wrapped by one that tells the taps which rows are in it. The loss itself, the optimizer and the
rows stay verl's. Rows are known by a column of numbers that goes with them through mini-batches and micro-batches.

    with measured_update(worker.actor, direction, data, request) as measured:
        output = worker.actor.train_mini_batch(data)
    reply = measured.reply(output)

Shape legend: R rows of a rank, B rows of a micro-batch, N its tokens, M its response tokens, K readings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed
from tensordict import TensorDict
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import TrainingWorker

from verl_gradalign.config import ProbeConfig
from verl_gradalign.errors import refuse
from verl_gradalign.integration.engine import VerlEngine
from verl_gradalign.probe.direction import Direction, is_away, on_cpu, on_device
from verl_gradalign.probe.direction_gather import DirectionGather
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.gradient import leave_no_trace, require_no_dropout
from verl_gradalign.probe.layout import packed_layout, padded_layout
from verl_gradalign.probe.products import product_points
from verl_gradalign.probe.replica import Replica, cut_replica, whole_replica
from verl_gradalign.probe.sum_check import SumCheck, checking_sums
from verl_gradalign.probe.trusted import with_adam_metric
from verl_gradalign.probe.update import UNIFORM, UNIFORM_HALF, Reading, UpdateMeter, measuring
from verl_gradalign.rank_correlation import spearman

MEASURE = "gradalign_measure"
"""Key of the batch's extra_info that asks for the measurement, by an `UpdateRequest`."""
ROW = "gradalign_row"
"""Column of row numbers; never stored."""
WHOLE, CUT = "ghost", "low_rank"


@dataclass(frozen=True)
class UpdateRequest:
    """How an update is measured."""

    estimator: str
    """`ghost`: along the whole direction; `low_rank`: along its matrices cut to `probe.rank`."""
    probe: ProbeConfig
    metric: str = "none"
    """`adam`: the stored direction is taken in the metric of the optimizer's moments before the update."""
    is_audited: bool = False
    """low_rank: whether the whole direction is read too, for the fidelity: every `probe.canary_interval` steps."""


@dataclass(frozen=True)
class UpdateReply:
    """What one rank's rows contributed, in the order in which the rank was given them. float64, on the CPU."""

    contribution_R: Tensor
    """The row's part of <g, v / |v|>, g the gradient of its mini-batch's loss; they add up over rows and ranks."""
    derivative_R: Tensor
    """v / |v| . grad log pi(y); nan where the loss does not tell it (`UpdateMeter.derivative_R`)."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """By metric name; the same on all ranks."""
    exact_sum_error: float | None = None
    """Largest error of the sum along the whole direction, as a share of |g|; None if that was not read, or if no
    optimizer step was taken that it could be compared with."""


def check(module: nn.Module, estimator: str, probe: ProbeConfig) -> None:
    """Raise ValueError, naming the layers or the key and the remedy, if updates of this model cannot be measured."""
    require_no_dropout(module)
    if estimator not in (WHOLE, CUT):
        why = "is not measured with in the update, which reads products with the direction"
        remedy = f"set gradalign.estimator={WHOLE} (whole direction) or {CUT}, or gradalign.measure=before"
        refuse("gradalign.estimator", estimator, why, remedy)
    try:
        product_points(module, are_factored=estimator == CUT)
    except ValueError as error:
        raise ValueError(f"{error} With gradalign.measure=update, set gradalign.measure=before too.") from None


@contextmanager
def measured_update(
    actor: TrainingWorker, direction: Direction, data: TensorDict, request: UpdateRequest
) -> Iterator["MeasuredUpdate"]:
    """Measure what runs on `data` meanwhile, verl's `train_mini_batch`; leave no tap, hook or column. Collective."""
    # Without rows: an engine for the groups, the device and the scale that the probe asks for.
    engine = VerlEngine(actor.engine, TensorDict({}, batch_size=0), 1.0, TokenBudget(0, is_padded=True))
    with leave_no_trace(engine.module):
        if request.metric == "adam":
            here = with_adam_metric(on_device(direction, engine.device), engine, actor.engine.optimizer)
            direction = on_cpu(here) if is_away(direction, engine.device) else here
        replicas = _replicas(engine, direction, request, compute_dtype(actor.engine))
    num_rows, is_half = len(data), compute_dtype(actor.engine) is not None
    readings, loss_fn = [replica.reading for replica in replicas], actor.loss_fn
    with measuring(engine.module, readings, num_rows, engine.device, UNIFORM_HALF if is_half else UNIFORM) as meter:
        sums = SumCheck(engine.module, direction, meter, engine.device, engine.shard_group, engine.data_group)
        measured = MeasuredUpdate(engine, meter, sums, loss_fn, rows_per_step(actor, data), replicas)
        data[ROW] = torch.arange(num_rows)
        actor.loss_fn = measured.loss
        try:
            with checking_sums(actor.engine.optimizer, sums):
                yield measured
        finally:
            actor.loss_fn = loss_fn
            data.pop(ROW)
    meter.end()


def compute_dtype(engine: Any) -> torch.dtype | None:
    """Return the half precision that verl's engine computes in, None if it computes as its parameters are kept."""
    # float32 is verl's sign for no autocast.
    return None if engine._autocast_dtype == torch.float32 else engine._autocast_dtype


def _replicas(
    engine: VerlEngine, direction: Direction, request: UpdateRequest, dtype: torch.dtype | None
) -> list[Replica]:
    """Return the direction as it is read: the first one counts, a second one is the whole. Collective."""
    gather = DirectionGather(engine.module, direction, engine.device)
    if request.estimator == WHOLE:
        return [whole_replica(gather, product_points(engine.module), dtype)]
    cut_points = product_points(engine.module, are_factored=True)
    replicas = [cut_replica(gather, cut_points, request.probe.rank, engine.data_group, dtype)]
    if request.is_audited:
        # Gathered layer by layer as the backward pass comes to it: the whole may not fit.
        replicas.append(Replica(Reading(product_points(engine.module), gather), 1.0, is_whole=True))
    return replicas


def rows_per_step(actor: TrainingWorker, data: TensorDict) -> int:
    """Return this rank's rows of a mini-batch, as `train_mini_batch` counts them."""
    size = tu.get(data, "mini_batch_size", None)
    if size is None:
        return len(data) // int(tu.get(data, "num_mini_batch"))
    return int(size) // int(actor.engine.get_data_parallel_size())


class MeasuredUpdate:
    """One update while it is measured: verl's loss function with the meter behind it."""

    def __init__(
        self,
        engine: VerlEngine,
        meter: UpdateMeter,
        sums: SumCheck,
        loss_fn: Any,
        rows_per_step: int,
        replicas: Sequence[Replica],
    ) -> None:
        self._engine, self._meter, self._sums, self._loss_fn = engine, meter, sums, loss_fn
        self._rows_per_step, self._energy_kept = rows_per_step, replicas[0].energy_kept
        self._reads_whole = replicas[-1].is_whole
        self._num_rows_seen = 0

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return verl's loss of a micro-batch, and have its backward pass measured."""
        # verl also calls the loss function for what it makes of the logits, without a model output.
        if "model_output" in kwargs:
            self._begin(kwargs["model_output"], kwargs["data"])
        return self._loss_fn(*args, **kwargs)

    def _begin(self, model_output: Mapping[str, Any], data: TensorDict) -> None:
        if self._num_rows_seen % self._rows_per_step == 0:
            # Of a mini-batch that verl took no step with, as its gradient was not finite.
            self._meter.take_sum()
        self._sums.mini_batch = self._num_rows_seen // self._rows_per_step
        self._num_rows_seen += len(data)
        lengths, width = data["input_ids"].offsets().diff().tolist(), self._meter.passed[1]
        is_packed = tu.get_non_tensor_data(data, "use_remove_padding", True)
        each = (1,) * len(lengths)
        layout = packed_layout(lengths, width, each) if is_packed else padded_layout(len(lengths), width, each)
        log_probs = model_output.get("log_probs")
        dtype = torch.promote_types(torch.float32 if log_probs is None else log_probs.dtype, torch.float32)
        # verl's losses count dp_size-fold, because gradients are averaged over the ranks.
        units = self._engine.gradient_scale / int(data["dp_size"])
        self._meter.begin(data[ROW].tolist(), layout, units, dtype)
        if log_probs is not None and log_probs.requires_grad:
            tokens = response_tokens(data)
            log_probs.register_hook(lambda grad: self._meter.note_coefficients(_values(grad), **tokens))
        for name, value in model_output.items():
            if name != "log_probs" and isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(partial(_with_values, self._meter.note_other_term))  # type: ignore[no-untyped-call]

    def reply(self, output: TensorDict | None) -> UpdateReply:
        """Return what was measured, given what verl's `train_mini_batch` returned. Collective."""
        # Without an output, as of ranks that share their rows with another, norms are not known.
        metrics: Mapping[str, Any] = {} if output is None else tu.get(output, "metrics")
        errors_K = self._sums.largest_errors(metrics.get("grad_norm", []))
        contribution_KR = self._meter.contribution_KR.cpu()
        diagnostics = {"update/energy_kept": self._energy_kept}
        if errors_K:
            diagnostics["update/sum_error"] = errors_K[0]
        if len(contribution_KR) > 1:
            diagnostics["update/fidelity"] = self._fidelity(contribution_KR)
        # The last reading is the exact one, if any is.
        exact_error = errors_K[-1] if errors_K and self._reads_whole else None
        return UpdateReply(contribution_KR[0], self._meter.derivative_R.cpu(), diagnostics, exact_error)

    def _fidelity(self, contribution_KR: Tensor) -> float:
        """Return the rank correlation of the readings over all ranks' rows that contribute anything. Collective."""
        group, parts = self._engine.data_group, [contribution_KR]
        if group is not None:
            parts = [contribution_KR] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(parts, contribution_KR, group=group)
        all_KR = torch.cat(parts, dim=1)
        live_KR = all_KR[:, (all_KR != 0).any(dim=0) & all_KR.isfinite().all(dim=0)]
        return spearman(live_KR[0], live_KR[1])


def response_tokens(data: TensorDict) -> dict[str, Tensor]:
    """Return (row_N, is_counted_N) of a micro-batch's log-probs: whose they are, and whether the loss counts them.

    verl's log-prob at a position is of the token behind it.
    """
    length_B, prompt_B, response_B = (data[name].offsets().diff() for name in ("input_ids", "prompts", "responses"))
    row_B = torch.arange(len(length_B), device=length_B.device)
    row_N, row_M = row_B.repeat_interleave(length_B), row_B.repeat_interleave(response_B)
    start_B, response_start_B = (bounds.cumsum(0) - bounds for bounds in (length_B, response_B))
    place_M = torch.arange(len(row_M), device=row_M.device) - response_start_B[row_M]
    is_counted_N = torch.zeros(len(row_N), dtype=torch.bool, device=row_N.device)
    is_counted_N[start_B[row_M] + prompt_B[row_M] - 1 + place_M] = data["response_mask"].values().bool()
    return {"row_N": row_N, "is_counted_N": is_counted_N}


def _with_values(note: Callable[[Tensor], None], grad: Tensor) -> None:
    note(_values(grad))


def _values(grad: Tensor) -> Tensor:
    """Return a gradient's numbers one after another."""
    return (grad.values() if grad.is_nested else grad).detach().flatten()


def in_batch_order(replies: Sequence[UpdateReply], dp_rank_of: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the contributions and derivatives of all rows, in the order of the batch's keys.

    verl deals a batch's rows to its data-parallel ranks in consecutive chunks. `dp_rank_of` has each worker's.
    """
    firsts = [replies[list(dp_rank_of).index(dp_rank)] for dp_rank in range(max(dp_rank_of) + 1)]
    return torch.cat([r.contribution_R for r in firsts]), torch.cat([r.derivative_R for r in firsts])


def require_agreement(reply: UpdateReply, probe: ProbeConfig) -> None:
    """Raise RuntimeError if contributions along the whole direction do not add up to the update's gradient."""
    error, threshold = reply.exact_sum_error, probe.canary_threshold
    if error is not None and not error <= threshold:  # nan is no agreement either
        raise RuntimeError(
            f"what the rows contribute to the update differs from the update's gradient by {error:.2g} of its norm, "
            f"more than gradalign.probe.canary_threshold={threshold}. Remedy: set gradalign.measure=before with "
            "gradalign.estimator=backward and report the model; in half precision raise the threshold if errors are "
            "small and steady."
        )
