# SPDX-License-Identifier: Apache-2.0
"""Scoring calls that fail in the middle, on every rank at the same point.

with interrupted("tap", engine.module), pytest.raises(Interruption):
    score(engine, "ghost")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from verl_gradalign.integration import engine as adapter
from verl_gradalign.integration.engine import VerlEngine, coefficient_loss
from verl_gradalign.probe.engine import PreparedPass
from verl_gradalign.probe.estimators import finite_difference
from verl_gradalign.probe.taps import Taps

TAP_CALLS = 30
"""The tap that fails: the tiny models have 21 and 25 layers with weights, so it lies in the second micro-batch."""


class Interruption(Exception):
    """Raised on purpose in the middle of a scoring call."""


def interrupted(what: str, module: nn.Module) -> Any:
    """Return a context in which scoring fails: at "loss N", "gradient", "forward", "run", "tap",
    "second pass"; or "none"."""
    kind, _, number = what.partition(" ")
    contexts: dict[str, Callable[[], Any]] = {
        "none": nullcontext,
        "loss": lambda: _interrupted_loss(int(number)),
        "gradient": lambda: _interrupted_gradient(module),
        "forward": lambda: _interrupted_pass(module, "forward"),
        "run": lambda: _interrupted_run(module),
        "tap": _interrupted_tap,
        "second": lambda: _interrupted_second_pass(module),
    }
    return contexts[kind]()


def _fail_at(number: int) -> Callable[[], None]:
    """Return a function that draws random numbers, and raises at its `number`-th call."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        random.random(), np.random.rand(), torch.rand(1)
        if calls == number:
            raise Interruption

    return count


@contextmanager
def _interrupted_loss(number: int) -> Iterator[None]:
    count = _fail_at(number)

    def failing(*args: Any, **kwargs: Any) -> Any:
        count()
        return coefficient_loss(*args, **kwargs)

    with mock.patch.object(adapter, "coefficient_loss", failing):
        yield


@contextmanager
def _interrupted_gradient(module: nn.Module) -> Iterator[None]:
    """The second backward pass fails when it reaches the first decoder layer's output."""
    count = _fail_at(2)

    def watch(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            hidden.register_hook(lambda _grad: count())

    handle = _layer(module, 0).register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _interrupted_tap() -> Iterator[None]:
    """A tap fails in the middle of the second backward pass."""
    count, receive = _fail_at(TAP_CALLS), Taps._receive

    def failing(self: Taps, *args: Any) -> None:
        count()
        receive(self, *args)

    with mock.patch.object(Taps, "_receive", failing):
        yield


@contextmanager
def _interrupted_pass(module: nn.Module, method: str) -> Iterator[None]:
    """The second forward pass of the engine by a method of it fails before the second decoder layer."""
    forward = getattr(VerlEngine, method)
    calls = 0

    def counted(self: VerlEngine, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        with _failing_layer(module) if calls == 2 else nullcontext():
            return forward(self, *args)

    with mock.patch.object(VerlEngine, method, counted):
        yield


@contextmanager
def _interrupted_run(module: nn.Module) -> Iterator[None]:
    """The second pass that the engine has prepared fails before the second decoder layer."""
    prepare = VerlEngine.prepare
    calls = 0

    def counted(self: VerlEngine, *args: Any) -> PreparedPass:
        passed = prepare(self, *args)

        def run() -> Tensor:
            nonlocal calls
            calls += 1
            with _failing_layer(module) if calls == 2 else nullcontext():
                return passed.run()

        return replace(passed, run=run)

    with mock.patch.object(VerlEngine, "prepare", counted):
        yield


@contextmanager
def _interrupted_second_pass(module: nn.Module) -> Iterator[None]:
    """The first forward pass with the parameters moved against the direction fails before the second decoder layer."""
    perturbation = finite_difference.perturbation

    @contextmanager
    def watched(*args: Any) -> Iterator[Callable[[float], None]]:
        with ExitStack() as stack, perturbation(*args) as move:

            def watched_move(step: float) -> None:
                move(step)
                if step < 0:
                    stack.enter_context(_failing_layer(module))

            yield watched_move

    with mock.patch.object(finite_difference, "perturbation", watched):
        yield


@contextmanager
def _failing_layer(module: nn.Module) -> Iterator[None]:
    count = _fail_at(1)
    handle = _layer(module, 1).register_forward_pre_hook(lambda *_: count())
    try:
        yield
    finally:
        handle.remove()


def _layer(module: nn.Module, index: int) -> nn.Module:
    return next(child for name, child in module.named_modules() if name.endswith(f"layers.{index}"))
