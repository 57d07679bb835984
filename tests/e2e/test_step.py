# SPDX-License-Identifier: Apache-2.0
"""One step, end to end: what verl was given to train on, and what it trained on."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.e2e.runs import Run, Workplace

pytestmark = pytest.mark.e2e

# Rollout and actor compute the same float32 forward with different batch shapes and padding.
ATOL_PROBABILITY = 1e-4
# Two ranks sum the same float32 gradients in another order.
RTOL_FLOAT32 = 1e-3


def prompt_of(workplace: Workplace, problem_id: int) -> str:
    return pq.read_table(workplace.files["pool"])["prompt"][problem_id].as_py()[0]["content"]


def test_kept_groups_are_the_top_scored_ones(cosine_run: Run) -> None:
    for step in {row["step"] for row in cosine_run.log}:
        rows = [row for row in cosine_run.log if row["step"] == step]
        kept = [row["score"] for row in rows if row["reason"] == "top"]
        beaten = [row["score"] for row in rows if row["reason"] == "low_score"]
        assert len(kept) == 4 and len(rows) == 16
        assert min(kept) >= max(beaten)


def test_trained_rows_are_the_scored_rollouts(cosine_run: Run, workplace: Workplace) -> None:
    for step in range(1, 7):
        kept = {
            prompt_of(workplace, row["problem_id"]): row
            for row in cosine_run.log
            if row["step"] == step and row["kept"]
        }
        scores: dict[str, list[float]] = {prompt: [] for prompt in kept}
        for trained in cosine_run.trained_rows(step):
            prompt = next(p for p in kept if f"\n{p}\n" in trained["input"])
            scores[prompt].append(trained["score"])
        for prompt, row in kept.items():
            assert len(scores[prompt]) == row["num_responses"] == 8
            assert np.mean(scores[prompt]) == pytest.approx(row["success_rate"])


def test_weights_reach_the_rollout(cosine_run: Run) -> None:
    for metrics in cosine_run.steps:
        assert metrics["actor/grad_norm"] > 0
        assert metrics["training/rollout_probs_diff_max"] < ATOL_PROBABILITY


def test_corrupted_share_of_kept_groups_is_below_the_pools(cosine_run: Run, workplace: Workplace) -> None:
    corrupted = workplace.corrupted()
    live = [corrupted[row["problem_id"]] for row in cosine_run.log if row["score"] is not None]
    kept = [corrupted[row["problem_id"]] for row in cosine_run.log if row["kept"]]
    assert np.mean(kept) < corrupted.mean()
    assert np.mean(kept) < np.mean(live)


def test_metrics_count_every_candidate_once(cosine_run: Run) -> None:
    for step, metrics in enumerate(cosine_run.steps, start=1):
        rows = [row for row in cosine_run.log if row["step"] == step]
        assert metrics["gradalign/candidates"] == len(rows)
        assert metrics["gradalign/kept"] + metrics["gradalign/rejected"] == len(rows)
        for reason in ("low_score", "dead", "failed", "non_finite"):
            assert metrics[f"gradalign/rejected_by/{reason}"] == sum(row["reason"] == reason for row in rows)
        scores = [row["score"] for row in rows if row["score"] is not None]
        assert metrics["gradalign/live"] == len(scores)
        assert metrics["gradalign/score/max"] == pytest.approx(max(scores))
        assert metrics["gradalign/score/min"] == pytest.approx(min(scores))
        assert metrics["gradalign/score/mean"] == pytest.approx(np.mean(scores))
        assert metrics["gradalign/direction/norm"] > 0
        assert 0 < metrics["gradalign/seconds/share_of_step"] < 1


def test_metrics_are_in_the_console_too(cosine_run: Run) -> None:
    assert "gradalign/score/mean:" in cosine_run.output


def test_two_ranks_select_what_one_rank_selects(cosine_run: Run, two_ranks: Run) -> None:
    """Turned on by the single keys instead of the word, on FSDP1, with groups too large for a micro-batch."""
    assert sum(metrics["gradalign/probe/oversized"] for metrics in two_ranks.steps) > 0
    check_alike(cosine_run, two_ranks)


def test_ranks_that_have_slices_of_rows_select_what_one_rank_selects(cosine_run: Run, sliced: Run) -> None:
    """Ulysses, fused kernels and GSPO's loss, whose gradient at the policy that sampled is that of the plain one."""
    assert len(sliced.steps) == 2
    check_alike(cosine_run, sliced)


def check_alike(cosine_run: Run, run: Run) -> None:
    """The first step's scores and choice are the same."""
    for metrics in run.steps:
        assert metrics["training/rollout_probs_diff_max"] < ATOL_PROBABILITY
    first = {row["problem_id"]: row for row in cosine_run.log if row["step"] == 1}
    second = {row["problem_id"]: row for row in run.log if row["step"] == 1}
    assert set(first) == set(second)
    for problem_id, row in first.items():
        assert (row["kept"], row["reason"]) == (second[problem_id]["kept"], second[problem_id]["reason"])
        if row["dot"] is not None:
            assert second[problem_id]["norm"] == pytest.approx(row["norm"], rel=RTOL_FLOAT32)
            assert second[problem_id]["dot"] == pytest.approx(row["dot"], rel=RTOL_FLOAT32, abs=1e-3 * row["norm"])


def test_random_is_stock_verl_and_costs_nothing(series: dict[str, Run], stock: Run) -> None:
    """Same prompts, same rollouts, same update as verl without the word."""
    random = series["random"]
    assert not (stock.folder / "gradalign").exists()
    for ours, theirs in zip(random.steps, stock.steps, strict=True):
        assert ours["gradalign/candidates"] == ours["gradalign/kept"] == 4
        assert ours["gradalign/seconds/selection"] < 0.05 * ours["timing_s/step"]
        assert not [name for name in theirs if name.startswith("gradalign/")]
        for name in ("critic/score/mean", "actor/grad_norm", "actor/entropy", "response_length/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    for step in (1, 2):
        ours, theirs = (
            sorted(json.dumps([row["input"], row["output"]]) for row in run.trained_rows(step))
            for run in (random, stock)
        )
        assert ours == theirs


def test_verls_separate_async_trains_validates_and_receives_weights_on_the_cpu(separate: Run) -> None:
    """Both updates of a step have old log-probs of the weights that were pushed before the step."""
    assert len(separate.steps) == 2
    for step, metrics in enumerate(separate.steps, start=1):
        assert metrics["actor/grad_norm"] > 0 and metrics["timing_s/update_weights"] > 0
        assert metrics["training/rollout_probs_diff_max"] < ATOL_PROBABILITY
        assert len(separate.trained_rows(step)) == 4 * 8
    assert any(name.startswith("val-core/") for name in separate.steps[-1])
