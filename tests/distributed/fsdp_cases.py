# SPDX-License-Identifier: Apache-2.0
"""What the processes of tests/distributed/test_fsdp.py run: verl's own engine on gloo, scored and observed.

    python -m tests.distributed.fsdp_cases RANK WORLD_SIZE FOLDER

Every rank runs every case in one order. Rank 0 writes FOLDER/results-WORLD_SIZE.json: {case: what it measured}.

Shape legend: P problems.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from tests.numerics.problems import (
    TEMPERATURE,
    Problem,
    draw_problem,
    expected_scores,
    load_float64,
    make_float64,
)
from verl_gradalign.cpu.engines import CpuFSDPEngineWithLMHead
from verl_gradalign.integration import engine as adapter
from verl_gradalign.integration.dealing import ProblemKeys, build_shares, deal, owners_of
from verl_gradalign.integration.engine import COEFFICIENTS, VerlEngine, coefficient_loss, scoring_mode
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.planning import TokenBudget
from verl_gradalign.types import ProblemRows, TokenRow

STRATEGIES = {"fsdp": ("fsdp", False), "fsdp-orig": ("fsdp", True), "fsdp2": ("fsdp2", False)}
"""Name -> (verl's strategy, use_orig_params)."""
MODELS = {"qwen2": ("qwen2", True), "qwen3": ("qwen3", False)}
"""Name -> (architecture, tied embeddings)."""
BATCHINGS: dict[str, dict[str, Any]] = {
    "fixed": {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2},
    "dynamic": {"use_dynamic_bsz": True, "max_token_len_per_gpu": 16},
}
INTERRUPTIONS = {"raises-at-once": 0, "raises-between": 1, "raises-late": 7}
"""Name -> calls of the scoring loss that succeed before one raises. The direction's pass has three micro-batches or
more, so `raises-between` cuts it while its gradients are not synchronised yet; `raises-late` cuts a candidate's."""
SCORINGS = (
    ("scored", False),
    ("scored", True),
    ("raises-at-once", False),
    ("raises-between", False),
    ("raises-between", True),
    ("raises-late", True),
    ("raises-in-backward", False),
    ("raises-in-backward", True),
)
"""(what happens, whether a gradient lies there before)."""
NEUTRALITY = (("plain", "fp32", "qwen2"), ("checkpointed", "fp32", "qwen2"), ("checkpointed", "bf16", "qwen3"))
"""(checkpointing, dtype, model). Not fp64: FSDP1's gradient clipping refuses it. bf16 is run untied, because FSDP1 on
one rank cannot train tied bf16 weights that keep their original parameters."""
MODES = {"plain": False, "checkpointed": True}
TRUSTED = [draw_problem(lengths, seed) for seed, lengths in enumerate([[5, 3, 4], [4, 6, 2, 3, 8]], 10)]
CANDIDATES = [
    draw_problem(lengths, seed) for seed, lengths in enumerate([[7, 1, 4, 3, 3], [3], [6, 6], [1, 5, 2, 4, 8, 2]], 20)
]


class Float64Engine(CpuFSDPEngineWithLMHead):
    """verl's engine with a float64 model, which its configuration has no name for."""

    def _build_module(self) -> nn.Module:
        return make_float64(super()._build_module())


class Interruption(Exception):
    """Raised in the middle of a scoring pass."""


def build_engine(
    folder: Path, strategy: str, has_checkpointing: bool, batching: str, dtype: str
) -> CpuFSDPEngineWithLMHead:
    """Return a new engine as a worker builds it, computing in `dtype`: fp64, fp32 or bf16 (verl's default)."""
    name, use_orig_params = STRATEGIES[strategy]
    is_float64 = dtype == "fp64"
    reduce_dtype = "fp32" if dtype == "bf16" else dtype
    engine_class = Float64Engine if is_float64 else CpuFSDPEngineWithLMHead
    engine = engine_class(
        model_config=HFModelConfig(
            path=str(folder),
            load_tokenizer=False,
            override_config={"attn_implementation": "sdpa"},
            enable_gradient_checkpointing=has_checkpointing,
            use_remove_padding=False,
        ),
        engine_config=FSDPEngineConfig(
            strategy=name,
            use_orig_params=use_orig_params,
            use_remove_padding=False,
            use_torch_compile=False,
            mixed_precision={"param_dtype": dtype, "reduce_dtype": reduce_dtype, "buffer_dtype": reduce_dtype},
            **BATCHINGS[batching],
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    # Only the name of the dtype is replaced; wrapping, sharding and reduction are verl's.
    names = mock.patch.object(PrecisionType, "to_dtype", return_value=torch.float64) if is_float64 else nullcontext()
    with names:
        engine.initialize()
    if is_float64:
        engine._autocast_dtype = torch.float32  # verl's sign for "no autocast"
    return engine


def tabulate_dealt(
    trusted: list[Problem], candidates: list[Problem], estimator: str, budget: TokenBudget
) -> tuple[TensorDict, tuple[ProblemRows, ...], tuple[ProblemRows, ...]]:
    """Return this rank's row table, spare row last, and its shares, dealt as the selector deals them."""
    responses: dict[str, TokenRow] = {}
    tables = []
    for kind, problems in (("t", trusted), ("c", candidates)):
        table = []
        for index, problem in enumerate(problems):
            keys = [f"{kind}{index}_{k}_0" for k in range(len(problem))]
            responses.update(zip(keys, problem, strict=True))
            table.append(ProblemKeys(f"{kind}{index}", tuple(keys), tuple(row.num_tokens for row in problem)))
        tables.append(table)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    owners = [[None] * len(tables[0]), owners_of(tables[1], estimator, budget, world_size)]
    dealt = [deal(*pair, world_size)[rank] for pair in zip(tables, owners, strict=True)]
    spare = min(responses, key=lambda key: responses[key].num_tokens)
    keys = [key for mine in dealt for keys in mine for key in keys if key != spare] + [spare]
    positions = {key: position for position, key in enumerate(keys)}
    trusted_shares, candidate_shares = (build_shares(*pair, positions) for pair in zip(tables, dealt, strict=True))
    return make_row_table([responses[key] for key in keys]), trusted_shares, candidate_shares


def make_row_table(responses: list[TokenRow]) -> TensorDict:
    def nest(parts: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    mask = [torch.ones_like(response.response) for response in responses]
    fields = {
        "input_ids": nest([torch.cat([response.prompt, response.response]) for response in responses]),
        "position_ids": nest([torch.arange(response.num_tokens) for response in responses]),
        "prompts": nest([response.prompt for response in responses]),
        "responses": nest([response.response for response in responses]),
        "response_mask": nest(mask),
        "loss_mask": nest(mask),
        COEFFICIENTS: nest([response.coefficient for response in responses]),
    }
    return TensorDict(fields, batch_size=len(responses))


def score(
    engine: CpuFSDPEngineWithLMHead, candidates: list[Problem], estimator: str = "backward", max_tokens: int = 200
) -> dict[str, Any]:
    """Return the scores of `candidates` along the direction of TRUSTED, and whether all ranks found the same."""
    budget = TokenBudget(max_tokens, is_padded=not engine.engine_config.use_remove_padding)
    rows, trusted_shares, candidate_shares = tabulate_dealt(TRUSTED, candidates, estimator, budget)
    with scoring_mode(engine):
        probe = VerlEngine(engine, rows, TEMPERATURE, budget)
        direction = compute_direction(probe, trusted_shares)
        scores = ESTIMATORS[estimator]().score(probe, candidate_shares, direction)
    norm_P = scores.dot_P if scores.norm_P is None else scores.norm_P
    mine = {
        "dot": scores.dot_P.tolist(),
        "norm": norm_P.tolist(),
        "direction_norm": scores.direction_norm,
        "num_tokens": scores.num_tokens_P.tolist(),
    }
    return {**mine, "ranks_agree": all(other == mine for other in gather(mine))}


def measure_exactness(folder: Path, strategy: str, has_checkpointing: bool) -> dict[str, Any]:
    """Return scores under every batching and with the problems in another order, beside the oracle's."""
    dot_P, norm_P, direction_norm = expected_scores(load_float64(folder), TRUSTED, CANDIDATES)
    measured: dict[str, Any] = {
        "expected": {"dot": dot_P.tolist(), "norm": norm_P.tolist(), "direction_norm": direction_norm}
    }
    for batching in BATCHINGS:
        engine = build_engine(folder, strategy, has_checkpointing, batching, "fp64")
        measured[batching] = score(engine, CANDIDATES)
        for name in ESTIMATORS:
            for mt in (80,):
                r = score(engine, CANDIDATES, name, mt)
                e = (
                    (torch.tensor(r["dot"], dtype=torch.float64) / dot_P - 1).abs().max().item(),
                    (torch.tensor(r["norm"], dtype=torch.float64) / norm_P - 1).abs().max().item(),
                )
                print("ERR", strategy, has_checkpointing, batching, name, mt, e, r["ranks_agree"], flush=True)
    turned = score(engine, CANDIDATES[::-1])
    for key in ("dot", "norm", "num_tokens"):
        turned[key].reverse()
    measured["turned"] = turned
    return measured


def train_data(engine: CpuFSDPEngineWithLMHead, seed: int) -> TensorDict:
    """Return this rank's batch for one training step: four rows that no problem scored has."""
    lengths = [3, 6, 2, 5]
    rows = make_row_table(draw_problem(lengths, seed=100 + 10 * seed + dist.get_rank(), advantage_scale=5.0))
    config = engine.engine_config
    tu.assign_non_tensor(
        rows,
        temperature=1.0,
        use_remove_padding=False,
        use_fused_kernels=False,
        use_dynamic_bsz=config.use_dynamic_bsz,
        max_token_len_per_gpu=config.max_token_len_per_gpu,
        micro_batch_size_per_gpu=config.micro_batch_size_per_gpu,
    )
    return rows


def train(engine: CpuFSDPEngineWithLMHead, seed: int) -> None:
    with engine.train_mode():
        engine.train_batch(train_data(engine, seed), coefficient_loss)


def accumulate(engine: CpuFSDPEngineWithLMHead, seed: int) -> None:
    """Run a training pass and keep its gradient."""
    with engine.train_mode(zero_grad_on_exit=False):
        engine.forward_backward_batch(train_data(engine, seed), coefficient_loss)


def finish_step(engine: CpuFSDPEngineWithLMHead) -> None:
    with engine.train_mode():
        engine.optimizer_step()


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def observe(engine: CpuFSDPEngineWithLMHead) -> dict[str, Any]:
    """Return everything that scoring must leave alone, tensors as copies of this rank's shards."""
    module, seen = engine.module, {}
    for name, parameter in module.named_parameters():
        seen[f"parameter {name}"] = local(parameter).clone()
        seen[f"gradient {name}"] = None if parameter.grad is None else local(parameter.grad).clone()
        seen[f"gradient object {name}"] = None if parameter.grad is None else id(parameter.grad)
        seen[f"requires_grad {name}"] = parameter.requires_grad
        for key, value in engine.optimizer.state[parameter].items():
            seen[f"optimizer {key} {name}"] = local(value).clone() if isinstance(value, Tensor) else value
    for name, buffer in module.named_buffers():
        seen[f"buffer {name}"] = local(buffer).clone()
    for name, submodule in module.named_modules():
        seen[f"training {name}"] = submodule.training
    seen["torch generator"] = torch.get_rng_state()
    seen["numpy generator"] = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    seen["python generator"] = random.getstate()
    return seen


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what is not bit-identical."""
    changed = sorted(before.keys() ^ after.keys())
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if isinstance(old, Tensor) and isinstance(new, Tensor):
            same = old.dtype == new.dtype and old.shape == new.shape and old.numpy().tobytes() == new.numpy().tobytes()
        else:
            same = old is new or (not isinstance(old, Tensor) and not isinstance(new, Tensor) and old == new)
        if not same:
            changed.append(key)
    return changed


def parameters_only(seen: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in seen.items() if key.startswith(("parameter", "optimizer", "buffer"))}


@contextmanager
def interrupted_loss(num_calls: int) -> Iterator[None]:
    """Let the scoring loss raise, on every rank, after `num_calls` calls."""
    calls = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        random.random(), np.random.rand(), torch.rand(1)
        if calls > num_calls:
            raise Interruption
        return coefficient_loss(*args, **kwargs)

    with mock.patch.object(adapter, "coefficient_loss", failing):
        yield


@contextmanager
def interrupted_backward(module: nn.Module) -> Iterator[None]:
    """Let the second backward pass raise, on every rank, when it reaches the first decoder layer's output."""
    calls = 0

    def fail_second_time(_grad: Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Interruption

    def watch(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(fail_second_time)

    layer = next(child for name, child in module.named_modules() if name.endswith("layers.0"))
    handle = layer.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def score_interrupted(engine: CpuFSDPEngineWithLMHead, name: str) -> None:
    is_backward = name == "raises-in-backward"
    with interrupted_backward(engine.module) if is_backward else interrupted_loss(INTERRUPTIONS[name]):
        try:
            score(engine, CANDIDATES)
        except Interruption:
            return
    raise AssertionError("scoring was not interrupted")


def measure_neutrality(folder: Path, strategy: str, has_checkpointing: bool, dtype: str) -> dict[str, Any]:
    """Return, for each way of scoring, what it changed at once and what differs after the next training step."""

    def prepare() -> CpuFSDPEngineWithLMHead:
        torch.manual_seed(0)
        engine = build_engine(folder, strategy, has_checkpointing, "fixed", dtype)
        train(engine, seed=0)  # fills the optimizer's state
        engine.module.eval()  # not what scoring runs in
        return engine

    undisturbed = prepare()
    train(undisturbed, seed=1)
    reference = parameters_only(observe(undisturbed))
    values = [value for value in reference.values() if isinstance(value, Tensor)]
    assert all(value.isfinite().all() for value in values), "the undisturbed run diverged"
    measured: dict[str, Any] = {}
    for name, has_gradient in SCORINGS:
        engine = prepare()
        if has_gradient:
            accumulate(engine, seed=1)
        before = observe(engine)
        assert has_gradient == any(value is not None for key, value in before.items() if key.startswith("gradient"))
        if name == "scored":
            score(engine, CANDIDATES)
        else:
            score_interrupted(engine, name)
        changed = differences(before, observe(engine))
        if has_gradient:
            finish_step(engine)
        else:
            train(engine, seed=1)
        after_step = differences(reference, parameters_only(observe(engine)))
        measured[f"{name}-{'with' if has_gradient else 'without'}-gradient"] = {
            "changed": sorted({key for keys in gather(changed) for key in keys}),
            "differs_after_step": sorted({key for keys in gather(after_step) for key in keys}),
        }
    return measured


def gather(value: Any) -> list[Any]:
    """Return `value` of every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def list_cases(root: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return {name: case}; model folders lie under `root` by the names in MODELS."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for strategy in STRATEGIES:
        for mode, has_checkpointing in MODES.items():
            for model in MODELS:
                cases[f"exact-{strategy}-{mode}-{model}"] = partial(
                    measure_exactness, root / model, strategy, has_checkpointing
                )
        for mode, dtype, model in NEUTRALITY:
            cases[f"neutral-{strategy}-{mode}-{dtype}"] = partial(
                measure_neutrality, root / model, strategy, MODES[mode], dtype
            )
    return cases


def main(rank: int, world_size: int, root: Path, only: str = "") -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/store-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    results: dict[str, Any] = {}
    for name, case in list_cases(root).items():
        if only not in name:
            continue
        started = time.perf_counter()
        try:
            results[name] = case()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        results[name]["seconds"] = time.perf_counter() - started
        if rank == 0:
            (root / f"results-{world_size}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
