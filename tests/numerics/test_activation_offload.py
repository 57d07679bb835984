# SPDX-License-Identifier: Apache-2.0
"""verl's activation offload counts a layer's forward passes up and its backward passes down.

A forward pass in train mode that no backward follows leaves its counters wrong, for the next pass and the next update.
verl's own handler runs here; only streams and pinned memory, which a CPU has not, are replaced.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from verl.utils import activation_offload
from verl.utils.activation_offload import (
    ActivationHandler,
    FSDPParameterFilter,
    SynchronizedGroupOffloadHandler,
    get_activation_offload_context,
)

from tests.numerics.cases import CANDIDATES, TRUSTED, score
from tests.numerics.models import finished, qwen2
from tests.numerics.problems import TEMPERATURE, tabulate
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import no_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemScores


class NoStream:
    def wait_stream(self, _: Any) -> None:
        pass


class NoDevice:
    Stream = current_stream = staticmethod(NoStream)

    @staticmethod
    def stream(_: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@pytest.fixture(autouse=True)
def without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "get_torch_device", lambda: NoDevice)
    offload = SynchronizedGroupOffloadHandler.offload
    unpinned = staticmethod(lambda tensor: offload(tensor, pin_memory=False))
    monkeypatch.setattr(SynchronizedGroupOffloadHandler, "offload", unpinned)


def make_model(has_checkpointing: bool, offloads: bool) -> nn.Module:
    """Return a model whose layers and head verl has wrapped, as it does where each is a unit of FSDP."""
    torch.manual_seed(0)
    # Eager: of torch's fused attention on a CPU the handler brings back another tensor for `o_proj` than it was given.
    model = finished(qwen2(tie_word_embeddings=False, attn_implementation="eager"), has_checkpointing)
    layers = [*model.model.layers, model.lm_head]
    if offloads:
        parameters = FSDPParameterFilter()
        context, commit = get_activation_offload_context(len(layers) - 1, len(layers), parameters)
        if has_checkpointing:
            model.gradient_checkpointing_disable()
        handler = ActivationHandler(context, commit, parameters, has_checkpointing)
        for layer in layers:
            handler.wrap_module_forward_method(layer)
    return model


def scored(model: nn.Module, estimator: str) -> ProblemScores:
    return score(estimator, model, TRUSTED, CANDIDATES, max_tokens=100, config=ProbeConfig(rank=4))


@pytest.mark.parametrize("has_checkpointing", [False, True])
@pytest.mark.parametrize("estimator", list(ESTIMATORS))
def test_scores_are_those_without_offload_and_the_next_pass_finds_the_counters_as_they_were(
    estimator: str, has_checkpointing: bool
) -> None:
    expected = scored(make_model(has_checkpointing, offloads=False), estimator)
    model = make_model(has_checkpointing, offloads=True)
    for _ in range(2):  # in several micro-batches, twice
        scores = scored(model, estimator)
        # A wrapped output layer gives whole logits, another one blocks of them.
        tolerance = {"rtol": 1e-7 if estimator == "finite_difference" else 1e-12, "atol": 1e-13}
        torch.testing.assert_close(scores.dot_P, expected.dot_P, **tolerance)
        assert expected.norm_P is None or torch.allclose(scores.norm_P, expected.norm_P, **tolerance)
    ids = torch.arange(12).view(2, 6)
    losses = []
    for each in (model, make_model(has_checkpointing, offloads=False)):
        loss = each(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append((loss.item(), each.model.layers[0].mlp.up_proj.weight.grad.sum().item()))
    assert losses[0] == losses[1]


def test_a_forward_pass_in_train_mode_without_a_backward_is_what_breaks_it() -> None:
    """What the estimators must not do."""
    model, ids = make_model(has_checkpointing=False, offloads=True), torch.arange(6).unsqueeze(0)
    with torch.no_grad(), pytest.raises(KeyError):
        for _ in range(2):
            model(input_ids=ids, use_cache=False)
    # The exception leaves the handler's hooks on torch's stack, where every later backward would meet them.
    while torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()


@pytest.mark.parametrize("estimator", ["finite_difference", "output_layer"])
def test_passes_that_no_layer_gets_a_backward_of_run_in_eval_mode(estimator: str) -> None:
    model = make_model(has_checkpointing=True, offloads=False)
    rows, shares = tabulate([*TRUSTED, *CANDIDATES])
    engine, modes = PlainEngine(model, rows, TEMPERATURE), []
    model.model.layers[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    with leave_no_trace(model):
        ESTIMATORS[estimator]().score(engine, shares[len(TRUSTED) :], no_direction(model))
        assert all(module.training for module in model.modules())
    assert modes and not any(modes)
