# SPDX-License-Identifier: Apache-2.0
"""Updates of verl's own, measured while they run: `TrainingWorker.train_mini_batch` with `ppo_loss` on gloo.

actor = Actor(build_engine(root, Setup("fsdp2")), UPDATES["kl"])
with measured_update(actor, direction, data, UpdateRequest("ghost", ProbeConfig())) as measured:
    output = actor.train_mini_batch(data)
reply = measured.reply(output)

Shape legend: R rows of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.profiler import DistProfiler, DistProfilerExtension
from verl.workers.config import FSDPActorConfig
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

from tests.distributed.engines import build_engine
from tests.distributed.observations import differences, local, observe, observe_model
from tests.distributed.scoring import gather, scoring
from tests.distributed.setups import CANDIDATES, WIDE, Setup, reference_model
from tests.distributed.update_rows import LEARNING_RATE, SHUFFLE_SEED, UPDATES, Row, Update, draw_rows
from tests.numerics.problems import TEMPERATURE
from verl_gradalign.config import ProbeConfig
from verl_gradalign.cpu.engines import CpuFSDPEngineWithLMHead
from verl_gradalign.integration.update_measure import UpdateReply, UpdateRequest, measured_update
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.taps import Taps


class Actor(TrainingWorker):
    """verl's worker around an engine that is there already."""

    def __init__(self, engine: CpuFSDPEngineWithLMHead, update: Update) -> None:
        self.engine, self.engine_config, self.model_config = engine, engine.engine_config, engine.model_config
        self.device_name, self.flops_counter = "cpu", None
        DistProfilerExtension.__init__(self, DistProfiler(rank=dist.get_rank(), config=None))
        config = FSDPActorConfig(strategy="fsdp2", rollout_n=4, ppo_micro_batch_size_per_gpu=2, **update.loss)
        self.loss_fn = partial(ppo_loss, config=config)


def update_data(actor: Actor, update: Update, rows: Sequence[Row]) -> TensorDict:
    """Return this rank's share of the rows, with what verl's trainer sends beside them."""
    mine = rows[dist.get_rank() :: dist.get_world_size()]

    def nest(parts: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    columns = {
        "input_ids": nest([torch.cat([row.prompt, row.response]) for row in mine]),
        "position_ids": nest([torch.arange(len(row.prompt) + len(row.response)) for row in mine]),
        "prompts": nest([row.prompt for row in mine]),
        "responses": nest([row.response for row in mine]),
        "response_mask": nest([row.mask_T for row in mine]),
        "loss_mask": nest([row.mask_T for row in mine]),
        "advantages": nest([torch.full_like(row.old_log_prob_T, row.advantage) for row in mine]),
        "old_log_probs": nest([row.old_log_prob_T for row in mine]),
        "ref_log_prob": nest([row.ref_log_prob_T for row in mine]),
    }
    data, mini_batch_size = TensorDict(columns, batch_size=len(mine)), len(rows) // update.num_mini_batches
    tu.assign_non_tensor(
        data,
        calculate_entropy=update.takes_entropy or "use_kl_loss" in update.loss,  # an entropy without weight too
        global_batch_size=mini_batch_size,
        mini_batch_size=mini_batch_size,
        epochs=update.epochs,
        seed=SHUFFLE_SEED,
        dataloader_kwargs={"shuffle": update.shuffles},
        temperature=TEMPERATURE,
        use_remove_padding=actor.engine_config.use_remove_padding,
    )
    return data


def measure_update(root: Path, setup: Setup, name: str) -> dict[str, Any]:
    """Return what a float64 update measured of its rows, in the order of the rows, and what it left behind."""
    update, engine = UPDATES[name], build_engine(root, setup)
    engine.optimizer = torch.optim.SGD(engine.module.parameters(), lr=LEARNING_RATE)
    if setup.strategy.startswith("fsdp-") or setup.strategy == "fsdp":
        engine.optimizer_step = MethodType(step_without_clipping, engine)  # FSDP1 cannot clip in float64
    actor = Actor(engine, update)
    rows = draw_rows(reference_model(root, setup.model, setup.has_adapters))
    direction = _direction(engine)
    before = _traces(engine)
    reply = _measured(actor, direction, update_data(actor, update, rows), UpdateRequest("ghost", ProbeConfig()))
    return {**report(reply, len(rows)), "left": differences(before, _traces(engine))}


def _traces(engine: CpuFSDPEngineWithLMHead, kinds: tuple[str, ...] = ("hooks", "requires_grad")) -> dict[str, Any]:
    return {key: value for key, value in observe(engine).items() if key.split()[0] in kinds}


def _direction(engine: CpuFSDPEngineWithLMHead) -> Direction:
    with scoring(engine, CANDIDATES, "ghost", WIDE) as call:
        return call.direction()


def _measured(actor: Actor, direction: Direction, data: TensorDict, request: UpdateRequest) -> UpdateReply:
    with measured_update(actor, direction, data, request) as measured:
        output = actor.train_mini_batch(data)
    return measured.reply(output)


def report(reply: UpdateReply, num_rows: int) -> dict[str, Any]:
    """Return the rows' numbers in the order in which they were dealt. Collective."""
    replies: list[UpdateReply] = gather(reply)
    numbers = {}
    for key in ("contribution", "derivative"):
        column = torch.full((num_rows,), math.nan, dtype=torch.float64)
        for rank, each in enumerate(replies):
            column[rank :: len(replies)] = getattr(each, f"{key}_R")
        numbers[key] = column.tolist()
    return {**numbers, "diagnostics": dict(reply.diagnostics), "exact_sum_error": reply.exact_sum_error}


def step_without_clipping(engine: CpuFSDPEngineWithLMHead) -> float:
    """Take verl's optimizer step but for the clipping; return the gradient's norm. Collective."""
    grads = [local(parameter.grad) for parameter in engine.module.parameters() if parameter.grad is not None]
    squared = torch.stack([torch.zeros(()).double(), *(grad.double().square().sum() for grad in grads)]).sum()
    dist.all_reduce(squared, group=engine.device_mesh["fsdp"].get_group())
    engine.optimizer.step()
    return squared.sqrt().item()


def measure_update_neutrality(root: Path, setup: Setup) -> dict[str, Any]:
    """Return what differs after measured updates from the same updates without taps, bit by bit.

    Whole and cut, with both read at once, and after an update that failed in a tap.
    """
    update, measured = UPDATES["mini-batches"], {}
    undisturbed, engine = (build_engine(root, setup) for _ in range(2))
    actors = [Actor(each, update) for each in (undisturbed, engine)]
    rows = draw_rows(reference_model(root, setup.model, has_adapters=False))
    rows = [_float32(row) for row in rows]
    direction = _direction(engine)
    # Both first: after an update or two most of these rows are clipped, and contribute nothing.
    requests = {
        "both": UpdateRequest("low_rank", ProbeConfig(rank=4), is_audited=True),
        "whole": UpdateRequest("ghost", ProbeConfig()),
        "cut": UpdateRequest("low_rank", ProbeConfig(rank=4)),
    }
    for name, request in requests.items():
        outputs = [actor.train_mini_batch(update_data(actor, update, rows)) for actor in actors[:1]]
        reply = _measured(actors[1], direction, update_data(actors[1], update, rows), request)
        differs = differences(observe_model(undisturbed), observe_model(engine))
        measured[name] = {
            **report(reply, len(rows)),
            "differs": sorted({key for keys in gather(differs) for key in keys}),
        }
        assert tu.get(outputs[0], "metrics")["grad_norm"], "verl took a step"
    measured["failed"] = _failing(actors[1], direction, update_data(actors[1], update, rows))
    return measured


def _failing(actor: Actor, direction: Direction, data: TensorDict) -> dict[str, Any]:
    """Return what an update leaves behind that fails in its second micro-batch's backward pass."""
    before, loss_fn, receive, calls = _traces(actor.engine, ("hooks",)), actor.loss_fn, Taps._receive, 0

    def failing(self: Taps, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise ArithmeticError
        receive(self, *args)

    Taps._receive = failing  # type: ignore[method-assign]
    try:
        _measured(actor, direction, data, UpdateRequest("ghost", ProbeConfig()))
        has_failed = False
    except ArithmeticError:
        has_failed = True
    finally:
        Taps._receive = receive  # type: ignore[method-assign]
    return {
        "has_failed": has_failed,
        "left": differences(before, _traces(actor.engine, ("hooks",))),
        "has_own_loss": actor.loss_fn is loss_fn,
        "optimizer_hooks": len(actor.engine.optimizer._optimizer_step_pre_hooks),
    }


def _float32(row: Row) -> Row:
    """Return the row with log-probs as verl has them."""
    return Row(
        row.prompt, row.response, row.mask_T, row.advantage, row.old_log_prob_T.float(), row.ref_log_prob_T.float()
    )
