# SPDX-License-Identifier: Apache-2.0
"""What happens when the trusted set, the rollout or the configuration is no good."""

import os

import numpy as np
import pytest

from tests.e2e.launches import GSM8K
from tests.e2e.runs import Run

pytestmark = pytest.mark.e2e


def test_a_trusted_set_without_direction_is_counted_and_training_goes_on(series: dict[str, Run]) -> None:
    run = series["degenerate"]
    assert len(run.steps) == 2
    for metrics in run.steps:
        assert metrics["gradalign/direction/degenerate"] == 1
        assert metrics["gradalign/validation/live"] == 0
        assert metrics["gradalign/kept_by/random"] == metrics["gradalign/kept"] == 4
        assert "gradalign/score/mean" not in metrics
    assert "gives no direction" in run.output
    assert all(row["score"] is None for row in run.log)


def test_on_degenerate_stop_ends_the_run_with_the_remedy(series: dict[str, Run]) -> None:
    run = series["stop"]
    assert run.returncode != 0
    assert "gradalign.direction.on_degenerate=stop" in run.output and "Remedy" in run.output


def test_failed_groups_are_left_out_and_counted(series: dict[str, Run]) -> None:
    run = series["failing"]
    assert len(run.steps) == 2
    failing = [row for row in run.log if row["problem_id"] % 3 == 0]
    assert failing and all(row["reason"] == "failed" and not row["kept"] for row in failing)
    assert sum(m["gradalign/rejected_by/failed"] for m in run.steps) == len(failing)


def test_groups_whose_rewards_are_not_finite_are_left_out_and_counted_as_that(series: dict[str, Run]) -> None:
    run = series["failing"]
    odd = [row for row in run.log if row["reason"] == "reward_not_finite"]
    assert odd and all(row["problem_id"] % 4 == 1 and not row["kept"] for row in odd)
    assert all(row["success_rate"] is None and row["score"] is None for row in odd)
    assert sum(m["gradalign/rejected_by/reward_not_finite"] for m in run.steps) == len(odd)
    assert np.isfinite([m["actor/grad_norm"] for m in run.steps]).all()


def test_where_every_answer_fails_the_run_stops_with_a_remedy_that_works(series: dict[str, Run]) -> None:
    """verl's own remedy is a key that this package refuses."""
    run = series["broken"]
    assert run.returncode != 0 and not run.steps
    assert "step 1: no group has an answer with a reward" in run.output
    assert "the grader is broken" in run.output and "Remedy: have reward.custom_reward_function give" in run.output


def test_workers_get_their_share_of_a_busy_machine(series: dict[str, Run]) -> None:
    """Ray starts them at niceness 15 otherwise, and whatever else computes on the machine starves them."""
    assert f"this reward always fails, at niceness {os.nice(0)}" in series["failing"].output


def test_a_bad_configuration_is_refused_before_any_worker_starts(bad_configuration: Run) -> None:
    run = bad_configuration
    assert run.returncode != 0
    assert "2 things must be changed before this can run" in run.output
    assert "no layer rule covers model.layers.0." in run.output and "Remedy: set gradalign.estimator" in run.output
    assert "gradalign.validation.files=" in run.output and "no such file" in run.output
    assert "WorkerDict" not in run.output


@pytest.mark.nightly
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K's jsonl files are not at ../shared/data/gsm8k")
def test_gsm8k_passes_through_every_stage(gsm8k: Run) -> None:
    """Real prompts and answers. The tiny model solves none of them, so no group is live and nothing is learned."""
    run = gsm8k
    assert len(run.steps) == 1
    assert {row["data_source"] for row in run.log} == {"openai/gsm8k"}
    assert run.steps[0]["gradalign/kept"] == 4
