# SPDX-License-Identifier: Apache-2.0
"""Weights for rollouts on machines of their own: one actor rank sends over gloo, every rollout worker receives."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from verl_gradalign.cpu.checkpoint_engine import GlooCheckpointEngine

NUM_ACTOR, NUM_ROLLOUT = 2, 2
WAIT_S = 30
WEIGHTS = {
    "matrix": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "count": torch.tensor([7]),
}


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")


@pytest.fixture
def engines():
    """The actor's ranks, then the rollout workers, as verl makes them."""
    actor = [GlooCheckpointEngine(bucket_size=1 << 20, is_master=rank == 0) for rank in range(NUM_ACTOR)]
    return actor + [GlooCheckpointEngine(bucket_size=1 << 20) for _ in range(NUM_ROLLOUT)]


def push(engines, weights):
    """Push weights as verl's manager does, each engine in a thread; return what every rollout worker received."""
    metadata = [engine.prepare() for engine in engines]
    parts = GlooCheckpointEngine.build_topology(NUM_ACTOR, NUM_ROLLOUT, metadata)
    joins = [{key: part[key][i] for key in part} for part in parts for i in range(len(part["rank"]))]

    async def receive(engine):
        return {name: tensor async for name, tensor in engine.receive_weights(global_steps=1)}

    with ThreadPoolExecutor(len(engines)) as threads:
        for done in [threads.submit(e.init_process_group, **join) for e, join in zip(engines, joins, strict=True)]:
            done.result(WAIT_S)
        sends = [threads.submit(asyncio.run, e.send_weights(iter(weights.items()))) for e in engines[:NUM_ACTOR]]
        receives = [threads.submit(asyncio.run, receive(engine)) for engine in engines[NUM_ACTOR:]]
        for done in sends:
            done.result(WAIT_S)
        received = [done.result(WAIT_S) for done in receives]
    for engine in engines:
        engine.finalize()
    return received


def test_every_rollout_worker_receives_every_parameter_as_it_is(engines):
    for received in push(engines, WEIGHTS):
        assert list(received) == list(WEIGHTS)
        for name, tensor in WEIGHTS.items():
            torch.testing.assert_close(received[name], tensor, rtol=0, atol=0)


def test_a_later_push_brings_the_later_weights(engines):
    push(engines, WEIGHTS)
    later = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    for received in push(engines, later):
        torch.testing.assert_close(received, later, rtol=0, atol=0)


def test_the_actors_other_ranks_gather_and_send_nothing(engines):
    """Gathering a sharded tensor takes all ranks, so those outside the group must take every tensor too."""
    taken = []
    asyncio.run(engines[1].send_weights((taken.append(name) or (name, tensor)) for name, tensor in WEIGHTS.items()))
    assert taken == list(WEIGHTS)
