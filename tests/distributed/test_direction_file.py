# SPDX-License-Identifier: Apache-2.0
"""Every rank gets its part of a direction back from its own disk; another kind of sharding is refused, or the same.

Two processes run all cases, on a model with odd shapes under every kind of sharding, and on verl's engines:

    python -m tests.distributed.test_direction_file RANK FOLDER

A kind of sharding on one rank is the same on a group of this rank alone; both processes then do the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from verl_gradalign.probe.direction import Direction, compute_direction, require_same_shards
from verl_gradalign.probe.direction_file import REMEDY, load_direction, rank_file, save_direction
from verl_gradalign.probe.direction_gather import DirectionGather
from verl_gradalign.probe.fsdp import trainable_placements
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.types import ProblemRows

pytestmark = pytest.mark.dist

NUM_RANKS = 2
TIMEOUT_S = 240  # measured 43 s on two cores under much other load, of which each process computes 19 s
WRAPPINGS = {
    "plain": ("plain", (2, 1), False),
    **{f"{kind}-on-{n}": (kind, (2 // n, n), False) for kind in ("fsdp", "fsdp-orig", "fsdp2") for n in (1, 2)},
    **{f"{kind}-hybrid-1x2": (kind, (1, 2), True) for kind in ("fsdp", "fsdp-orig", "fsdp2")},
    "fsdp2-hybrid-2x1": ("fsdp2", (2, 1), True),
}
"""Name -> (kind, mesh of (replicas, shards), whether FSDP is told of the replicas)."""
VERL = {
    "tied": ("qwen2", False, ("fsdp", "fsdp-orig", "fsdp2", "fsdp2-replicated", "fsdp2-offloaded", "plain")),
    "adapters": ("qwen3", True, ("fsdp", "fsdp-orig", "fsdp2", "plain")),
}
"""Name -> (model, whether adapters alone are trained, engines, among them the plain model)."""
REFUSED = "refused"
SAME = [{"fsdp-on-2", "fsdp-hybrid-1x2"}, {"fsdp-orig-on-2", "fsdp-orig-hybrid-1x2"}, {"fsdp2", "fsdp2-offloaded"}]
"""Under FSDP1 a single replica's ranks hold the same elements as without replicas; offloading moves no element."""
SENDERS = [("odd", name) for name in WRAPPINGS] + [(f"verl-{name}", e) for name in VERL for e in VERL[name][2]]


class OddLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(5, 3)
        self.down = nn.Linear(3, 5, bias=False)
        self.scale = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(self.up(x).tanh())


class OddModel(nn.Module):
    """Tied embeddings, a frozen layer, a parameter of one number, and no size that two ranks can halve."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList(OddLayer() for _ in range(3))
        self.layers[1].requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class OddEngine:
    """What `compute_direction` asks of an engine."""

    gradient_scale = 1.0
    device = torch.device("cpu")

    def __init__(self, module: nn.Module, shard_group: dist.ProcessGroup | None) -> None:
        self.module = module
        self.shard_group = shard_group

    def backward(self, problems: list[ProblemRows]) -> None:
        self.module(torch.arange(6)).square().sum().backward()


@dataclass(frozen=True)
class Party:
    """A module that takes part in an exchange, and how to make its direction while the mode is on."""

    module: nn.Module
    mode: Callable[[], AbstractContextManager[Any]]
    direction: Callable[[], Direction]


def wrap(name: str) -> Party:
    """Return a new odd model under one of WRAPPINGS."""
    kind, shape, is_hybrid = WRAPPINGS[name]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards"))
    sharding_mesh = mesh if is_hybrid else mesh["shards"]
    torch.manual_seed(0)
    module: nn.Module = OddModel()
    if kind == "fsdp2":
        for unit in (*module.layers, module):
            fully_shard(unit, mesh=sharding_mesh)
    elif kind != "plain":
        module = FullyShardedDataParallel(
            module,
            auto_wrap_policy=ModuleWrapPolicy({OddLayer}),
            device_id=torch.device("cpu"),
            use_orig_params=kind == "fsdp-orig",
            sharding_strategy=ShardingStrategy.HYBRID_SHARD if is_hybrid else ShardingStrategy.FULL_SHARD,
            device_mesh=sharding_mesh,
        )
    engine = OddEngine(module, None if kind == "plain" else mesh["shards"].get_group())
    problem = ProblemRows("", (), 0, 0, 0)
    return Party(module, partial(leave_no_trace, module), partial(compute_direction, engine, [problem]))


def wrap_all(_: Path) -> tuple[dict[str, Party], dict[str, Party]]:
    # Those that receive are new: a run that goes on loads the direction before its first pass.
    return {name: wrap(name) for name in WRAPPINGS}, {name: wrap(name) for name in WRAPPINGS}


def build_engines(name: str, root: Path) -> tuple[dict[str, Party], dict[str, Party]]:
    """Return verl's engines of VERL[name], and the plain model."""
    # Here, so that the tests, which run in another process, need no verl.
    from tests.distributed.engines import build_engine
    from tests.distributed.scoring import scoring
    from tests.distributed.setups import CANDIDATES, TRUSTED, WIDE, Setup, reference_model
    from tests.numerics.problems import TEMPERATURE, tabulate
    from verl_gradalign.integration.engine import scoring_mode
    from verl_gradalign.probe.plain_engine import PlainEngine

    model, has_adapters, engines = VERL[name]
    module = reference_model(root, model, has_adapters)
    rows, shares = tabulate(TRUSTED)
    plain = partial(compute_direction, PlainEngine(module, rows, TEMPERATURE), shares)
    parties = {"plain": Party(module, partial(leave_no_trace, module), plain)}
    for engine_name in engines[:-1]:
        strategy = engine_name.removesuffix("-replicated").removesuffix("-offloaded")
        setup = Setup(
            strategy,
            model,
            has_adapters=has_adapters,
            is_replicated=engine_name.endswith("-replicated"),
            is_offloaded=engine_name.endswith("-offloaded"),
        )
        engine = build_engine(root, setup)
        # Made in a scoring call of its own.
        with scoring(engine, CANDIDATES, "ghost", WIDE) as call:
            direction = call.direction()
        parties[engine_name] = Party(engine.module, partial(scoring_mode, engine), lambda made=direction: made)
    return parties, parties


def exchange(
    folder: Path, make_parties: Callable[[Path], tuple[dict[str, Party], dict[str, Party]]], root: Path
) -> dict[str, Any]:
    """Return {sender: {receiver: what is wrong with what it loaded, on any rank, or REFUSED}}. Collective."""
    senders, receivers = make_parties(root)
    rank = dist.get_rank()
    measured: dict[str, Any] = {}
    for sender, party in senders.items():
        # A folder of each rank's own, as on machines that share no disk.
        path = rank_file(folder / sender / f"disk-of-{rank}", rank, NUM_RANKS)
        with party.mode():
            sent = party.direction()
            if rank == 0:
                save_direction(party.module, sent, path)
        with party.mode():
            if rank == 1:
                save_direction(party.module, sent, path)  # no rank takes part in another's
            wholes = gather_all(party.module, sent)
        measured[sender] = {}
        for receiver, other in receivers.items():
            measured[sender][receiver] = sum(of_all_ranks(received_by(other, path, sent, wholes)), [])
    return measured


def received_by(other: Party, path: Path, sent: Direction, wholes: dict[str, Tensor]) -> list[str]:
    """Return what is wrong with what the party loaded on this rank; REFUSED where a rank could not load. Collective."""
    with other.mode():
        received, refusal = None, ""
        try:
            received = load_direction(other.module, path)
        except ValueError as error:
            refusal = str(error)
            assert str(path) in refusal and REMEDY in refusal, refusal
        if any(of_all_ranks(refusal)):
            return [REFUSED]
        assert received is not None
        wrong = [*differences(gather_all(other.module, received), wholes), *shard_differences(received, sent)]
    if replace(received, shards=()) != replace(sent, shards=()):
        wrong.append("numbers")
    return wrong


def of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * NUM_RANKS
    dist.all_gather_object(values, value)
    return values


def gather_all(module: nn.Module, direction: Direction) -> dict[str, Tensor]:
    """Return the direction of every use of a trainable parameter. Collective."""
    require_same_shards(module, direction)
    gather = DirectionGather(module, direction, torch.device("cpu"))
    placements = trainable_placements(module)
    return {placement.name.replace("_fsdp_wrapped_module.", ""): gather(placement).clone() for placement in placements}


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    names = sorted(found.keys() | wanted.keys())
    return [name for name in names if not is_same(found.get(name), wanted.get(name))]


def shard_differences(found: Direction, wanted: Direction) -> list[str]:
    if len(found.shards) != len(wanted.shards):
        return ["number of shards"]
    pairs = zip(found.shards, wanted.shards, strict=True)
    return [f"shard {index}" for index, pair in enumerate(pairs) if not is_same(*pair)]


def is_same(found: Tensor | None, wanted: Tensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return (
        (type(found), found.dtype, found.shape) == (type(wanted), wanted.dtype, wanted.shape)
        and not found.requires_grad
        and found.numpy().tobytes() == wanted.numpy().tobytes()
    )


def main(rank: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{root}/store-direction-file",
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=60),
    )
    cases = {"odd": wrap_all, **{f"verl-{name}": partial(build_engines, name) for name in VERL}}
    results = {}
    for name, make_parties in cases.items():
        try:
            results[name] = exchange(root / "direction-files" / name, make_parties, root)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    if rank == 0:
        (root / "results-direction-file.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def exchanged(root: Path) -> Iterator[dict[str, Any]]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    logs = [root / f"log-direction-file-{rank}" for rank in range(NUM_RANKS)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, "-m", "tests.distributed.test_direction_file", str(rank), str(root)]
        with log.open("w") as stream:
            processes.append(
                subprocess.Popen(
                    command, cwd=Path(__file__).parents[2], env=environment, stdout=stream, stderr=subprocess.STDOUT
                )
            )
    try:
        codes = [process.wait(timeout=TIMEOUT_S) for process in processes]
        assert not any(codes), "\n".join(log.read_text()[-3000:] for log in logs)
        yield json.loads((root / "results-direction-file.json").read_text())
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("models", "sender"), SENDERS)
def test_ranks_without_a_common_disk_get_their_shards_back_bit_for_bit(
    exchanged: dict[str, Any], models: str, sender: str
) -> None:
    assert "error" not in exchanged[models], exchanged[models]["error"]
    assert exchanged[models][sender][sender] == []


@pytest.mark.parametrize(("models", "sender"), SENDERS)
def test_another_kind_of_sharding_is_refused_with_file_and_remedy_unless_its_shards_are_the_same(
    exchanged: dict[str, Any], models: str, sender: str
) -> None:
    found = exchanged[models][sender]
    assert set(found) == {name for kind, name in SENDERS if kind == models}
    accepted = {name for name, wrong in found.items() if set(wrong) != {REFUSED}}
    assert accepted == {sender}.union(*(same & set(found) for same in SAME if sender in same))
    assert all(found[name] == [] for name in accepted)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
