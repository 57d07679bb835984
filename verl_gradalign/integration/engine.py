# SPDX-License-Identifier: Apache-2.0
"""verl's engines as the probe's `GradientEngine`: of FSDP all of it, of others gradients and log-probs of rows.

verl's own inputs, model, micro-batching, gradient synchronisation and parameter handling run; this module only
chooses the rows, and replaces the loss by a sum of token coefficients times log-probs.

Shape legend: R rows, T response tokens, N positions, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, cast

import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers.modeling_outputs import CausalLMOutput
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import BaseEngine
from verl.workers.utils.padding import no_padding_2_padding

from verl_gradalign.errors import refuse
from verl_gradalign.probe.engine import OnBlock, PreparedPass, TokenBudget
from verl_gradalign.probe.fsdp import reshard, sharding_group
from verl_gradalign.probe.gradient import in_eval_mode, leave_no_trace, require_no_dropout
from verl_gradalign.probe.head import plain_head, response_log_probs
from verl_gradalign.probe.layout import Layout, packed_layout, padded_layout
from verl_gradalign.probe.passes import weighed_sums
from verl_gradalign.probe.ranks import largest
from verl_gradalign.probe.replay import ReplayTally
from verl_gradalign.types import ProblemRows

COEFFICIENTS = "gradalign_coefficients"
STORED_LOG_PROBS = "old_log_probs"
"""verl's column of the log-probs of a row's response at the policy that a step began with."""
MULTI_MODAL = "multi_modal_inputs"
FUSED = "_verl_fused_kernels_backend"
"""verl's mark on a model with fused kernels."""
MODEL_INPUTS = ("input_ids", "position_ids", MULTI_MODAL)
"""What verl makes a model's inputs of."""


def coefficient_loss(
    model_output: dict[str, Any], data: TensorDict, dp_group: Any = None, tally: ReplayTally | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return sum_t c_t log pi(y_t) over a micro-batch, as verl's loss functions do.

    With a tally each c_t is weighed by how far the policy has moved since the row's log-probs were stored. The factor
    dp_size undoes FSDP's averaging over the data-parallel group, as in verl's own losses.
    """
    log_prob_RT = no_padding_2_padding(model_output["log_probs"], data)
    coefficient_RT = data[COEFFICIENTS].to_padded_tensor(0.0).to(log_prob_RT.dtype)
    if tally is not None:
        # A row whose coefficients are zero, as a spare one's, gives no gradient, so it is no response here.
        mask_RT = data["response_mask"].to_padded_tensor(0).bool() & (coefficient_RT != 0).any(dim=1, keepdim=True)
        stored_RT = data[STORED_LOG_PROBS].to_padded_tensor(0.0)
        coefficient_RT = coefficient_RT * tally.weigh(log_prob_RT, stored_RT, mask_RT)
    return (coefficient_RT * log_prob_RT).sum() * data["dp_size"], {}


def taken_apart(rows: TensorDict) -> dict[str, list[Any]]:
    """Return, by column, what a pass may read of each row: every tensor, and images.

    Not a choice of columns: what verl's pass reads of a row, a pass over it here must read too.
    """
    # As verl's workers: rows of images have positions of several axes, which the transport leaves damaged.
    tu.maybe_fix_3d_position_ids(rows)
    columns = {name: list(rows[name].unbind()) for name in rows.keys() if isinstance(rows.get(name), Tensor)}
    if (images := rows.get(MULTI_MODAL, None)) is not None:
        columns[MULTI_MODAL] = images.tolist()
    return columns


def of_tokens(coefficients: Sequence[float], masks: Sequence[Tensor]) -> list[Tensor]:
    """Return each row's coefficient for every token that its mask counts, zero for the others.

    Raises: RuntimeError if there is none that is one for all of a row's tokens.
    """
    if any(map(math.isnan, coefficients)):
        raise RuntimeError(f"rows have no one coefficient for all tokens, and come without the column {COEFFICIENTS}")
    return [mask.float() * coefficient for coefficient, mask in zip(coefficients, masks, strict=True)]


def attribute_of(engine: BaseEngine, name: str) -> Any:
    """Return an attribute that verl's BaseEngine does not promise.

    Raises: ValueError, with the engine and the name, if this engine has none.
    """
    if not hasattr(engine, name):
        trouble = f"verl's {type(engine).__name__} has no {name}, which scores are taken with here"
        remedy = "set gradalign.estimator=backward, or train on FSDP (actor_rollout_ref.actor.strategy=fsdp2)"
        raise ValueError(f"{trouble}. Remedy: {remedy}")
    return getattr(engine, name)


def module_of(engine: BaseEngine) -> torch.nn.Module:
    """Return the engine's module; torchtitan's engine has a list of one.

    Raises: ValueError if the model is in several modules, as stages of a pipeline are.
    """
    module = attribute_of(engine, "module")
    parts = list(module) if isinstance(module, list | tuple | torch.nn.ModuleList) else [module]
    if len(parts) != 1:
        trouble = f"verl's {type(engine).__name__} holds the model in {len(parts)} modules, as stages of a pipeline"
        raise ValueError(f"{trouble}, and gradients are read from one. Remedy: set its pipeline parallel size to 1")
    return cast(torch.nn.Module, parts[0])


class VerlEngine:
    """One rank's table of rows on verl's engine.

    Args:
        engine: verl's engine (`actor.engine` of a worker). `backward` and `row_sums` ask for what BaseEngine promises,
            the module and the configuration; `forward` and `prepare` for what the FSDP engine has beside that.
        rows: the rank's rows with all that verl's update is given of them, and, where a response's tokens may have
            different ones, COEFFICIENTS, which have the responses' lengths. The last one is the spare row, run with
            zero coefficients where a rank has fewer rows than others, because every rank must run the same number of
            micro-batches.
        temperature: the sampling temperature, at which log-probs are taken.
        budget: what a micro-batch of a forward pass may hold.
        coefficients: one for all tokens of each row's response, where the rows come without COEFFICIENTS.
        is_replayed: whether the rows are of earlier policies and come with STORED_LOG_PROBS. `backward` then weighs
            their tokens by truncated importance ratios (`probe.replay`), which `forward` and the estimators do not.
    """

    def __init__(
        self,
        engine: BaseEngine,
        rows: TensorDict,
        temperature: float,
        budget: TokenBudget,
        coefficients: Sequence[float] = (),
        is_replayed: bool = False,
    ) -> None:
        self.budget = budget
        self._engine = engine
        self._temperature = temperature
        self._tally = ReplayTally() if is_replayed else None
        # Taken apart once: selecting rows of a nested tensor takes all of it apart.
        self._rows = taken_apart(rows)
        if not any(self._rows.get(MULTI_MODAL, ())):
            self._rows.pop(MULTI_MODAL, None)
        if COEFFICIENTS not in self._rows and len(coefficients):
            self._rows[COEFFICIENTS] = of_tokens(coefficients, self._rows["response_mask"])

    @property
    def module(self) -> torch.nn.Module:
        return module_of(self._engine)

    @property
    def device(self) -> torch.device:
        # verl's id is a number, or a whole name on a CPU.
        index = get_device_id()
        return torch.device(get_device_name(), index) if isinstance(index, int) else torch.device(index)

    @cached_property
    def shard_group(self) -> ProcessGroup | None:
        reshard(self.module)  # parameters that a pass has put together do not say how they are cut
        return sharding_group(self.module)

    @property
    def data_group(self) -> ProcessGroup | None:
        # Slices of rows add up as rows do.
        is_sliced = self.sequence_group is not None
        return torch.distributed.group.WORLD if is_sliced else self._engine.get_data_parallel_group()

    @property
    def sequence_group(self) -> ProcessGroup | None:
        is_sliced = getattr(self._engine, "use_ulysses_sp", False)
        return attribute_of(self._engine, "ulysses_parallel_group") if is_sliced else None

    @property
    def gradient_scale(self) -> float:
        scaler = getattr(self._engine, "scaler", None)  # for float16; engines that have none scale nothing
        return 1.0 if scaler is None else 1.0 / scaler.get_scale()

    @property
    def spare_row(self) -> int:
        return len(self._rows["input_ids"]) - 1

    def row_length(self, row: int) -> int:
        return len(self._rows["input_ids"][row])

    def coefficients(self, row: int) -> tuple[Tensor, Tensor]:
        """Return (c_t, mask_t) of the row's response tokens; see `GradientEngine.coefficients`."""
        return self._on_cpu[COEFFICIENTS][row], self._on_cpu["response_mask"][row]

    @cached_property
    def _on_cpu(self) -> dict[str, list[Tensor]]:
        return {name: [part.cpu() for part in self._rows[name]] for name in (COEFFICIENTS, "response_mask")}

    def forward(
        self,
        rows: Sequence[int],
        rows_per_problem: Sequence[int],
        on_block: OnBlock | None = None,
        whole_logits: bool = False,
    ) -> tuple[Tensor, Layout]:
        """Return the log-probs of the rows' responses (rows, longest) and the layout; see `GradientEngine.forward`.

        verl prepares the inputs. The log-probs are taken here: verl takes them of prompt tokens too, from whole logits,
        and one token at a time where there is no flash attention.
        """
        head, passed = None if whole_logits else plain_head(self), self.prepare(rows)
        lengths = [self.row_length(row) for row in rows]
        prompts = [len(self._rows["prompts"][row]) for row in rows]
        responses = [len(self._rows["responses"][row]) for row in rows]
        lines, width = passed.ids.shape
        if self._engine.engine_config.use_remove_padding:
            layout = packed_layout(lengths, width, rows_per_problem)
        else:
            layout = padded_layout(lines, width, rows_per_problem)
        if passed.window is not None and self.sequence_group is not None:
            layout = layout.sliced(passed.window, self.sequence_group)
        spans = [(start + p, length) for start, p, length in zip(passed.starts, prompts, responses, strict=True)]
        return response_log_probs(passed, spans, self._temperature, head, on_block), layout

    def prepare(self, rows: Sequence[int]) -> PreparedPass:
        """Return a pass over the rows with verl's own inputs; see `GradientEngine.prepare`."""
        autocast = self._autocast()
        names = [name for name in MODEL_INPUTS if name in self._rows]
        data = self._settings(self._select(names, list(rows)).to(get_device_id()), use_fused_kernels=False)
        inputs, _ = attribute_of(self._engine, "prepare_model_inputs")(micro_batch=data)
        ids: Tensor = inputs["input_ids"]
        window = None
        if self.sequence_group is not None:
            # verl gives each rank its slice of the packed line, which it fills up to equal ones.
            width, place = ids.shape[1], torch.distributed.get_rank(self.sequence_group)
            window, line_N = slice(place * width, (place + 1) * width), data["input_ids"].values()
            num_ranks = torch.distributed.get_world_size(self.sequence_group)
            ids = torch.nn.functional.pad(line_N, (0, num_ranks * width - len(line_N))).unsqueeze(0)

        def run() -> Tensor:
            with autocast, calling_head(self.module):
                logits: Tensor = self.module(**inputs, use_cache=False).logits
            return logits

        if self._engine.engine_config.use_remove_padding:
            lengths = [self.row_length(row) for row in rows[:-1]]
            return PreparedPass(ids, tuple(accumulate(lengths, initial=0)), run, window)
        return PreparedPass(ids, tuple(index * ids.shape[1] for index in range(len(rows))), run)

    def row_sums(self, rows: Sequence[int]) -> Tensor:
        """Return the rows' sums of coefficient times log-prob, and of log-probs; see `GradientEngine.row_sums`.

        By the pass in which verl computes log-probs before an update, whatever the engine.
        """
        data = self._batch(list(rows), [1.0] * len(rows))
        with torch.no_grad(), in_eval_mode(self.module), self._engine.eval_mode(disable_auto_offload=True):
            output = self._engine.forward_backward_batch(data, None, forward_only=True)
        sums_2R = torch.zeros(2, len(rows), dtype=torch.float64)
        # Ranks that share rows have each of their log-probs; sums are added up over all ranks.
        if self.sequence_group is None or torch.distributed.get_rank(self.sequence_group) == 0:
            log_prob_RT = no_padding_2_padding(output["model_output"]["log_probs"].cpu(), data.cpu())
            for index, row in enumerate(rows):
                sums_2R[:, index] = weighed_sums(log_prob_RT[index], *self.coefficients(row))
        return sums_2R

    def backward(self, problems: Sequence[ProblemRows]) -> None:
        """Add the gradient of the problems' loss to `.grad`. Collective; see `GradientEngine.backward`."""
        rows = [row for problem in problems for row in problem.rows]
        data = self._batch(rows, [problem.scale for problem in problems for _ in problem.rows])
        self._engine.forward_backward_batch(data, partial(coefficient_loss, tally=self._tally))

    def _batch(self, rows: list[int], scales: list[float]) -> TensorDict:
        """Return what verl's own pass over the rows is given, coefficients scaled, spare rows last. Collective."""
        # All ranks must run equally many rows, and at least one.
        num_rows = largest(max(1, len(rows)), self.data_group, get_device_id())
        num_rows, micro_batch_size = self._micro_batching(num_rows)
        return self._settings(
            self._select(list(self._rows), rows, scales + [0.0] * (num_rows - len(rows))),
            ("use_dynamic_bsz", "max_token_len_per_gpu"),
            micro_batch_size_per_gpu=micro_batch_size,
        )

    def replay_shares(self) -> dict[str, float]:
        """Return what was found of replayed rows, over all passes so far, by metric name. Collective."""
        return {} if self._tally is None else self._tally.shares(self.data_group, self.device)

    def _settings(self, data: TensorDict, names: tuple[str, ...] = (), **further: Any) -> TensorDict:
        """Return the rows with what verl's engine reads beside them: the sampling temperature, keys of its own."""
        names = ("use_remove_padding", "use_fused_kernels", *names)
        settings = {name: getattr(self._engine.engine_config, name) for name in names} | further
        tu.assign_non_tensor(data, temperature=self._temperature, **settings)
        return data

    def _autocast(self) -> Any:
        """Return the autocast context that verl's own forward pass runs in; float32 is its sign for none."""
        dtype = attribute_of(self._engine, "_autocast_dtype")
        return nullcontext() if dtype == torch.float32 else torch.autocast(device_type=get_device_name(), dtype=dtype)

    def _micro_batching(self, num_rows: int) -> tuple[int, int | None]:
        """Return (rows to run, rows per micro-batch): verl wants fixed-size micro-batches to divide the batch."""
        limit = self._engine.engine_config.micro_batch_size_per_gpu
        if self._engine.engine_config.use_dynamic_bsz or not limit:
            return num_rows, limit
        num_micro_batches = math.ceil(num_rows / limit)
        micro_batch_size = math.ceil(num_rows / num_micro_batches)
        return num_micro_batches * micro_batch_size, micro_batch_size

    def _select(self, fields: Sequence[str], rows: list[int], scales: Sequence[float] = ()) -> TensorDict:
        """Return the chosen rows, coefficients scaled, filled up with the spare row to as many as there are scales."""
        padded_rows = rows + [self.spare_row] * (len(scales) - len(rows))
        columns = {}
        for name in fields:
            parts = [self._rows[name][row] for row in padded_rows]
            if name == COEFFICIENTS:
                parts = [part * scale for part, scale in zip(parts, scales, strict=True)]
            is_tensor = isinstance(parts[0], Tensor)
            columns[name] = (
                torch.nested.as_nested_tensor(parts, layout=torch.jagged) if is_tensor else NonTensorStack(*parts)
            )
        return TensorDict(columns, batch_size=len(padded_rows))


@contextmanager
def calling_head(root: torch.nn.Module) -> Iterator[None]:
    """Have a model whose forward verl has replaced by fused kernels call its output layer, as it was written to.

    The fused forward reads the layer's weight alone, so that a bias, or what scales or caps logits, is no part of
    training either. Source: verl.models.transformers.dense_common.forward_with_torch_backend.

    Raises: ValueError if the output layer has a bias.
    """
    # verl marks the model that it patches, and replaces the forward of its whole class.
    model: Any = next((module for module in root.modules() if FUSED in vars(module)), None)
    if model is None:
        yield
        return
    if model.lm_head.bias is not None:
        why = "leaves the output layer's bias out, which scores would not"
        refuse("actor_rollout_ref.model.use_fused_kernels", True, why, "set it to False")

    def forward(**inputs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=model.lm_head(model.model(**inputs)[0]))

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


@contextmanager
def scoring_mode(engine: BaseEngine) -> Iterator[None]:
    """Load what the engine offloads, enter train mode (checkpointing is active only there), and undo all of it.

    Raises: ValueError if dropout is active: scores would depend on chance.
    """
    module = module_of(engine)
    require_no_dropout(module)
    with _on_device(engine), leave_no_trace(module), engine.train_mode(disable_auto_offload=True):
        yield


@contextmanager
def reading_mode(engine: BaseEngine) -> Iterator[None]:
    """Load what the engine offloads, enter eval mode for passes without a backward, and undo all of it.

    Dropout is off in it.
    """
    module = module_of(engine)
    with _on_device(engine), leave_no_trace(module):
        with torch.no_grad(), engine.eval_mode(disable_auto_offload=True):
            yield
        # A backward pass would have done it.
        reshard(module)


@contextmanager
def _on_device(engine: BaseEngine) -> Iterator[None]:
    offloads = engine.is_param_offload_enabled
    if offloads:
        engine.to(get_device_name(), model=True, optimizer=False, grad=True)
    try:
        yield
    finally:
        if offloads:
            engine.to("cpu", model=True, optimizer=False, grad=True)
