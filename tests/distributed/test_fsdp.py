# SPDX-License-Identifier: Apache-2.0
"""Scores on verl's FSDP engine equal the oracle's, and scoring leaves no trace in the engine."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.comparison import case_of, largest_errors
from tests.distributed.conftest import Oracle, RunGroup
from tests.distributed.setups import exact_setups, neutral_setups, scorings_of

pytestmark = pytest.mark.dist

RTOL_FLOAT64 = 1e-10  # measured 1e-12 for responses' derivatives, 1e-13 for dot products, 2e-15 for norms
EXACT = [(ranks, name) for ranks in (1, 2) for name in exact_setups(ranks)]
NEUTRAL = [
    (ranks, name, scoring)
    for ranks in (1, 2)
    for name, setup in neutral_setups(ranks).items()
    for scoring in scorings_of(setup)
]


@pytest.mark.parametrize("scoring", ["ghost-tight", "ghost-wide-turned", "backward"])
@pytest.mark.parametrize(("num_ranks", "setup"), EXACT)
def test_scores_on_verls_engine_equal_the_oracle(
    run_group: RunGroup, oracle: Oracle, num_ranks: int, setup: str, scoring: str
) -> None:
    actual = case_of(run_group(num_ranks), f"exact-{setup}")[scoring]
    options = exact_setups(num_ranks)[setup]
    errors = largest_errors(actual, oracle(options.model, options.has_adapters))
    assert errors.keys() >= {"dot", "norm", "cosine"} | ({"derivative"} if scoring != "backward" else set())
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert actual["ranks_agree"]


@pytest.mark.parametrize("setup", exact_setups(1))
def test_scores_do_not_depend_on_the_number_of_ranks_or_on_batching(run_group: RunGroup, setup: str) -> None:
    one, two = (case_of(run_group(num_ranks), f"exact-{setup}") for num_ranks in (1, 2))
    for scoring in ("ghost-tight", "ghost-wide-turned", "backward"):
        for other in (one[scoring], one["ghost-tight"]):
            errors = largest_errors(two[scoring], other)
            assert max(errors.values()) <= RTOL_FLOAT64, (scoring, errors)
            assert two[scoring]["num_tokens"] == other["num_tokens"]


@pytest.mark.parametrize(("num_ranks", "setup", "scoring"), NEUTRAL)
def test_scoring_leaves_no_trace_in_verls_engine(run_group: RunGroup, num_ranks: int, setup: str, scoring: str) -> None:
    assert case_of(run_group(num_ranks), f"neutral-{setup}")[scoring]["changed"] == []


@pytest.mark.parametrize(("num_ranks", "setup", "scoring"), NEUTRAL)
def test_the_next_training_step_is_that_of_an_engine_never_scored(
    run_group: RunGroup, num_ranks: int, setup: str, scoring: str
) -> None:
    assert case_of(run_group(num_ranks), f"neutral-{setup}")[scoring]["differs_after_step"] == []


def test_every_setting_is_met_by_tied_and_untied_models_on_two_ranks() -> None:
    met: dict[str, set[Any]] = {}
    for setup in exact_setups(2).values():
        met.setdefault(setup.strategy, set()).add((setup.model, setup.is_packed, setup.is_checkpointed))
    for combinations in met.values():
        for first, second in ((0, 1), (0, 2), (1, 2)):
            assert len({(c[first], c[second]) for c in combinations}) == 4
