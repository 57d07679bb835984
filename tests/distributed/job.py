# SPDX-License-Identifier: Apache-2.0
"""One rank of test_scores.py and test_neutrality.py: runs every case in one process group and saves what it found.

python -m tests.distributed.job RANK WORLD_SIZE FOLDER
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig
from verl.workers.utils.losses import ppo_loss

from tests.distributed.problems import MODELS, NUM_TRUSTED, TEMPERATURE
from tests.distributed.verl_engines import Case, build_engine, nested, row_table
from tests.numerics.float64_model import build_float64_model
from verl_gradalign.integration import engine as integration
from verl_gradalign.integration.engine import VerlEngine, scoring_mode
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators.backward import BackwardEstimator

STRATEGIES = {
    "fsdp1": Case(strategy="fsdp"),
    "fsdp1-orig": Case(strategy="fsdp", use_orig_params=True),
    "fsdp2": Case(strategy="fsdp2"),
}
INTERRUPTIONS = ("none", "loss", "backward")


def exactness_cases() -> dict[str, Case]:
    """Return every way of running the engine whose scores must be the oracle's."""
    cases = {}
    for name, case in STRATEGIES.items():
        cases[f"{name}/checkpointing"] = case
        cases[f"{name}/no-checkpointing"] = replace(case, checkpointing=False)
        cases[f"{name}/large-budget"] = replace(case, max_token_len=512)
        cases[f"{name}/fixed-1"] = replace(case, use_dynamic_bsz=False, micro_batch_size=1)
        cases[f"{name}/fixed-3"] = replace(case, use_dynamic_bsz=False, micro_batch_size=3)
        cases[f"{name}/packed"] = replace(case, use_remove_padding=True, max_token_len=64)
        cases[f"{name}/no-reshard"] = replace(case, reshard_after_forward=False)
        cases[f"{name}/sync-each"] = replace(case, defers_sync=False)
        cases[f"{name}/offload"] = replace(case, param_offload=True)
        cases[f"{name}/qwen3-untied"] = replace(case, architecture="qwen3", tied=False)
    cases["fsdp2/hsdp"] = replace(STRATEGIES["fsdp2"], fsdp_size=1)
    return cases


def score(case: Case, paths: dict[str, str], is_reversed: bool = False) -> dict[str, Any]:
    engine = build_engine(case, paths[case.architecture])
    rows, problems = row_table()
    with scoring_mode(engine):
        probe = VerlEngine(engine, rows, TEMPERATURE)
        direction = compute_direction(probe, problems[:NUM_TRUSTED])
        scores = BackwardEstimator().score(probe, problems[::-1] if is_reversed else problems, direction)
    order = slice(None) if not is_reversed else list(range(len(problems)))[::-1]
    return {
        "dot": scores.dot_P[order],
        "norm": scores.norm_P[order],
        "cosine": (scores.dot_P / scores.norm_P)[order],
        "direction_norm": torch.tensor(scores.direction_norm, dtype=torch.float64),
    }


def train_step(engine: Any, seed: int) -> None:
    """Run verl's `train_batch` with its own PPO loss, and leave the gradients in place."""
    rows, _ = row_table()
    config = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    # As many rows on every rank, as verl deals them.
    data = tu.index_select_tensor_dict(rows, list(range(8)))
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    lengths = data["responses"].offsets().diff().tolist()
    data["advantages"] = nested([torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths])
    data["old_log_probs"] = nested([torch.full((n,), -4.0, dtype=torch.float64) for n in lengths])
    tu.assign_non_tensor(
        data,
        temperature=TEMPERATURE,
        use_remove_padding=engine.engine_config.use_remove_padding,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=engine.engine_config.max_token_len_per_gpu,
        use_fused_kernels=False,
        global_batch_size=8 * dist.get_world_size(),
    )
    with engine.train_mode(zero_grad_on_exit=False):
        engine.train_batch(data, functools.partial(ppo_loss, config))
    engine.lr_scheduler_step()


def infer(engine: Any) -> None:
    """Run verl's log-prob pass, which leaves the FSDP root unsharded."""
    rows, _ = row_table()
    config = engine.engine_config
    tu.assign_non_tensor(
        rows,
        temperature=TEMPERATURE,
        use_remove_padding=config.use_remove_padding,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=512,
        use_fused_kernels=False,
    )
    with engine.eval_mode():
        engine.infer_batch(rows)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _parameters(engine: Any) -> list[torch.nn.Parameter]:
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def snapshot(engine: Any) -> dict[str, Any]:
    """Return a copy of everything that scoring must leave alone."""
    parameters = _parameters(engine)
    state = {
        f"{index}.{key}": _local(value).clone()
        for index, parameter in enumerate(parameters)
        for key, value in engine.optimizer.state[parameter].items()
    }
    return {
        "parameters": [_local(p.detach()).clone() for p in parameters],
        "optimizer": state,
        "gradients": [None if p.grad is None else _local(p.grad).clone() for p in parameters],
        "gradient_objects": [id(p.grad) for p in parameters],
        "requires_grad": [p.requires_grad for p in parameters],
        "training": [module.training for module in engine.module.modules()],
        "mode": engine.mode,
        "schedule": copy.deepcopy(engine.lr_scheduler.state_dict()),
        "generators": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state()),
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two snapshots are bit-identical."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class Interrupted(Exception):
    """Raised on purpose inside a scoring pass."""


@contextlib.contextmanager
def interruption(where: str) -> Iterator[None]:
    """Make the third micro-batch of a scoring pass fail, in the loss or in the middle of its backward pass."""
    original, calls = integration.coefficient_loss, 0

    def failing_loss(model_output: dict[str, Any], data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict]:
        nonlocal calls
        calls += 1
        if calls == 3 and where == "loss":
            raise Interrupted
        return original(model_output, data, dp_group)

    def fail(_grad: torch.Tensor) -> torch.Tensor:
        raise Interrupted

    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if where == "backward" and calls == 2 and output.requires_grad:
            output.register_hook(fail)

    integration.coefficient_loss = failing_loss
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: hook(module, inputs, output) if type(module).__name__ == "Qwen2MLP" else None
    )
    try:
        yield
    finally:
        integration.coefficient_loss = original
        handle.remove()


def run_scoring(engine: Any, where: str) -> bool:
    """Score once, interrupted as told; return whether it was."""
    rows, problems = row_table()
    try:
        with interruption(where), scoring_mode(engine):
            torch.rand(3), random.random(), np.random.rand()
            probe = VerlEngine(engine, rows, TEMPERATURE)
            direction = compute_direction(probe, problems)
            BackwardEstimator().score(probe, problems, direction)
    except Interrupted:
        return True
    return False


def neutrality(case: Case, paths: dict[str, str], where: str) -> dict[str, bool]:
    """Return which snapshots are bit-identical with and without scoring between two training steps."""
    # FSDP1 cannot clip float64 gradients; bits are bits in float32 too.
    case = replace(case, dtype=torch.float32)
    after = {}
    report = {}
    for is_scored in (False, True):
        engine = build_engine(case, paths[case.architecture])
        train_step(engine, seed=1)
        infer(engine)
        if is_scored:
            before = snapshot(engine)
            report["interrupted"] = run_scoring(engine, where)
            found = snapshot(engine)
            report |= {key: same(before[key], found[key]) for key in before}
        train_step(engine, seed=2)
        after[is_scored] = snapshot(engine)
    for key in ("parameters", "optimizer", "gradients"):
        report[f"next step's {key}"] = same(after[False][key], after[True][key])
    report["training changes parameters"] = not same(before["parameters"], after[True]["parameters"])
    return report


def refusals(paths: dict[str, str]) -> dict[str, str]:
    """Return the message of the error that dropout gives."""
    engine = build_engine(Case(), paths["qwen2"])
    engine.module.model.layers[1].self_attn.attention_dropout = 0.1
    try:
        with scoring_mode(engine):
            return {"dropout": ""}
    except ValueError as error:
        return {"dropout": str(error)}


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    paths = {architecture: str(folder / f"{architecture}-{rank}") for architecture, _ in MODELS}
    for architecture, tied in MODELS:
        config = build_float64_model(architecture, tied).config
        # transformers names the architecture only when it saves weights, and verl insists on it.
        config.architectures = [f"{architecture.capitalize()}ForCausalLM"]
        config.save_pretrained(paths[architecture])
    results: dict[str, Any] = {}

    def attempt(name: str, run: Callable[[], Any]) -> None:
        try:
            results[name] = run()
        except Exception:
            # Not fatal: an error that all ranks share must not hide the other cases.
            results[name] = traceback.format_exc()
        torch.save(results, folder / f"results-{rank}.pt")

    for name, case in exactness_cases().items():
        if only:
            continue
        attempt(f"score/{name}", functools.partial(score, case, paths))
    attempt("score/fsdp2/reversed", functools.partial(score, STRATEGIES["fsdp2"], paths, is_reversed=True))
    for name, case in STRATEGIES.items():
        for where in INTERRUPTIONS:
            attempt(f"neutrality/{name}/{where}", functools.partial(neutrality, case, paths, where))
    attempt("refusals", functools.partial(refusals, paths))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
