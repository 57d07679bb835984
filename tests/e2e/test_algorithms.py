# SPDX-License-Identifier: Apache-2.0
"""Verl's algorithms with selection: each run two steps, and what was kept is what its score and advantages say.

Every run also uses something else that needs a real run: a score, a schedule, several trusted sets, LoRA.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.e2e.runs import Run

pytestmark = pytest.mark.e2e

# Rollout and actor compute the same float32 forward with different batch shapes and padding.
ATOL_PROBABILITY = 1e-4


def check(run: Run, num_steps: int = 2, atol_probability: float = ATOL_PROBABILITY) -> None:
    """Every scored step kept the best of its candidates, and training went on."""
    assert len(run.steps) == num_steps
    for step, metrics in enumerate(run.steps, start=1):
        rows = [row for row in run.log if row["step"] == step]
        kept = [row["score"] for row in rows if row["reason"] == "top"]
        beaten = [row["score"] for row in rows if row["reason"] == "low_score"]
        assert not beaten or (kept and min(kept) >= max(beaten))
        assert math.isfinite(metrics["actor/grad_norm"])
        assert metrics["training/rollout_probs_diff_max"] < atol_probability
    assert any(row["score"] is not None for row in run.log)


def test_grpo_without_std_and_steps_that_fall_back(series: dict[str, Run]) -> None:
    """With a score that needs each response's derivative, and a reliability that no step reaches."""
    run = series["grpo"]
    for metrics in run.steps:
        assert metrics["gradalign/reliability/scores_problems"] >= 3
        assert metrics["gradalign/reliability/fallback"] == 1
        assert metrics["gradalign/kept_by/top"] + metrics["gradalign/kept_by/filler"] == 4
    scores = [row["score"] for row in run.log if row["score"] is not None]
    assert all(-1 - 1e-9 <= score <= 1 + 1e-9 for score in scores) and len(scores) > 4


def test_rloo_with_two_trusted_sets_of_which_one_fails(series: dict[str, Run]) -> None:
    """The second set's rewards cannot be computed. A rollout correction finds rollout and actor to be of one mind."""
    run = series["rloo"]
    check(run)
    for metrics in run.steps:
        assert metrics["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=1e-3)
        assert metrics["gradalign/validation/failed"] == 8 and metrics["gradalign/validation/groups"] == 24
        assert metrics["gradalign/direction/good/norm"] > 0
        assert metrics["gradalign/direction/good/cosine"] == pytest.approx(1.0)
        assert "gradalign/direction/strange/norm" not in metrics


def test_reinforce_plus_plus_with_a_lower_bound_and_the_candidates_metric(series: dict[str, Run]) -> None:
    run = series["reinforce"]
    check(run)


def test_ppo_scores_with_its_critics_advantages(ppo: Run) -> None:
    run = ppo
    check(run)
    # With a critic every response has an advantage, also where all rewards are equal.
    assert all(metrics["gradalign/live"] == metrics["gradalign/candidates"] == 8 for metrics in run.steps)
    assert all("critic/vf_loss" in metrics for metrics in run.steps)


def test_dapos_filter_replaces_dead_groups_before_the_selection(series: dict[str, Run]) -> None:
    """Trusted groups are left alone, and LearnAlign chooses among live candidates only."""
    run = series["dapo"]
    check(run)
    assert all(metrics["gradalign/candidates"] == 8 for metrics in run.steps)
    # Dead for us, not for DAPO, are equal responses with unequal (coin-flip) rewards.
    assert len(run.log) == 16 and all(row["success_rate"] == 0.5 for row in run.log)
    assert sum(metrics.get("training/filter_groups/evicted_samples", 0) for metrics in run.steps) > 0


def test_lora_and_kl_in_the_loss_with_a_sketch_of_the_pool(lora: Run) -> None:
    """verl keeps a whole model's reference in pinned memory, which a CPU has not; an adapter's is the model itself."""
    run = lora
    # verl stores what an adapter does not train in bfloat16: 2^-8 of a probability at most; measured 0.004.
    check(run, atol_probability=0.02)
    assert all(0 <= metrics["gradalign/probe/fidelity/spearman"] <= 1 for metrics in run.steps)
    assert all("actor/kl_loss" in metrics for metrics in run.steps)


def test_sessions_with_several_outputs_are_scored_as_one_response(two_outputs: Run) -> None:
    run = two_outputs
    check(run)
    for step in (1, 2):
        kept = [row for row in run.log if row["step"] == step and row["kept"]]
        assert [row["num_responses"] for row in kept] == [8] * 4
        assert len(run.trained_rows(step)) == 64
        assert all(0 <= row["success_rate"] <= 1 for row in kept)


def test_learnalign_once_after_a_warm_up_with_more_responses_than_training_takes(series: dict[str, Run]) -> None:
    """Problems are distinguished by their row, although every index is the same."""
    run = series["once"]
    check(run, num_steps=4)
    rows = {step: [row for row in run.log if row["step"] == step] for step in range(1, 5)}
    assert [len(rows[step]) for step in range(1, 5)] == [4, 24, 4, 4]
    assert {row["problem_id"] for row in rows[2]} == set(range(24))
    assert {row["num_responses"] for row in rows[2]} == {12} and {row["num_responses"] for row in rows[3]} == {8}
    kept = {row["problem_id"] for row in rows[2] if row["kept"]}
    assert len(kept) == 6
    # The step that scores trains on a batch of what it kept, later ones take the rest.
    trained = [row["problem_id"] for step in (3, 4) for row in rows[step]]
    assert set(trained) <= kept and len(run.trained_rows(2)) == 32
    assert [metrics["gradalign/candidates"] for metrics in run.steps] == [4, 24, 4, 4]


def test_the_asynchronous_trainer_selects_among_finished_groups(asynchronous: Run) -> None:
    check_async(asynchronous)


def test_rewards_that_are_nan_or_missing_cost_their_groups_alone(asynchronous: Run) -> None:
    """On verl's own agent loop, whose rows have no reward at all where the reward function returns None."""
    odd = [row for row in asynchronous.log if row["problem_id"] % 7 < 2]
    assert {row["problem_id"] % 7 for row in odd} == {0, 1}
    assert all(row["reason"] == "reward_not_finite" and not row["kept"] for row in odd)
    assert all(row["reason"] != "reward_not_finite" for row in asynchronous.log if row not in odd)
    # A reward worker was asked, and what it raised is told.
    assert "For an empty answer the reward function raises ValueError: there is no answer" in asynchronous.output


def check_async(run: Run) -> None:
    assert len(run.steps) == 4
    ids = [row["problem_id"] for row in run.log]
    assert len(set(ids)) == len(ids) == 32, "every candidate is scored once, whenever it was finished"
    for step, metrics in enumerate(run.steps, start=1):
        rows = [row for row in run.log if row["step"] == step]
        kept = [row["score"] for row in rows if row["reason"] == "top"]
        beaten = [row["score"] for row in rows if row["reason"] == "low_score"]
        assert len(rows) == 8 and (not beaten or min(kept) >= max(beaten))
        assert metrics["gradalign/kept"] == 4
    # Candidates of the warm-up were generated before the first update and scored after it.
    assert max(m["training/off_policy/trajectory_staleness/max"] for m in run.steps) >= 1
    assert np.isfinite([m["actor/grad_norm"] for m in run.steps]).all()
