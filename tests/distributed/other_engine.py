# SPDX-License-Identifier: Apache-2.0
"""An engine of verl's BaseEngine alone, as torchtitan's and automodel's are, and what is measured on it.

It has what BaseEngine promises, a module and a configuration, and none of what the FSDP engine has beside. Its pass is
made of what verl's torchtitan and automodel engines make theirs of: verl's micro-batches, log-probs and outputs,
torch's fully_shard, an autocast that leaves float64 alone. The model is of transformers; torchtitan has its own.

    engine = OtherEngine(root, OTHERS["torchtitan"])
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.config import AutomodelEngineConfig, EngineConfig, TorchtitanEngineConfig
from verl.workers.engine.base import BaseEngine, BaseEngineCtx
from verl.workers.engine.utils import detach_tree, postprocess_batch_func, prepare_micro_batches

from tests.distributed.engines import BATCHINGS
from tests.distributed.observations import differences, observe
from tests.distributed.scoring import gather, report, scoring
from tests.distributed.setups import CANDIDATES, LEARNING_RATE, OTHERS, TRUSTED, WIDE, Other
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, load_float64
from verl_gradalign.config import ProbeConfig
from verl_gradalign.integration.engine import module_of
from verl_gradalign.probe import direction_file
from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.direction_gather import DirectionGather
from verl_gradalign.probe.fsdp import sharding_group, trainable_placements


class OtherEngine(BaseEngine):
    """verl's contract on torch's fully_shard."""

    def __init__(self, root: Path, other: Other) -> None:
        super().__init__()
        model, num_ranks = load_float64(root / other.model, has_checkpointing=True), dist.get_world_size()
        shape, names = ((num_ranks, 1), ("replicate", "shard")) if other.is_replicated else ((num_ranks,), ("dp",))
        self._mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=self._mesh)
        self.mode = None
        self.module = [model] if other.is_in_list else model
        self.engine_config = config_of(other)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)

    @property
    def is_param_offload_enabled(self) -> bool:
        return False

    @property
    def is_optimizer_offload_enabled(self) -> bool:
        return False

    def train_mode(self, **kwargs: Any) -> Any:
        return Mode(self, mode="train", **kwargs)

    def eval_mode(self, **kwargs: Any) -> Any:
        return Mode(self, mode="eval", **kwargs)

    def optimizer_zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def get_data_parallel_size(self) -> int:
        return dist.get_world_size()

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_data_parallel_group(self) -> Any:
        return dist.group.WORLD

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True

    def forward_backward_batch(self, data: TensorDict, loss_function: Callable[..., Any], forward_only: bool = False):  # noqa: ANN201
        num_tokens = data["loss_mask"].sum()
        dist.all_reduce(num_tokens, group=self.get_data_parallel_group())
        tu.assign_non_tensor(data, batch_num_tokens=num_tokens.item(), dp_size=self.get_data_parallel_size())
        batches, indices = prepare_micro_batches(data=data, dp_group=self.get_data_parallel_group())
        outputs, root = [], module_of(self)
        for number, batch in enumerate(batches):
            # automodel puts the reduction of gradients off to the last micro-batch, torchtitan does not.
            root.set_requires_gradient_sync(number == len(batches) - 1 or isinstance(self.module, list))
            with torch.set_grad_enabled(not forward_only):
                loss, output = self._forward_step(batch, loss_function)
            if not forward_only:
                loss.backward()
            outputs.append(output)
        return postprocess_batch_func(output_lst=outputs, indices=indices, data=data)

    def _forward_step(
        self, batch: TensorDict, loss_function: Callable[..., Any] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
            output = {"log_probs": self._log_probs(batch)}
            loss, metrics = torch.tensor(1.0), {}
            if loss_function is not None:
                loss, metrics = loss_function(model_output=output, data=batch, dp_group=self.get_data_parallel_group())
        return loss, {"model_output": detach_tree(output), "loss": loss.item(), "metrics": metrics}

    def _log_probs(self, batch: TensorDict) -> Tensor:
        """Return log-probs of all tokens but each row's first, as both engines take them: labels rolled, then cut."""
        ids, positions = batch["input_ids"], batch["position_ids"]
        labels, lengths = torch.roll(ids.values(), shifts=-1), ids.offsets().diff()
        inputs: dict[str, Any]
        if tu.get_non_tensor_data(data=batch, key="use_remove_padding", default=True):
            inputs = {"input_ids": ids.values().unsqueeze(0), "position_ids": positions.values().unsqueeze(0)}
            logits = module_of(self)(**inputs, attention_mask=None, use_cache=False).logits.squeeze(0)
        else:
            mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
            inputs = {"input_ids": ids.to_padded_tensor(0), "position_ids": positions.to_padded_tensor(0)}
            logits = module_of(self)(**inputs, attention_mask=mask, use_cache=False).logits[mask.bool()]
        log_probs = logprobs_from_logits(logits=logits / batch["temperature"], labels=labels)
        return torch.nested.nested_tensor_from_jagged(log_probs, ids.offsets())


class Mode(BaseEngineCtx):
    """What torchtitan's and automodel's contexts do."""

    engine: OtherEngine

    def __enter__(self) -> None:
        super().__enter__()
        module_of(self.engine).train(self.mode == "train")

    def __exit__(self, *exception: Any) -> None:
        if self.mode == "eval":
            module_of(self.engine).reshard()
        elif self.zero_grad_on_exit or exception[0] is not None:
            self.engine.optimizer_zero_grad()
        super().__exit__(*exception)


def config_of(other: Other) -> EngineConfig:
    options: dict[str, Any] = {"use_remove_padding": other.is_packed, **BATCHINGS[other.has_fixed_batches]}
    if other.is_in_list:
        return TorchtitanEngineConfig(data_parallel_shard_size=dist.get_world_size(), **options)
    return AutomodelEngineConfig(**options)


def measure_other(root: Path, name: str) -> dict[str, Any]:
    """Return scores by each way that needs no more than BaseEngine, the direction's error, what they changed."""
    other = OTHERS[name]
    engine, measured = OtherEngine(root, other), {}
    module = module_of(engine)
    expected = oracle_direction(root, other.model)
    for parameter in module.parameters():
        # Not a training step: the scores are compared with the model's as it was.
        parameter.grad = torch.ones_like(parameter)
        state = engine.optimizer.state[parameter]
        state["step"], state["exp_avg"], state["exp_avg_sq"] = (
            1.0,
            torch.ones_like(parameter),
            torch.ones_like(parameter),
        )
    module.eval()
    before = observe(engine)
    for estimator in ("backward", "finite_difference"):
        with scoring(engine, CANDIDATES, estimator, WIDE) as call:
            direction = call.direction()
            measured[estimator] = report(call.score(direction, ProbeConfig(relative_step=2e-5)))
            if estimator == "backward":
                measured["direction_error"] = largest_difference(module, direction, expected)
                measured["is_restored"] = all(
                    gather(is_restored(module, direction, root / f"{name}-{dist.get_rank()}"))
                )
    # Of one problem one of two ranks has no rows.
    with scoring(engine, CANDIDATES[:1], "finite_difference", WIDE) as call:
        measured["alone"] = report(call.score(direction, ProbeConfig(relative_step=2e-5)))
    measured["changed"] = sorted({key for keys in gather(differences(before, observe(engine))) for key in keys})
    return measured | refusals_of(engine, direction)


def refusals_of(engine: OtherEngine, direction: Direction) -> dict[str, str]:
    """Return what is said where an engine lacks something, or cuts its model otherwise; "" where nothing is."""
    parts = nn.ParameterDict({"cut": next(module_of(engine).parameters()), "whole": nn.Parameter(torch.ones(3))})
    stages = SimpleNamespace(module=[nn.Linear(2, 2), nn.Linear(2, 2)])

    def score_ghost() -> None:
        with scoring(engine, CANDIDATES, "ghost", WIDE) as call:
            call.score(direction)

    found = {}
    for name, action in {
        "ghost": score_ghost,
        "mixed": lambda: sharding_group(parts),
        "stages": lambda: module_of(stages),
        "empty": lambda: module_of(SimpleNamespace()),
    }.items():
        try:
            action()
            found[name] = ""
        except ValueError as error:
            found[name] = str(error)
    return found


def oracle_direction(root: Path, model: str) -> dict[str, Tensor]:
    """Return float64 autograd's unit direction of TRUSTED, by parameter."""
    module: nn.Module = load_float64(root / model)
    direction_G = torch.stack(problem_gradients_float64(module, TRUSTED, TEMPERATURE)).sum(0)
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    parts = torch.split(direction_G / direction_G.norm(), [parameter.numel() for _, parameter in named])
    return {name: part.view_as(parameter) for (name, parameter), part in zip(named, parts, strict=True)}


def largest_difference(module: nn.Module, direction: Direction, expected: dict[str, Tensor]) -> float:
    """Return the largest difference of a number of the gathered direction, which has length 1, from the oracle's."""
    together = DirectionGather(module, direction, torch.device("cpu"))
    uses = {use.name: together(use) for use in trainable_placements(module)}
    return max((uses[name] - part).abs().max().item() for name, part in expected.items())


def is_restored(module: nn.Module, direction: Direction, path: Path) -> bool:
    """Return whether a direction comes back from its file, bit for bit."""
    direction_file.save_direction(module, direction, path)
    loaded = direction_file.load_direction(module, path)
    return all(torch.equal(*pair) for pair in zip(loaded.shards, direction.shards, strict=True))
