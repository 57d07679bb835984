# SPDX-License-Identifier: Apache-2.0
"""What the processes of tests/distributed/conftest.py run: verl's own engines on gloo, scored and observed.

    python -m tests.distributed.fsdp_cases RANK WORLD_SIZE FOLDER [PART OF THE CASES' NAMES]

Every rank runs every case in one order. Rank 0 writes FOLDER/results-WORLD_SIZE.json: {case: what it measured}.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import astuple
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM

from tests.benchmarks.counting import peak_bytes
from tests.distributed.engines import build_engine, train_without_clipping
from tests.distributed.images import MODELS as VISION_MODELS
from tests.distributed.images import measure_images
from tests.distributed.neutrality import measure_neutrality
from tests.distributed.observations import CollectiveCounter
from tests.distributed.other_engine import measure_other
from tests.distributed.replay import measure_replay
from tests.distributed.scoring import gather, read, report, score, scoring, tight_budget
from tests.distributed.setups import (
    ADVANTAGES,
    CANDIDATES,
    MANY,
    OTHERS,
    POOL_WEIGHTS,
    PROMPTS,
    SKETCH_RANK,
    STRATEGIES,
    TEN_EACH,
    TRUSTED,
    TRUSTED_CONFIGS,
    TWO_RESPONSES,
    WIDE,
    Setup,
    exact_setups,
    neutral_setups,
    numbers_of_large,
)
from tests.distributed.ulysses import measure_ulysses
from tests.distributed.update_rows import update_setups
from tests.distributed.updates import measure_update, measure_update_neutrality
from tests.numerics.kernels import bound_norm, norms_of, wrapped
from tests.numerics.models import mixture_of_experts
from tests.numerics.problems import TEMPERATURE, Problem, load_float64
from verl_gradalign.config import ProbeConfig
from verl_gradalign.integration.engine import scoring_mode
from verl_gradalign.probe import direction_gather, fsdp
from verl_gradalign.probe.audit import audited_scores
from verl_gradalign.probe.call import pool_scores
from verl_gradalign.probe.direction import Direction, compute_direction, on_cpu
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.responses import Response
from verl_gradalign.probe.score_problems import score_problems
from verl_gradalign.probe.sketch import sketched_scores
from verl_gradalign.probe.trusted import trusted_direction, with_adam_metric, with_candidates_metric

AUDITED = (1, 4, 5)
"""Candidates that the canary rescores: a group of one, one without advantages; and one too large for it."""


def measure_exactness(root: Path, setup: Setup) -> dict[str, Any]:
    """Return the scores of the exact estimators, in several batchings and orders."""
    engine = build_engine(root, setup)
    with mock.patch.object(direction_gather, "_free_bytes", return_value=0):  # v is then gathered unit by unit
        turned = score(engine, "ghost", candidates=CANDIDATES[::-1])
    for key in ("dot", "norm", "derivative", "half_dot", "num_tokens"):
        turned[key].reverse()
    with mock.patch.object(fsdp, "TOGETHER_BYTES", 5000):  # the whole of v, in several exchanges
        tight = score(engine, "ghost", tight_budget(engine))
    return {
        "ghost-tight": tight,
        "ghost-wide-turned": turned,
        "backward": score(engine, "backward"),
        "prompts": [read(engine, PROMPTS, budget) for budget in (WIDE, 20)],
        "prompt": read(engine, PROMPTS[2:3]),
    }


def measure_approximations(root: Path, strategy: str) -> dict[str, Any]:
    """Return the scores of the estimators that are not exact, at their limits."""
    engine = build_engine(root, Setup(strategy))
    tight = tight_budget(engine)
    return {
        "low_rank": score(engine, "low_rank", tight, ProbeConfig(rank=10_000)),
        "step": score(engine, "finite_difference", tight, ProbeConfig(relative_step=1e-3)),
        "half_step": score(engine, "finite_difference", tight, ProbeConfig(relative_step=5e-4)),
        "output_layer": score(engine, "output_layer", tight),
    }


def measure_precision(root: Path, strategy: str, dtype: str) -> dict[str, Any]:
    """Return the ghost's scores of many problems, computed in `dtype`."""
    return score(build_engine(root, Setup(strategy, dtype=dtype)), "ghost", 400, candidates=MANY)


def measure_collectives(root: Path, strategy: str) -> dict[str, Any]:
    """Return how often each collective ran while the candidates were scored."""
    counts = {}
    engine = build_engine(root, Setup(strategy, is_checkpointed=True))
    for estimator in ("ghost", "finite_difference", "backward"):
        with scoring(engine, CANDIDATES, estimator, tight_budget(engine)) as call:
            direction = call.direction()
            with CollectiveCounter() as counter:
                call.score(direction)
        counts[estimator] = dict(counter.counts)
    counts["units"] = len(set(fsdp.unit_of_modules(engine.module).values()))
    for name, free in (("together", math.inf), ("by unit", 0)):
        with (
            mock.patch.object(direction_gather, "_free_bytes", return_value=free),
            scoring(engine, CANDIDATES, "ghost", tight_budget(engine)) as call,
            mock.patch.object(call.engine, "forward", wraps=call.engine.forward) as forward,
        ):
            direction = call.direction()
            with CollectiveCounter() as counter:
                call.score(direction)
            counts[name], counts["passes"] = dict(counter.counts), forward.call_count
    return counts


def measure_large(root: Path, strategy: str) -> dict[str, Any]:
    """Return scores of problems of ten micro-batches each, and what they took on this rank."""
    engine, measured = build_engine(root, Setup(strategy, "qwen2")), {}
    numbers = numbers_of_large(dist.get_world_size())
    for number in numbers:
        with scoring(engine, TEN_EACH[:number], "ghost", TWO_RESPONSES) as call:
            direction = call.direction()
            call.score(direction)  # finds out, once, how the model's logits are made
            with mock.patch.object(call.engine, "forward", wraps=call.engine.forward) as forward:
                with CollectiveCounter() as counter:
                    scores = call.score(direction)
            measured[f"{number}"] = report(scores)
            measured[f"passes {number}"], measured[f"collectives {number}"] = forward.call_count, counter.counts.total()
    measured["backward"] = score(engine, "backward", TWO_RESPONSES, candidates=TEN_EACH[: numbers[-1]])
    return measured


def measure_memory(root: Path, strategy: str) -> dict[str, Any]:
    """Return the peak of making a direction of many micro-batches, by whether they put the reduction off."""
    measured: dict[str, Any] = {}
    for defers_sync in (True, False):
        engine = build_engine(root, Setup(strategy, "wide", defers_sync=defers_sync, dtype="bf16"))
        with scoring(engine, TEN_EACH[:4], "ghost", WIDE) as call:
            make = partial(compute_direction, call.engine, call.candidates)
            make()  # what is made once for all
            measured["deferred" if defers_sync else "at once"] = peak_bytes(make, "cpu")
        sizes = {p.identity: math.prod(p.shape) for p in fsdp.trainable_placements(engine.module)}
        measured["numbers"] = sum(sizes.values())
    return measured


def measure_fused(root: Path, strategy: str) -> dict[str, Any]:
    """Return every estimator's scores on models that verl's fused kernels run, and whether these still train."""
    # FSDP2 does not gather an untied output layer for verl's fused kernels, which do not call it.
    name, kind = ("qwen2", Qwen2ForCausalLM) if strategy == "fsdp2" else ("qwen3", Qwen3ForCausalLM)
    measured: dict[str, Any] = {"model": name}
    prompts = [row.prompt.tolist() for problem in TRUSTED for row in problem]
    measured["states"] = read(build_engine(root, Setup(strategy, name)), prompts)
    with mock.patch.object(kind, "forward", kind.forward):  # verl replaces it, for the rest of the process
        for is_packed in (False, True):
            engine = build_engine(root, Setup(strategy, name, is_fused=True, is_packed=is_packed))
            for estimator in ESTIMATORS:
                measured[f"{estimator} {is_packed}"] = score(engine, estimator, tight_budget(engine))
            measured[f"states {is_packed}"] = read(engine, prompts)
            assert kind.forward.__module__ == "verl.models.transformers.dense_common"
    return measured


def measure_audit(root: Path, strategy: str) -> dict[str, Any]:
    """Return scores and diagnostics where some problems exceed the budget, and what stopping says on each rank."""
    engine = build_engine(root, Setup(strategy, "qwen2"))
    measured: dict[str, Any] = {"budget": tight_budget(engine) // 2}
    for oversized in ("accumulate", "sketch", "backward"):
        with scoring(engine, CANDIDATES, "ghost", measured["budget"], oversized) as call:
            direction, estimator = call.direction(), ESTIMATORS["ghost"](ProbeConfig(oversized=oversized))
            scores = audited_scores(call.engine, call.candidates, direction, estimator, AUDITED, oversized)
            measured[oversized] = report(scores)
    with scoring(engine, CANDIDATES, "ghost", measured["budget"]) as call:
        try:
            audited_scores(call.engine, call.candidates, direction, estimator, oversized="stop")
            message = ""
        except ValueError as error:
            message = str(error)
        measured["messages"] = gather(message)
    return measured


def measure_adam(root: Path, strategy: str) -> dict[str, Any]:
    """Return the scores after a training step along the direction in Adam's metric, on the device and on the CPU."""
    engine = build_engine(root, Setup(strategy))
    train_without_clipping(engine, step=0)
    measured = {}
    for estimator in ("ghost", "backward", "finite_difference"):
        with scoring(engine, CANDIDATES, estimator, WIDE) as call:
            direction = with_adam_metric(call.direction(), call.engine, engine.optimizer)
            measured[estimator] = report(call.score(direction))
            measured[f"{estimator}-on-cpu"] = report(call.score(on_cpu(direction)))
    return measured


def measure_trusted(root: Path, strategy: str) -> dict[str, Any]:
    """Return the scores along directions of two trusted sets, and what is reported of them."""
    engine = build_engine(root, Setup(strategy, "qwen2", is_checkpointed=True))
    measured = {}
    for name, config in TRUSTED_CONFIGS.items():
        with scoring(engine, CANDIDATES, "ghost", WIDE) as call:
            sets, weights = {"first": call.trusted[:1], "rest": call.trusted[1:]}, {"first": 1.0, "rest": 0.5}
            direction, reports = trusted_direction(call.engine, sets, weights, config, None)
            if config.metric == "candidates":
                direction = with_candidates_metric(direction, call.engine, call.candidates)
            measured[name] = report(call.score(direction))
            measured[name]["reports"] = {name: astuple(each) for name, each in reports.items()}
    return measured


def measure_pool(root: Path, strategy: str) -> dict[str, Any]:
    """Return the scores along the candidates' own gradients: exact, sketched, and with one candidate on one rank."""
    engine = build_engine(root, Setup(strategy, "qwen2", is_checkpointed=True))
    with scoring(engine, CANDIDATES, "ghost", tight_budget(engine)) as call:
        score = partial(audited_scores, call.engine, estimator=ESTIMATORS["ghost"]())
        measured = {
            "unit-sum": report(pool_scores(call.engine, call.candidates, POOL_WEIGHTS, score)),
            "sum": report(pool_scores(call.engine, call.candidates, None, score)),
            "sketch": report(sketched_scores(call.engine, call.candidates, POOL_WEIGHTS, SKETCH_RANK, seed=0)),
        }
    with scoring(engine, CANDIDATES[:1], "ghost", WIDE) as call:
        measured["alone"] = report(sketched_scores(call.engine, call.candidates, None, SKETCH_RANK, seed=0))
    return measured


def measure_refusals(root: Path) -> dict[str, Any]:
    """Return what each estimator says on each rank of directions made for another sharding and another model."""

    def make(setup: Setup) -> Direction:
        with scoring(build_engine(root, setup), CANDIDATES, "ghost", WIDE) as call:
            return call.direction()

    foreign = {"fsdp": make(Setup("fsdp", "qwen2")), "wide": make(Setup("fsdp2", "wide"))}
    engine = build_engine(root, Setup("fsdp2", "qwen2"))
    measured: dict[str, Any] = {"parameters": [name for name, _ in engine.module.named_parameters()]}
    for estimator in ESTIMATORS:
        with scoring(engine, CANDIDATES, estimator, WIDE) as call:
            for name, direction in foreign.items():
                try:
                    call.score(direction)
                    message = ""
                except RuntimeError as error:
                    message = str(error)
                    # What a whole scoring call leaves to its end.
                    for parameter in engine.module.parameters():
                        parameter.grad = None
                measured[f"{estimator}-{name}"] = gather(message)
    return measured


def measure_kernels(root: Path, strategy: str) -> dict[str, Any]:
    """Return the scores with kernels bound to norms and a wrapped head, and what a hook on the head is answered."""
    engine = build_engine(root, Setup(strategy, is_checkpointed=True))
    for norm in norms_of(engine.module):
        norm.forward = MethodType(bound_norm(), norm)
    head = engine.module.get_output_embeddings()
    head.forward = wrapped(head)
    measured = {name: score(engine, name) for name in ("ghost", "output_layer")}
    head.register_forward_hook(lambda *call: 2 * call[-1])
    with scoring_mode(engine):
        try:
            ESTIMATORS["ghost"]().check(engine.module)
            message = ""
        except ValueError as error:
            message = str(error)
    return {**measured, "is_unit": isinstance(head, FSDPModule), "messages": gather(message)}


def measure_public_function(root: Path, model: str) -> dict[str, Any]:
    """Return what `score_problems` finds on a plain model and on the same model under FSDP1 and FSDP2."""

    def responses(problems: list[Problem]) -> list[list[Response]]:
        return [
            [
                Response(row.prompt.tolist(), row.response.tolist(), a)
                for row, a in zip(problem, ADVANTAGES, strict=False)
            ]
            for problem in problems
        ]

    measured = {}
    for wrapping in ("plain", "fsdp", "fsdp-orig", "fsdp2"):
        is_moe = model == "experts"
        module = mixture_of_experts(True) if is_moe else load_float64(root / model, has_checkpointing=True)
        layers = module.model.layers
        if wrapping in ("fsdp", "fsdp-orig"):
            module = FullyShardedDataParallel(
                module,
                auto_wrap_policy=ModuleWrapPolicy({type(layers[0])}),
                device_id=torch.device("cpu"),
                use_orig_params=wrapping == "fsdp-orig",
            )
        elif wrapping == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for unit in (*layers, module):
                fully_shard(unit, mesh=mesh)
        scores = score_problems(module, responses(TRUSTED), responses(CANDIDATES), TEMPERATURE, max_tokens=80)
        measured[wrapping] = report(scores)
    return measured


def list_cases(root: Path, world_size: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return {name: case}; model folders lie under `root` by the names in MODELS."""
    cases: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, setup in exact_setups(world_size).items():
        cases[f"exact-{name}"] = partial(measure_exactness, root, setup)
    for strategy in STRATEGIES:
        cases[f"approximate-{strategy}"] = partial(measure_approximations, root, strategy)
    for strategy in ("fsdp", "fsdp-orig", "fsdp2"):
        if world_size > 1:
            cases[f"collectives-{strategy}"] = partial(measure_collectives, root, strategy)
        cases[f"trusted-{strategy}"] = partial(measure_trusted, root, strategy)
        cases[f"pool-{strategy}"] = partial(measure_pool, root, strategy)
        cases[f"adam-{strategy}"] = partial(measure_adam, root, strategy)
    for strategy in ("fsdp", "fsdp2"):
        cases[f"replay-{strategy}"] = partial(measure_replay, root, strategy)
        cases[f"large-{strategy}"] = partial(measure_large, root, strategy)
        if world_size > 1:
            cases[f"memory-{strategy}"] = partial(measure_memory, root, strategy)
        cases[f"audit-{strategy}"] = partial(measure_audit, root, strategy)
        for dtype in ("fp32", "bf16", "fp16"):
            cases[f"precision-{strategy}-{dtype}"] = partial(measure_precision, root, strategy, dtype)
        cases[f"kernels-{strategy}"] = partial(measure_kernels, root, strategy)
        cases[f"fused-{strategy}"] = partial(measure_fused, root, strategy)
    for model in VISION_MODELS:
        for part in ("whole", "text", "all"):
            cases[f"images-{model}-{part}"] = partial(measure_images, root, model, part)
    if world_size > 1:
        for strategy, model in (("fsdp2", "qwen2"), ("fsdp", "qwen3")):
            cases[f"ulysses-{strategy}"] = partial(measure_ulysses, root, strategy, model, list(ESTIMATORS))
    for name in OTHERS:
        cases[f"other-{name}"] = partial(measure_other, root, name)
    cases["refusals"] = partial(measure_refusals, root)
    cases["public-qwen2"] = partial(measure_public_function, root, "qwen2")
    cases["public-experts"] = partial(measure_public_function, root, "experts")
    cases["public-qwen3"] = partial(measure_public_function, root, "qwen3")
    for name, setup in neutral_setups(world_size).items():
        cases[f"neutral-{name}"] = partial(measure_neutrality, root, setup)
        cases[f"update-neutral-{name}"] = partial(measure_update_neutrality, root, setup)
    for name, (setup, update) in update_setups(world_size).items():
        cases[f"update-exact-{name}"] = partial(measure_update, root, setup, update)
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
    for name, case in list_cases(root, world_size).items():
        if only not in name:
            continue
        started = time.perf_counter(), time.process_time()
        try:
            results[name] = case()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        results[name]["seconds"] = time.perf_counter() - started[0], time.process_time() - started[1]
        if rank == 0:
            (root / f"results-{world_size}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
