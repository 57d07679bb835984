# SPDX-License-Identifier: Apache-2.0
"""The estimators in verl's own run: the exact one is watched, the cheap one reports how faithful it is."""

import math

import pytest

from tests.e2e.runs import Run

pytestmark = pytest.mark.e2e

# Two exact float32 computations of the same gradient, in other orders.
MAX_CANARY_FLOAT32 = 1e-4


def test_the_canary_agrees_and_runs_at_its_interval(cosine_run: Run) -> None:
    name = "gradalign/probe/canary/relative_error"
    assert 0 <= cosine_run.steps[0][name] < MAX_CANARY_FLOAT32
    assert not any(name in metrics for metrics in cosine_run.steps[1:])
    assert all(metrics["gradalign/probe/oversized"] == 0 for metrics in cosine_run.steps)


def test_finite_differences_select_on_packed_rows_and_report_their_fidelity(differences: Run) -> None:
    """With Adam's metric on the direction, kept in CPU memory."""
    run = differences
    assert len(run.steps) == 2
    for step, metrics in enumerate(run.steps, start=1):
        rows = [row for row in run.log if row["step"] == step]
        kept = [row["score"] for row in rows if row["reason"] == "top"]
        beaten = [row["score"] for row in rows if row["reason"] == "low_score"]
        assert kept and (not beaten or min(kept) >= max(beaten))
        assert all(row["norm"] is None for row in rows)
        if metrics["gradalign/live"] >= 3:
            assert metrics["gradalign/probe/fidelity/spearman"] > 0.5
        assert math.isfinite(metrics["actor/grad_norm"])
