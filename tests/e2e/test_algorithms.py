# SPDX-License-Identifier: Apache-2.0
"""Verl's algorithms with selection: each run two steps, and what was kept is what its score and advantages say.

Every run also uses something else that needs a real run: a score, a schedule, several trusted sets, LoRA.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Run, Workplace, gradalign

pytestmark = pytest.mark.e2e

# Rollout and actor compute the same float32 forward with different batch shapes and padding.
ATOL_PROBABILITY = 1e-4
TWO_STEPS = "trainer.total_training_steps=2"


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


def test_grpo_without_std_and_steps_that_fall_back(workplace: Workplace) -> None:
    """With a score that needs each response's derivative, and a reliability that no step reaches."""
    run = workplace.run(
        "grpo",
        *gradalign("correlation", workplace.files, oversample=3),
        "algorithm.norm_adv_by_std_in_grpo=false",
        "gradalign.reliability.min_reliability=0.999",
        "gradalign.reliability.fallback=accuracy_greedy",
        TWO_STEPS,
    )
    for metrics in run.steps:
        assert metrics["gradalign/reliability/scores_problems"] >= 3
        assert metrics["gradalign/reliability/fallback"] == 1
        assert metrics["gradalign/kept_by/top"] + metrics["gradalign/kept_by/filler"] == 4
    scores = [row["score"] for row in run.log if row["score"] is not None]
    assert all(-1 - 1e-9 <= score <= 1 + 1e-9 for score in scores) and len(scores) > 4


def test_rloo_with_two_trusted_sets_of_which_one_fails(workplace: Workplace) -> None:
    """The second set's rewards cannot be computed: another reward function would be needed."""
    rows = pq.read_table(workplace.files["trusted"]).to_pylist()
    schema = pq.read_schema(workplace.files["trusted"])
    sets = []
    for name, members in (("good", rows[:16]), ("strange", rows[16:])):
        for row in members:
            row["data_source"] = row["data_source"] if name == "good" else "somebody/elses"
        path = workplace.root / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(members, schema=schema), path)
        sets.append(f"{{name: {name}, files: ['{path}'], weight: 2.0, n: 4}}")
    overrides = [o for o in gradalign("confident_cosine", workplace.files, oversample=3) if "validation.files" not in o]
    run = workplace.run(
        "rloo",
        *overrides,
        f"gradalign.validation.sets=[{', '.join(sets)}]",
        "gradalign.direction.aggregation=per_problem_unit",
        "algorithm.adv_estimator=rloo",
        TWO_STEPS,
    )
    check(run)
    for metrics in run.steps:
        assert metrics["gradalign/validation/failed"] == 8 and metrics["gradalign/validation/groups"] == 24
        assert metrics["gradalign/direction/good/norm"] > 0
        assert metrics["gradalign/direction/good/cosine"] == pytest.approx(1.0)
        assert "gradalign/direction/strange/norm" not in metrics


def test_reinforce_plus_plus_with_a_lower_bound_and_the_candidates_metric(workplace: Workplace) -> None:
    run = workplace.run(
        "reinforce",
        *gradalign("lower_bound", workplace.files, oversample=2),
        "algorithm.adv_estimator=reinforce_plus_plus",
        "gradalign.direction.metric=candidates",
        "gradalign.direction.metric_problems=4",
        TWO_STEPS,
    )
    check(run)


def test_ppo_scores_with_its_critics_advantages(workplace: Workplace) -> None:
    run = workplace.run(
        "ppo",
        *gradalign("cosine", workplace.files, oversample=2),
        "algorithm.adv_estimator=gae",
        f"critic.model.path={workplace.model}",
        "critic.ppo_micro_batch_size_per_gpu=32",
        TWO_STEPS,
    )
    check(run)
    # With a critic every response has an advantage, also where all rewards are equal.
    assert all(metrics["gradalign/live"] == metrics["gradalign/candidates"] == 8 for metrics in run.steps)
    assert all("critic/vf_loss" in metrics for metrics in run.steps)


def test_dapos_filter_replaces_dead_groups_before_the_selection(workplace: Workplace) -> None:
    """Trusted groups are left alone, and LearnAlign chooses among live candidates only."""
    run = workplace.run(
        "dapo",
        *gradalign("learnalign", workplace.files, oversample=2),
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=reward",
        # Two responses agree in every other group or so: that some of 16 groups are filtered is sure.
        "actor_rollout_ref.rollout.n=2",
        TWO_STEPS,
    )
    check(run)
    assert all(metrics["gradalign/candidates"] == 8 for metrics in run.steps)
    # Dead for us, not for DAPO, are equal responses with unequal (coin-flip) rewards.
    assert len(run.log) == 16 and all(row["success_rate"] == 0.5 for row in run.log)
    assert sum(metrics.get("training/filter_groups/evicted_samples", 0) for metrics in run.steps) > 0


def test_lora_and_kl_in_the_loss_with_a_sketch_of_the_pool(workplace: Workplace) -> None:
    """verl keeps a whole model's reference in pinned memory, which a CPU has not; an adapter's is the model itself."""
    run = workplace.run(
        "lora",
        *gradalign("pool_cosine", workplace.files, oversample=2),
        "gradalign.probe.pool_dots=sketch",
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora_alpha=16",
        "actor_rollout_ref.model.lora.merge=true",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.kl_loss_coef=0.01",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32",
        TWO_STEPS,
    )
    # verl stores what an adapter does not train in bfloat16: 2^-8 of a probability at most; measured 0.004.
    check(run, atol_probability=0.02)
    assert all(0 <= metrics["gradalign/probe/fidelity/spearman"] <= 1 for metrics in run.steps)
    assert all("actor/kl_loss" in metrics for metrics in run.steps)


def test_sessions_with_several_outputs_are_scored_as_one_response(workplace: Workplace) -> None:
    loops = workplace.root / "loops.yaml"
    loops.write_text("- name: two_outputs\n  _target_: tests.e2e.two_outputs.TwoOutputsAgentLoop\n")
    run = workplace.run(
        "two_outputs",
        *gradalign("lower_bound", workplace.files, oversample=2),
        "actor_rollout_ref.rollout.agent.default_agent_loop=two_outputs",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}",
        TWO_STEPS,
    )
    check(run)
    for step in (1, 2):
        kept = [row for row in run.log if row["step"] == step and row["kept"]]
        assert [row["num_responses"] for row in kept] == [8] * 4
        assert len(run.trained_rows(step)) == 64
        assert all(0 <= row["success_rate"] <= 1 for row in kept)


@pytest.fixture(scope="module")
def anonymous(workplace: Workplace) -> Path:
    """A small clean pool whose rows have no index, or all the same."""
    rows = pq.read_table(workplace.files["pool"]).to_pylist()[:24]
    for row in rows:
        row["extra_info"] = {"corrupted": False, "index": 7}
    schema = pq.read_schema(workplace.files["pool"])
    fields = [
        f
        if f.name != "extra_info"
        else pa.field("extra_info", pa.struct([("corrupted", pa.bool_()), ("index", pa.int64())]))
        for f in schema
    ]
    path = workplace.root / "anonymous.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), path)
    return path


def test_learnalign_once_after_a_warm_up_with_more_responses_than_training_takes(
    workplace: Workplace, anonymous: Path
) -> None:
    """Problems are told apart by their row, although every index is the same."""
    run = workplace.run(
        "once",
        *gradalign("learnalign", workplace.files, schedule="once"),
        f"data.train_files={anonymous}",
        "gradalign.curriculum.warmup_steps=1",
        "gradalign.curriculum.warmup_problems=8",
        "gradalign.curriculum.keep=6",
        "gradalign.curriculum.n=12",
        "trainer.total_training_steps=4",
    )
    check(run, num_steps=4)
    rows = {step: [row for row in run.log if row["step"] == step] for step in range(1, 5)}
    assert [len(rows[step]) for step in range(1, 5)] == [4, 24, 4, 4]
    assert {row["problem_id"] for row in rows[2]} == set(range(24))
    assert {row["num_responses"] for row in rows[2]} == {12} and {row["num_responses"] for row in rows[3]} == {8}
    kept = {row["problem_id"] for row in rows[2] if row["kept"]}
    assert len(kept) == 6
    # The step that scores trains on a batch of what it kept, later ones go on with the rest.
    trained = [row["problem_id"] for step in (3, 4) for row in rows[step]]
    assert set(trained) <= kept and len(run.trained_rows(2)) == 32
    assert [metrics["gradalign/candidates"] for metrics in run.steps] == [4, 24, 4, 4]


def test_the_asynchronous_trainer_selects_among_finished_groups(workplace: Workplace) -> None:
    run = workplace.run(
        "async",
        *gradalign("cosine", workplace.files, oversample=2),
        "trainer.v1.trainer_mode=gradalign_colocate_async",
        "trainer.v1.colocate_async.num_warmup_batches=2",
        "trainer.total_training_steps=4",
    )
    check_async(run)


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
