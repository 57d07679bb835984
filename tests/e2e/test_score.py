# SPDX-License-Identifier: Apache-2.0
"""Offline scoring: killed and resumed, from a model and from verl's shards, against plain autograd in float64."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.offline import NUM_PROBLEMS, Resumed, Scoring, finish, start
from tests.e2e.runs import Workplace
from tests.numerics.oracle import problem_gradients_float64
from verl_gradalign.log.selection_log import read_selection_log
from verl_gradalign.probe.objective import token_coefficients
from verl_gradalign.types import TokenRow

pytestmark = pytest.mark.e2e

# float32 passes against float64 ones, of gradients that partly cancel.
RTOL, ATOL_COSINE = 1e-3, 1e-4


def gradients_of(rollouts: dict, model: Path) -> dict[tuple[str | None, int], torch.Tensor]:
    """Each live problem's gradient in float64, from its stored responses and rewards, by plain autograd."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    problems, members = [], []
    for member, rows in rollouts.items():
        rewards_R = torch.tensor([sum(row["rewards"]) for row in rows], dtype=torch.float64)
        distinct = {(tuple(row["response"])) for row in rows}
        if rewards_R.std() == 0 or len(distinct) == 1:
            continue
        advantage_R = (rewards_R - rewards_R.mean()) / (rewards_R.std() + 1e-6)
        mask_RT = torch.zeros(len(rows), max(len(row["response"]) for row in rows), dtype=torch.float64)
        for place, row in enumerate(rows):
            mask_RT[place, : len(row["response"])] = 1
        coefficient_RT = token_coefficients(advantage_R.unsqueeze(1) * mask_RT, mask_RT, "token-mean")
        problems.append(
            [
                TokenRow(torch.tensor(row["prompt"]), torch.tensor(row["response"]), c[: len(row["response"])])
                for row, c in zip(rows, coefficient_RT, strict=True)
            ]
        )
        members.append(member)
    return dict(zip(members, problem_gradients_float64(policy, problems, temperature=1.0), strict=True))


def test_scores_equal_plain_autograd_on_the_stored_rollouts(scored: Resumed, workplace: Workplace) -> None:
    scoring = scored.scoring
    gradients = gradients_of(scoring.rollouts(), workplace.model)
    direction = sum(gradient for (name, _), gradient in gradients.items() if name == "trusted")
    unit = direction / direction.norm()
    live = {problem_id: gradient for (name, problem_id), gradient in gradients.items() if name is None}
    assert {row["problem_id"] for row in scoring.scores if row["score"] is not None} == set(live)
    assert len(live) > NUM_PROBLEMS // 2
    for row in scoring.scores:
        if row["problem_id"] in live:
            gradient = live[row["problem_id"]]
            assert row["norm"] == pytest.approx(float(gradient.norm()), rel=RTOL)
            assert row["cosine"] == row["score"]
            assert row["cosine"] == pytest.approx(float(gradient @ unit / gradient.norm()), rel=RTOL, abs=ATOL_COSINE)
            assert row["dot"] == pytest.approx(row["cosine"] * row["norm"])
    assert scoring.summary["metrics"]["gradalign/direction/norm"] == pytest.approx(float(direction.norm()), rel=RTOL)


def test_nothing_is_rolled_out_or_scored_twice(scored: Resumed) -> None:
    scoring, times, lost = scored.scoring, scored.times, scored.lost
    state = scoring.folder / "state"
    assert {name: (state / name).stat().st_mtime_ns for name in times} == times
    rollouts = scoring.rollouts()
    assert sorted(i for name, i in rollouts if name is None) == list(range(NUM_PROBLEMS))
    assert sorted(i for name, i in rollouts if name == "trusted") == list(range(24))
    assert all(sorted(row["session"] for row in rows) == list(range(8)) for rows in rollouts.values())
    assert not list(scoring.folder.rglob("*.unfinished"))
    # What was lost has been rolled out again, to the same responses.
    groups = defaultdict(list)
    for row in lost:
        groups[row["trusted_set"], row["problem_id"]].append(row)
    for member, rows in groups.items():
        again, before = (sorted((r["response"], sum(r["rewards"])) for r in part) for part in (rollouts[member], rows))
        assert again == before, member


def test_the_selected_rows_are_the_best_and_load_as_verls_training_data(scored: Resumed, workplace: Workplace) -> None:
    from verl.utils.dataset.rl_dataset import RLHFDataset

    scoring = scored.scoring
    kept = [row["problem_id"] for row in scoring.scores if row["kept"]]
    others = [row["score"] for row in scoring.scores if row["reason"] == "low_score"]
    assert len(kept) == NUM_PROBLEMS // 4 and scoring.summary["kept"] == len(kept)
    assert min(row["score"] for row in scoring.scores if row["kept"]) >= max(others)
    selected = pq.read_table(scoring.folder / "selected.parquet")
    assert selected.schema.equals(pq.read_schema(scored.pool), check_metadata=True)
    assert selected.equals(pq.read_table(scored.pool).take(kept))
    config = OmegaConf.create({"prompt_key": "prompt", "max_prompt_length": 64, "filter_overlong_prompts": False})
    tokenizer = AutoTokenizer.from_pretrained(workplace.model)
    dataset = RLHFDataset([str(scoring.folder / "selected.parquet")], tokenizer, config)
    assert len(dataset) == len(kept) and dataset[0]["raw_prompt"]


def test_the_selection_log_holds_the_choice(scored: Resumed) -> None:
    scoring = scored.scoring
    log = read_selection_log(scoring.folder / "gradalign").to_pylist()
    assert [(row["problem_id"], row["kept"], row["reason"], row["score"]) for row in log] == [
        (row["problem_id"], row["kept"], row["reason"], row["score"]) for row in scoring.scores
    ]
    samples = pq.read_table(next((scoring.folder / "gradalign").glob("samples-*"))).to_pylist()
    assert samples and all(row["prompt"] and row["answer"] for row in samples)


def test_another_share_is_kept_without_starting_verl(scored: Resumed, workplace: Workplace) -> None:
    scoring = scored.scoring
    before = (scoring.folder / "state" / "run.log").stat().st_mtime_ns
    options = ["--trusted", workplace.files["trusted"], "--keep", "0.5"]
    half = finish(start(scored.pool, workplace.model, scoring.folder, *options), scoring.folder)
    assert half.summary["kept"] == NUM_PROBLEMS // 2 == pq.read_metadata(scoring.folder / "selected.parquet").num_rows
    assert (scoring.folder / "state" / "run.log").stat().st_mtime_ns == before


@pytest.mark.nightly
def test_learnalign_from_verls_shards_is_the_row_mean_of_the_dense_matrix(
    scored_from_shards: tuple[Scoring, Path],
) -> None:
    """V_i V_j cos(g_i, g_j) over the pool, of the exact weights in the shards."""
    scoring, policy = scored_from_shards
    rollouts = scoring.rollouts()
    gradients = {i: gradient for (_, i), gradient in gradients_of(rollouts, policy).items()}
    rates = {i: np.mean([sum(row["rewards"]) > 0 for row in rows]) for (_, i), rows in rollouts.items()}
    learnability = torch.tensor([rates[i] * (1 - rates[i]) for i in gradients])
    units = torch.stack([gradient / gradient.norm() for gradient in gradients.values()])
    dense = (torch.outer(learnability, learnability) * (units @ units.T)).sum(dim=1) / NUM_PROBLEMS
    expected = dict(zip(gradients, dense.tolist(), strict=True))
    found = {row["problem_id"]: row["score"] for row in scoring.scores if row["score"] is not None}
    assert set(found) == set(expected) and len(found) > 10
    for problem_id, value in expected.items():
        assert found[problem_id] == pytest.approx(value, rel=RTOL, abs=ATOL_COSINE * max(expected.values()))
    for row in scoring.scores:
        assert row["success_rate"] == pytest.approx(rates[row["problem_id"]])
    assert sum(row["kept"] for row in scoring.scores) == 10
