# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: scores of ghost equal autograd's, whatever goes to which expert and however it is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.numerics.cases import CANDIDATES, DEAD, EMPTY, TRUSTED, errors, expect, score
from tests.numerics.families import float64_by_default
from tests.numerics.models import mixture_of_experts, train_only
from verl_gradalign.config import ProbeConfig

KINDS = [*CANDIDATES, DEAD, *EMPTY]
RTOL_FLOAT64 = 1e-9
RTOL_ROUTER = 1e-7  # in float32, as routers compute
RTOL_FLOAT32 = 1e-3
PARTS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "routers": lambda name: name.endswith("gate.weight"),
    "gate and up": lambda name: "gate_up_proj" in name,
    "down": lambda name: "down_proj" in name,
    "all but experts": lambda name: "experts" not in name,
}


@pytest.mark.parametrize("per_response", [True, False])
@pytest.mark.parametrize("max_tokens", [16384, 90, 45])
@pytest.mark.parametrize("part", list(PARTS))
def test_scores_equal_autograd(part: str, max_tokens: int, per_response: bool) -> None:
    """All at once, in several micro-batches, and with problems that are cut."""
    model = train_only(mixture_of_experts(), PARTS[part])
    config = ProbeConfig(response_derivatives=per_response)
    with float64_by_default():  # routers compute in float32
        scores = score("ghost", model, TRUSTED, KINDS, max_tokens, config)
        found = errors(scores, expect(model, TRUSTED, KINDS))
    assert max(found.values()) <= RTOL_FLOAT64, found


def test_checkpointed_layers_are_recomputed_alike() -> None:
    model = mixture_of_experts(has_checkpointing=True)
    found = errors(score("ghost", model, TRUSTED, KINDS), expect(model, TRUSTED, KINDS))
    assert max(found.values()) <= RTOL_ROUTER, found


def test_a_direction_cut_at_full_rank_gives_the_same_products() -> None:
    model = mixture_of_experts()
    scores = score("low_rank", model, TRUSTED, KINDS, config=ProbeConfig(rank=1000))
    found = errors(scores, expect(model, TRUSTED, KINDS))
    assert max(found["dot"], found["derivative"]) <= RTOL_ROUTER, found


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_other_ways_to_compute_experts_are_the_same_layer(implementation: str) -> None:
    """They have no float64."""
    model = mixture_of_experts(implementation=implementation).float()
    exact = mixture_of_experts()
    scores, expected = score("ghost", model, TRUSTED, KINDS), expect(exact, TRUSTED, KINDS)
    found = errors(scores, expected)
    assert max(found.values()) <= RTOL_FLOAT32, found


def test_experts_that_put_out_something_else_are_refused() -> None:
    model = mixture_of_experts()
    layer = model.model.layers[0].mlp.experts

    class Doubling(type(layer)):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(*args)

    layer.__class__ = Doubling
    with pytest.raises(RuntimeError, match=r"mlp.experts \(Doubling\) puts out something else"):
        score("ghost", model, TRUSTED, KINDS)


def test_a_router_whose_logits_are_not_one_product_is_refused() -> None:
    class TwiceRouter(type(mixture_of_experts().model.layers[0].mlp.gate)):
        def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return super().forward(hidden_states + nn.functional.linear(hidden_states, self.weight).mean())

    model = mixture_of_experts()
    model.model.layers[0].mlp.gate.__class__ = TwiceRouter
    with pytest.raises(RuntimeError, match=r"layers.0.mlp.gate was called more than once.*estimator=backward"):
        score("ghost", model, TRUSTED, KINDS)
