# SPDX-License-Identifier: Apache-2.0
"""Kept trusted responses in a real TransferQueue: what is kept, the direction made of it, and the same after a resume.

`store_case.py` runs once; the tests assert on what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.distributed.conftest import REPOSITORY
from tests.distributed.store_case import BATCH_SIZE, DEAD, FAILED, NUM_PROBLEMS, NUM_RANKS, N
from verl_gradalign.config import DirectionConfig, GradAlignConfig
from verl_gradalign.metrics import metric_of
from verl_gradalign.selection.trusted_turns import TrustedTurns

pytestmark = pytest.mark.dist

TIMEOUT_S = 540  # measured 15 s of processor time, and three minutes on two cores shared by thirty processes
PART = DirectionConfig().part * BATCH_SIZE * N


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("store")
    environment = {**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.distributed.store_case", str(folder)]
    process = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def audited() -> set[int]:
    direction = DirectionConfig(train_on_trusted=True, audit=0.2)
    audit = TrustedTurns(GradAlignConfig(schedule="forecast", direction=direction), {"trusted": range(NUM_PROBLEMS)})
    return set(audit.audit["trusted"])


def in_v() -> list[int]:
    return [i for i in range(NUM_PROBLEMS) if i not in {DEAD, FAILED, *audited()}]


def steps_of(keys: list[str]) -> dict[int, list[int]]:
    """Return the steps whose responses are kept, by problem; each must have all of its group's."""
    rollouts = sorted({key.split("_")[0] for key in keys})
    assert sorted(keys) == sorted(f"{uid}_{k}_0" for uid in rollouts for k in range(N))
    pairs = [map(int, uid.removeprefix("p").split("s")) for uid in rollouts]
    steps: dict[int, list[int]] = {}
    for problem_id, step in pairs:
        steps.setdefault(problem_id, []).append(step)
    return steps


def test_rows_are_kept_of_live_problems_outside_the_audit(found: dict[str, Any]) -> None:
    steps = steps_of(found["after_a_turn"])
    assert sorted(steps) == in_v() and len(audited()) == 1
    assert all(len(of_problem) == 1 for of_problem in steps.values())


def test_the_last_rollouts_are_kept_and_rows_of_older_ones_cleared(found: dict[str, Any]) -> None:
    steps = steps_of(found["after_turns"])
    # Of four turns of two steps, the last two.
    assert all([(step + 1) // 2 for step in of_problem] == [3, 4] for of_problem in steps.values())
    assert sorted(steps) == in_v()


def test_verls_partition_is_left_as_it_was(found: dict[str, Any]) -> None:
    assert found["in_train"] == 4 * NUM_PROBLEMS * N


def test_log_probs_are_computed_on_rows_that_divide_by_the_ranks_and_no_filling_stays(found: dict[str, Any]) -> None:
    assert all(size % NUM_RANKS == 0 for size in found["padded_sizes"])
    assert sum(found["padded_sizes"]) > len(found["after_a_turn"])
    assert not any(key.startswith("pad") for key in found["after_a_turn"])


def test_what_may_be_trained_on_is_neither_failed_nor_audited(found: dict[str, Any]) -> None:
    assert found["trainable"] and not {FAILED, *audited()} & set(found["trainable"])


def test_with_an_unchanged_policy_the_direction_is_the_one_of_fresh_responses(found: dict[str, Any]) -> None:
    case = found["same_policy"]
    assert case["is_fresh"] and case["shares"]["direction/dropped"] == 0.0
    assert case["shares"]["direction/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert case["shares"]["direction/effective_sample"] == pytest.approx(1.0, abs=1e-5)
    assert found["error_same_policy"] < 1e-5  # of unit directions in float32; measured 5e-7


def test_ratios_matter_once_the_policy_has_moved(found: dict[str, Any]) -> None:
    assert found["change_by_ratios"] > 1e-3
    assert any(abs(case["shares"]["direction/ratio"] - 1) > 1e-3 for case in found["moved_policy"])


def test_every_step_reads_another_part_of_whole_groups(found: dict[str, Any]) -> None:
    assert found["num_distinct"] >= 4
    for case in found["moved_policy"]:
        assert PART <= case["metrics"]["direction/part_responses"] < PART + N
        assert case["reports"]["trusted"]["half_cosine"] is not None


def test_accuracy_and_audit_are_told_apart(found: dict[str, Any]) -> None:
    metrics = found["same_policy"]["metrics"]
    # All are half right but the dead one; of the failed one nothing is known.
    rights = [1.0 if i == DEAD else 0.5 for i in range(NUM_PROBLEMS) if i not in {FAILED, *audited()}]
    of_audit = [1.0 if i == DEAD else 0.5 for i in audited() - {FAILED}]
    assert metrics["direction/accuracy"] == sum(rights) / len(rights)
    assert metrics["direction/audit_accuracy"] == sum(of_audit) / len(of_audit)
    assert metrics["direction/audit_gap"] == metrics["direction/accuracy"] - metrics["direction/audit_accuracy"]
    assert metrics["direction/kept_responses"] == len(found["after_a_turn"])
    assert all(metric_of(name) for name in {**metrics, **found["same_policy"]["shares"]})


def test_a_resumed_store_gives_the_same_directions_bit_for_bit(found: dict[str, Any]) -> None:
    assert found["after_resuming"] == found["after_turns"]
    assert len(found["is_resumed"]) == 6 and all(found["is_resumed"])


@pytest.mark.parametrize("damage", ["missing", "damaged", "other", "lacking"])
def test_a_file_of_rows_that_is_not_the_states_is_refused_with_the_remedy(found: dict[str, Any], damage: str) -> None:
    message = found["refusals"][damage]
    assert "gradalign_trusted.pt" in message and "Remedy: restore the file, or delete gradalign.npz" in message


def test_responses_without_finite_log_probs_enter_no_direction(found: dict[str, Any]) -> None:
    assert found["not_finite"] == {"rows_left": [], "is_drawn": False}


def test_images_and_their_positions_survive_copy_and_file(found: dict[str, Any]) -> None:
    assert found["images_differ"] == []
