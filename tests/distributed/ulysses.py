# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism on the CPU: verl's engine, its inputs and its exchange of heads for positions, on gloo.

verl exchanges around flash attention, which a CPU has not: torch's attention over the segments of the packed line
stands for it here, and gathers stand for the exchange of lists, which gloo has not. What slices the line, calls the
exchange, and cuts and joins what it exchanges is verl's own.

    with ulysses():
        engine = build_engine(root, Setup("fsdp2", is_packed=True, num_slices=2))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flash_attention
from verl.models.transformers import monkey_patch
from verl.utils.ulysses import SeqAllToAll

from tests.distributed.engines import build_engine, infer
from tests.distributed.scoring import score, tight_budget
from tests.distributed.setups import CANDIDATES, ULYSSES, WIDE, Setup
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe import sizes
from verl_gradalign.probe.layer_rules import LAYER_RULES, linear

CALLS = {"attention": 0, "exchange": 0}
"""How often what verl patches in, and its exchange, have run."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, position_ids: Tensor, softmax_scale: float, **__: Any
) -> Tensor:
    """Return causal attention within the segments of a packed line, (1, positions, heads, features).

    A segment begins where the position is 0.
    """
    CALLS["attention"] += 1
    segment_N = (position_ids[0] == 0).cumsum(0)
    place_N = torch.arange(len(segment_N))
    is_seen_NN = (segment_N[:, None] == segment_N[None]) & (place_N[:, None] >= place_N[None])
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    groups = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=is_seen_NN, scale=softmax_scale, **groups
    ).transpose(1, 2)


def exchange(outputs: list[Tensor], inputs: list[Tensor], group: Any = None, async_op: bool = False) -> None:
    """Do what torch.distributed.all_to_all does."""
    assert not async_op
    CALLS["exchange"] += 1
    mine, place = torch.stack(inputs), dist.get_rank(group)
    parts = [torch.empty_like(mine) for _ in inputs]
    dist.all_gather(parts, mine, group=group)
    for output, part in zip(outputs, parts, strict=True):
        output.copy_(part[place])


def install() -> None:
    """Have the same for good, in a process of its own."""
    AttentionInterface.register(ULYSSES, flash_attention.flash_attention_forward)
    AttentionMaskInterface.register(ULYSSES, lambda *_, **__: None)
    monkey_patch._flash_attention_forward = attend
    dist.all_to_all = exchange


@contextmanager
def ulysses() -> Iterator[None]:
    """Have transformers' models call flash attention where verl patches it, and both run on the CPU."""
    own = flash_attention._flash_attention_forward
    AttentionInterface.register(ULYSSES, flash_attention.flash_attention_forward)
    AttentionMaskInterface.register(ULYSSES, lambda *_, **__: None)
    with (
        mock.patch.object(monkey_patch, "_flash_attention_forward", attend),
        mock.patch.object(dist, "all_to_all", exchange),
        mock.patch.object(flash_attention, "_flash_attention_forward", own),  # verl patches it for good
    ):
        yield


def measure_ulysses(root: Path, strategy: str, model: str, estimators: Sequence[str]) -> dict[str, Any]:
    """Return scores on an engine whose ranks have slices of rows."""
    CALLS.update(attention=0, exchange=0)
    measured: dict[str, Any] = {}
    with ulysses():
        engine = build_engine(root, Setup(strategy, model, is_packed=True, num_slices=2))
        infer(engine)
        assert flash_attention._flash_attention_forward is monkey_patch._ulysses_flash_attention_forward
        assert CALLS["exchange"] >= 4 and CALLS["attention"] >= 1, CALLS
        tight = tight_budget(engine)
        for estimator in estimators:
            measured[estimator] = score(engine, estimator, WIDE)
        measured["ghost of one problem at a time"] = score(engine, "ghost", tight)
        longest = max(row.num_tokens for problem in CANDIDATES for row in problem)
        assert longest < tight
        measured["ghost of problems that are cut"] = score(engine, "ghost", longest)
        measured["estimated norms"] = score(engine, "ghost", longest, ProbeConfig(oversized="sketch", sketch_rank=64))
        with mock.patch.object(sizes, "CHUNK_ELEMENTS", 700):
            measured["ghost in blocks"] = score(engine, "ghost", WIDE)
        with mock.patch.dict(LAYER_RULES, {nn.Linear: lambda call: linear(call)}):
            try:
                score(engine, "ghost", WIDE)
            except ValueError as error:
                measured["own rule"] = str(error)
    measured["exchange"] = SeqAllToAll.__module__
    return measured
