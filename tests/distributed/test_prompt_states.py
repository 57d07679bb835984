# SPDX-License-Identifier: Apache-2.0
"""Hidden states over prompts, read from verl's FSDP engine, are those of a plain forward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.comparison import case_of
from tests.distributed.conftest import RunGroup
from tests.distributed.setups import PROMPTS, exact_setups, plain_states, reference_model

pytestmark = pytest.mark.dist

ATOL = 1e-6  # states are handed over in float32; measured 1.2e-7, at states of size 3


@pytest.mark.parametrize(("num_ranks", "setup"), [(ranks, name) for ranks in (1, 2) for name in exact_setups(ranks)])
def test_states_on_verls_engine_are_those_of_a_plain_pass(
    root: Path, run_group: RunGroup, num_ranks: int, setup: str
) -> None:
    """Whatever the batching, and where one rank has no prompt at all."""
    options = exact_setups(num_ranks)[setup]
    measured = case_of(run_group(num_ranks), f"exact-{setup}")
    expected = plain_states(reference_model(root, options.model, options.has_adapters))
    assert expected.shape == (len(PROMPTS), 64) and expected.std() > 0.5
    for found in measured["prompts"]:
        torch.testing.assert_close(torch.tensor(found).double(), expected, atol=ATOL, rtol=0)
    torch.testing.assert_close(torch.tensor(measured["prompt"]).double(), expected[2:3], atol=ATOL, rtol=0)
