# SPDX-License-Identifier: Apache-2.0
"""The direction of kept responses on verl's FSDP engine, against autograd with the ratios written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.comparison import case_of, largest_errors
from tests.distributed.replay import weighed
from tests.distributed.setups import TRUSTED, oracle_scores, reference_model

pytestmark = pytest.mark.dist

RTOL_FLOAT64 = 1e-10  # measured 5e-14
SHARDINGS = ("fsdp", "fsdp2")


@pytest.mark.parametrize("strategy", SHARDINGS)
@pytest.mark.parametrize("is_moved", [False, True], ids=["same-policy", "moved-policy"])
def test_the_direction_is_that_of_truncated_ratios(
    root: Path, results: dict[str, Any], strategy: str, is_moved: bool
) -> None:
    name = "moved-policy" if is_moved else "same-policy"
    scores = case_of(results, f"replay-{strategy}")[name]
    problems = [weighed(problem, is_moved) for problem in TRUSTED]
    expected = oracle_scores(reference_model(root, "qwen2", has_adapters=False), trusted=[rows for rows, _ in problems])
    errors = largest_errors(scores, expected)
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert scores["ranks_agree"]
    found = [row for _, rows in problems for row in rows]
    weights = [min(ratio, 2.0) for _, ratios in found for ratio in ratios]
    assert scores["shares"] == {
        "direction/dropped": pytest.approx(sum(share < 0.5 for share, _ in found) / len(found)),
        "direction/effective_sample": pytest.approx(sum(share for share, _ in found) / len(found)),
        "direction/ratio": pytest.approx(sum(weights) / len(weights)),
    }
    if is_moved:
        assert 0 < scores["shares"]["direction/dropped"] < 0.6 and max(weights) == 2.0


@pytest.mark.parametrize("strategy", SHARDINGS)
def test_with_the_same_policy_the_direction_is_the_one_without_ratios(results: dict[str, Any], strategy: str) -> None:
    case = case_of(results, f"replay-{strategy}")
    assert max(largest_errors(case["same-policy"], case["same-policy-unweighed"]).values()) <= RTOL_FLOAT64
    # And a row that is not replayed is not weighed, whatever log-probs lie beside it.
    assert max(largest_errors(case["moved-policy-unweighed"], case["same-policy-unweighed"]).values()) <= RTOL_FLOAT64
    assert max(largest_errors(case["moved-policy"], case["same-policy"]).values()) > 0.1
