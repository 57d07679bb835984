# SPDX-License-Identifier: Apache-2.0
"""`checkpoint_engine.backend=gloo`: weights for rollouts on machines of their own, broadcast over gloo.

What verl's nccl engine is on GPUs: the actor's first rank sends every parameter to all rollout workers, in a process
group that lives for one push. Whole tensors, without buckets: it is for small models.

    actor_rollout_ref.rollout.checkpoint_engine.backend=gloo
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from typing import Any

import ray
import torch
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]
from verl.checkpoint_engine.base import CheckpointEngine

TIMEOUT = timedelta(minutes=10)
SENDER = 0
KEY = "parameters"
"""Under which the sender tells the receivers names, shapes and types of what it sends, in order."""


class GlooCheckpointEngine(CheckpointEngine):
    """Sends, in the actor's first rank, or receives, in a rollout worker, the weights of one push after another."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._is_sender = is_master
        self._store: TCPStore | None = None
        self._group: Any = None  # torch's stubs leave out what a ProcessGroupGloo does

    def prepare(self) -> dict[str, Any]:
        """Return where the sender listens; nothing elsewhere."""
        if not self._is_sender:
            return {}
        host = ray.util.get_node_ip_address()
        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        return {"host": host, "port": self._store.port}

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return arguments of `init_process_group`: the actor's other ranks are in no group."""
        size = 1 + rollout_world_size
        ranks = [SENDER] + [None] * (actor_wg_world_size - 1), list(range(1, size))
        actor, rollout = ({"rank": r, "size": [size] * len(r), "sender": metadata[:1] * len(r)} for r in ranks)
        return actor, rollout

    def init_process_group(self, rank: int | None, size: int, sender: dict[str, Any]) -> None:
        """Join sender and receivers. Collective over these; returns at once in the actor's other ranks."""
        if rank is None:
            return
        if self._store is None:
            self._store = TCPStore(sender["host"], sender["port"], is_master=False, timeout=TIMEOUT)
        self._group = ProcessGroupGloo(self._store, rank, size, TIMEOUT)

    def finalize(self) -> None:
        """Leave the group; the next push has a new one, as replicas may have come or gone."""
        self._group = self._store = None

    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        """Send the weights. Collective over the actor's ranks: gathering a tensor takes all of them."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        if self._group is None or self._store is None:
            return
        described = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()]
        self._store.set(KEY, json.dumps(described))
        for tensor in tensors.values():
            await asyncio.to_thread(self._broadcast, tensor)

    async def receive_weights(self, global_steps: int | None = None) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """Yield the sender's parameters, in its order."""
        assert self._store is not None, "init_process_group comes first"
        for name, shape, dtype in json.loads(await asyncio.to_thread(self._store.get, KEY)):
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            await asyncio.to_thread(self._broadcast, tensor)
            yield name, tensor

    def _broadcast(self, tensor: torch.Tensor) -> None:
        self._group.broadcast(tensor, SENDER).wait()
