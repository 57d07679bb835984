# SPDX-License-Identifier: Apache-2.0
"""Scoring leaves a model as it was: weights, gradients, flags, hooks, generators, and no activations in memory."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from tests.numerics.cases import CANDIDATES, TRUSTED
from tests.numerics.models import make_model
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.head import plain_head
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.tap_points import tap_points
from verl_gradalign.probe.taps import tapped


def observe(model: nn.Module) -> list[object]:
    parameters = list(model.parameters())
    tensors = [p.detach().clone() for p in parameters] + [p.grad.clone() for p in parameters if p.grad is not None]
    flags = [p.requires_grad for p in parameters] + [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules()]
    states = [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]
    return [*(t.numpy().tobytes() for t in tensors), flags, hooks, [id(p.grad) for p in parameters], states]


@pytest.mark.parametrize("fails", [False, True], ids=["in-peace", "interrupted"])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_scoring_leaves_no_trace(estimator: str, fails: bool) -> None:
    model = make_model("qwen2-tied")
    rows, shares = tabulate([*TRUSTED, *CANDIDATES])
    engine = PlainEngine(model, rows, TEMPERATURE)
    engine.backward(shares[:1])
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    before = observe(model)

    def scoring() -> None:
        with leave_no_trace(model):
            model.train()
            model.model.norm.weight.requires_grad_(True)
            torch.rand(1), np.random.rand(1), random.random()
            direction = compute_direction(engine, shares[: len(TRUSTED)])
            ESTIMATORS[estimator]().score(engine, shares[len(TRUSTED) :], direction)
            if fails:
                engine.backward(shares)
                raise ArithmeticError("in the middle of scoring")

    if fails:
        with pytest.raises(ArithmeticError):
            scoring()
    else:
        scoring()
    assert observe(model) == before


@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_the_next_gradient_is_bit_identical_to_that_without_scoring(estimator: str) -> None:
    gradients = []
    for is_scored in (False, True):
        model = make_model("qwen3-tied", has_checkpointing=True)
        rows, shares = tabulate([*TRUSTED, *CANDIDATES])
        engine = PlainEngine(model, rows, TEMPERATURE)
        if is_scored:
            with leave_no_trace(model):
                direction = compute_direction(engine, shares[: len(TRUSTED)])
                ESTIMATORS[estimator]().score(engine, shares[len(TRUSTED) :], direction)
        engine.backward(shares)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize("estimator", ["ghost", "low_rank", "output_layer"])
def test_weights_get_no_gradient_while_tapped(estimator: str) -> None:
    model = make_model("qwen2-tied")
    rows, shares = tabulate([*TRUSTED, *CANDIDATES])
    engine = PlainEngine(model, rows, TEMPERATURE)
    with leave_no_trace(model):
        direction = compute_direction(engine, shares[: len(TRUSTED)])
        ESTIMATORS[estimator]().score(engine, shares[len(TRUSTED) :], direction)
        assert all(parameter.grad is None for parameter in model.parameters())


def activations_alive_after_forward(model: nn.Module, is_tapped: bool) -> int:
    """Return how many inputs of linear layers inside the decoder layers are still in memory after a forward pass."""
    rows, _ = tabulate(CANDIDATES)
    engine = PlainEngine(model, rows, TEMPERATURE)
    plain_head(engine)  # found by a pass of its own
    alive: list[weakref.ref] = []
    watched = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("down_proj", "o_proj", "up_proj"))
    ]
    handles = [m.register_forward_pre_hook(lambda _, args: alive.append(weakref.ref(args[0]))) for m in watched]
    with leave_no_trace(model):
        if is_tapped:
            zeros, head = (lambda placement: torch.zeros(placement.shape)), plain_head(engine)
            with tapped(model, tap_points(model), zeros, head=head) as taps:
                log_prob_RT, _ = taps.forward(engine, (0, 1, 2), (3,))
        else:
            log_prob_RT, _ = engine.forward((0, 1, 2), (3,))
        gc.collect()
        count = sum(reference() is not None for reference in alive)
    for handle in handles:
        handle.remove()
    assert log_prob_RT.requires_grad and len(alive) == len(watched)
    return count


def test_taps_keep_no_checkpointed_activation() -> None:
    # Without checkpointing the same taps keep every layer's input: the count sees something.
    assert activations_alive_after_forward(make_model("qwen2-untied"), is_tapped=True) > 0
    checkpointed = make_model("qwen2-untied", has_checkpointing=True)
    without = activations_alive_after_forward(checkpointed, is_tapped=False)
    assert activations_alive_after_forward(checkpointed, is_tapped=True) <= without
