# SPDX-License-Identifier: Apache-2.0
"""What happens when the trusted set, the rollout or the configuration is no good."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.conftest import Workplace, gradalign

pytestmark = pytest.mark.e2e

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="module")
def unanswerable(workplace: Workplace) -> Path:
    """A trusted set whose every answer is marked wrong."""
    rows = pq.read_table(workplace.files["trusted"]).to_pylist()
    for row in rows:
        row["reward_model"]["ground_truth"] = "no such answer"
    path = workplace.root / "unanswerable.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(workplace.files["trusted"])), path)
    return path


def test_a_trusted_set_without_direction_is_counted_and_training_goes_on(
    workplace: Workplace, unanswerable: Path
) -> None:
    run = workplace.run(
        "degenerate",
        *gradalign("cosine", {"trusted": unanswerable}, oversample=2),
        "trainer.total_training_steps=2",
    )
    assert len(run.steps) == 2
    for metrics in run.steps:
        assert metrics["gradalign/direction/degenerate"] == 1
        assert metrics["gradalign/validation/live"] == 0
        assert metrics["gradalign/kept_by/random"] == metrics["gradalign/kept"] == 4
        assert "gradalign/score/mean" not in metrics
    assert "gives no direction" in run.output
    assert all(row["score"] is None for row in run.log)


def test_on_degenerate_stop_ends_the_run_with_the_remedy(workplace: Workplace, unanswerable: Path) -> None:
    run = workplace.run(
        "stop",
        *gradalign("cosine", {"trusted": unanswerable}, oversample=1, direction__on_degenerate="stop"),
        "trainer.total_training_steps=2",
        may_fail=True,
    )
    assert run.returncode != 0
    assert "gradalign.direction.on_degenerate=stop" in run.output and "Remedy" in run.output


def test_failed_groups_are_left_out_and_counted(workplace: Workplace) -> None:
    reward = workplace.root / "failing_reward.py"
    reward.write_text(
        "from verl_gradalign.data.rewards import compute_score as score\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n"
        "    if extra_info['split'] == 'pool' and extra_info['index'] % 3 == 0:\n"
        "        raise RuntimeError('this reward always fails')\n"
        "    return score(data_source, solution_str, ground_truth, extra_info, **kwargs)\n"
    )
    run = workplace.run(
        "failing",
        *gradalign("dot", workplace.files, oversample=2, validation__n=4),
        f"reward.custom_reward_function.path={reward}",
        "trainer.total_training_steps=2",
    )
    assert len(run.steps) == 2
    failing = [row for row in run.log if row["problem_id"] % 3 == 0]
    assert failing and all(row["reason"] == "failed" and not row["kept"] for row in failing)
    assert sum(m["gradalign/rejected_by/failed"] for m in run.steps) == len(failing)


def test_a_bad_configuration_is_refused_before_any_worker_starts(workplace: Workplace) -> None:
    run = workplace.run(
        "bad_configuration",
        *gradalign("cosine", {"trusted": workplace.root / "no_such_file.parquet"}),
        "trainer.total_training_steps=2",
        may_fail=True,
    )
    assert run.returncode != 0
    assert "gradalign.validation.files=" in run.output and "no such file" in run.output and "Remedy" in run.output
    assert "WorkerDict" not in run.output


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K's jsonl files are not at ../shared/data/gsm8k")
def test_gsm8k_passes_through_every_stage(workplace: Workplace) -> None:
    """Real prompts and answers. The tiny model solves none of them, so no group is live and nothing is learned."""
    from verl_gradalign.data.gsm8k import write_gsm8k

    data = workplace.root / "gsm8k_data"
    pool = write_gsm8k(GSM8K / "train.jsonl", data / "pool.parquet", "pool", max_rows=64)
    trusted = write_gsm8k(GSM8K / "test.jsonl", data / "trusted.parquet", "trusted", max_rows=4)
    run = workplace.run(
        "gsm8k",
        *gradalign("cosine", {"trusted": trusted}, oversample=2),
        f"data.train_files={pool}",
        "data.max_prompt_length=896",
        "data.filter_overlong_prompts=true",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
        "trainer.total_training_steps=1",
    )
    assert len(run.steps) == 1
    assert {row["data_source"] for row in run.log} == {"openai/gsm8k"}
    assert run.steps[0]["gradalign/kept"] == 4
