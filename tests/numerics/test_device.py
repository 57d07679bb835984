# SPDX-License-Identifier: Apache-2.0
"""Where passes compute is said by the engine: with FSDP2's offload policy parameters and gradients lie in CPU memory.

The device here is torch's `meta`, where a number cannot be read: what mixes it with the CPU says so, and what comes as
far as reading the result has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.numerics.cases import CANDIDATES, TRUSTED
from tests.numerics.models import make_model
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign import probe
from verl_gradalign.probe.direction import Direction, compute_direction, inner, no_direction
from verl_gradalign.probe.direction_gather import DirectionGather
from verl_gradalign.probe.estimators import ghost
from verl_gradalign.probe.estimators.ghost import tapped_scores
from verl_gradalign.probe.fsdp import trainable_placements
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.layout import Layout, padded_layout
from verl_gradalign.probe.passes import summed_over_ranks
from verl_gradalign.probe.plain_engine import PlainEngine

META = torch.device("meta")
NOT_READABLE = (NotImplementedError, RuntimeError)


class ElsewhereEngine(PlainEngine):
    """Its parameters lie in CPU memory, its log-probs come from the device."""

    log_probs: Tensor | None = None

    def forward(self, rows: Sequence[int], rows_per_problem: Sequence[int], *_: object) -> tuple[Tensor, Layout]:
        width = max(len(self._rows[row].response) for row in rows)
        self.log_probs = torch.zeros(len(rows), width, device=self.device, requires_grad=True)
        return self.log_probs, padded_layout(len(rows), width, rows_per_problem)


@pytest.fixture
def engine(model: nn.Module) -> ElsewhereEngine:
    engine = ElsewhereEngine(model, tabulate([*TRUSTED, *CANDIDATES])[0], TEMPERATURE)
    engine.device = META
    return engine


def direction_of(model: nn.Module) -> Direction:
    rows, shares = tabulate(TRUSTED)
    with leave_no_trace(model):
        return compute_direction(PlainEngine(model, rows, TEMPERATURE), shares)


@pytest.mark.parametrize("per_response", [False, True])
def test_a_passs_weights_meet_its_log_probs_where_they_are(
    engine: ElsewhereEngine, per_response: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ghost, "plain_head", lambda _: None)  # found by a pass that this engine cannot run
    shares = tabulate([*TRUSTED, *CANDIDATES])[1]
    with leave_no_trace(engine.module), pytest.raises(NOT_READABLE, match="meta"):
        tapped_scores(engine, shares, 0.0, [], lambda placement: torch.zeros(0), per_response)
    assert engine.log_probs is not None and engine.log_probs.grad is not None  # the backward pass has run


def test_a_direction_is_gathered_to_where_passes_compute(model: nn.Module) -> None:
    placements = trainable_placements(model)
    for direction in (direction_of(model), no_direction(model)):
        gather = DirectionGather(model, direction, META)
        assert all(gather(placement).device == META for placement in placements)
        assert all(shard is None or shard.device.type == "cpu" for shard in direction.shards)


def test_sums_over_shards_are_made_where_passes_compute(engine: ElsewhereEngine) -> None:
    shards = direction_of(engine.module).shards
    with pytest.raises(NOT_READABLE, match="meta"):
        inner(engine, shards, shards)


def test_without_other_ranks_sums_over_rows_stay_where_they_are(engine: ElsewhereEngine) -> None:
    values = torch.ones(3)
    assert summed_over_ranks(engine, values) is values


def test_only_engines_ask_parameters_where_they_lie() -> None:
    """Everything else asks the engine."""
    folder = Path(str(probe.__file__)).parent
    asking = {path.name for path in folder.rglob("*.py") if "parameters()).device" in path.read_text(encoding="utf-8")}
    assert asking == {"fsdp.py"}


def test_a_plain_model_computes_where_its_parameters_lie() -> None:
    assert PlainEngine(make_model("llama"), [], TEMPERATURE).device.type == "cpu"
