# SPDX-License-Identifier: Apache-2.0
"""A pass asks the device for nothing, and sends it no indices, layer by layer: on a GPU each would be a stall.

Shape legend: N positions, O outputs, I inputs, D features, R rows.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.numerics.cases import ALL_KINDS, TRUSTED
from tests.numerics.models import qwen2
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.layer_rules import LayerCall, layer_norm, linear, rms_norm
from verl_gradalign.probe.layout import packed_layout
from verl_gradalign.probe.plain_engine import PlainEngine

ASKED = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "is_nonzero", "equal")
"""Operators whose result the host waits for."""
SENT = ("lift_fresh",)
"""By which a tensor is made of Python's numbers."""


class Waits(TorchDispatchMode):
    """Counts the operators that a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._opname in ASKED + SENT:
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("per_response", [True, False])
@pytest.mark.parametrize("is_tied", [True, False])
def test_no_layer_is_waited_for(is_tied: bool, per_response: bool) -> None:
    found = []
    for num_layers in (1, 3):
        torch.manual_seed(0)
        model = qwen2(tie_word_embeddings=is_tied, num_hidden_layers=num_layers).train()
        rows, shares = tabulate(TRUSTED + ALL_KINDS)
        engine = PlainEngine(model, rows, TEMPERATURE)
        estimator = ESTIMATORS["ghost"](ProbeConfig(response_derivatives=per_response))
        with leave_no_trace(model):
            direction = compute_direction(engine, shares[:2])
            estimator.score(engine, shares, direction)  # finds out, once, what the model does with its logits
            with Waits() as waits:
                estimator.score(engine, shares, direction)
        found.append(waits.counts)
    assert found[0] == found[1] and found[0].total() > 0, found


def test_indices_of_packed_rows_are_made_for_the_first_layer_alone() -> None:
    layout = packed_layout((5, 9, 7, 3), 26, (3, 1))
    scale_R, counts = torch.ones(4), []
    layers = ((nn.Linear(6, 8), linear), (nn.RMSNorm(8), rms_norm), (nn.LayerNorm(8), layer_norm))
    for _ in range(2):
        with Waits() as waits:
            for module, rule in layers:
                direction = {name: torch.randn(parameter.shape) for name, parameter in module.named_parameters()}
                input_NI = torch.randn(26, 6 if rule is linear else 8)
                rule(LayerCall(module, input_NI, torch.randn(26, 8), direction, layout, scale_R))
        counts.append(waits.counts)
    assert counts[0].total() > 0 and counts[1].total() == 0, counts
