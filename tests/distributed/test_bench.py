# SPDX-License-Identifier: Apache-2.0
"""The first half of `verl-gradalign bench` where neither verl nor what it brings can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from verl_gradalign.bench.registry import PARTS, VERL

pytestmark = pytest.mark.dist

TIMEOUT_S = 400  # measured 45 s
FIRST_HALF = [part.name for part in PARTS if part.packages != VERL]
BLOCKED = ("verl", "ray", "vllm", "transfer_queue", "tensordict", "hydra", "omegaconf", "datasets", "pyarrow", "wrapt")
# Python imports it at the start of every process, those of the parts and of their ranks too.
SITE = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("bench")
    (root / "sitecustomize.py").write_text(SITE, encoding="utf-8")
    command = [sys.executable, "-m", "verl_gradalign.cli", "bench", "--dry-run", "--only", ",".join(FIRST_HALF)]
    paths = os.pathsep.join([str(root), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [*command, "--output", str(root / "out")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (lines,) = (root / "out").glob("*.jsonl")
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def rows(records: list[dict[str, Any]], part: str, table: str) -> list[dict[str, Any]]:
    return [record for record in records if (record.get("part"), record.get("table")) == (part, table)]


def test_the_first_half_needs_torch_and_transformers_alone(records: list[dict[str, Any]]) -> None:
    ends = {record["part"]: record["status"] for record in records if record.get("event") == "ends"}
    assert ends == dict.fromkeys(FIRST_HALF, "done")
    assert set(FIRST_HALF) >= {"environment", "exactness", "neutrality", "speed", "ranks", "calculator", "lora"}


def test_every_claim_holds(records: list[dict[str, Any]]) -> None:
    claims = {record["claim"]: record["holds"] for record in records if "claim" in record}
    assert len(claims) > 30 and set(claims.values()) == {True}, claims


def test_exactness_and_fidelity_are_of_both_models_and_all_lengths(records: list[dict[str, Any]]) -> None:
    for table in ("float32", "bf16"):
        found = {(row["model"], row["problem"]) for row in rows(records, "exactness", table)}
        assert found == {(f"{size}, tiny", f"4 x {n}") for size in ("0.5b", "1.5b") for n in (32, 64, 128)}
    (precision,) = rows(records, "exactness", "precision")
    assert precision["float32_matmul"] == "highest" and precision["tf32"] is False
    # Sums of ten thousand float32 products.
    assert all(row["dot_rms"] < 1e-6 and row["norm_rms"] < 1e-6 for row in rows(records, "exactness", "float32"))


@pytest.mark.parametrize(("part", "ranks"), [("speed", 1), ("ranks", 2)])
def test_update_estimators_and_measuring_in_it_stand_side_by_side(
    records: list[dict[str, Any]], part: str, ranks: int
) -> None:
    found = {row["method"]: row for row in rows(records, part, "methods")}
    assert set(found) >= {"update", "measured update, whole", "measured update, rank 16", "ghost", "backward"}
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 and row["ranks"] == ranks for row in found.values())
    assert found["update"]["of_update"] == 1.0
    # `backward` puts parameters together for every problem; one rank alone has nothing to wait for.
    assert (found["backward"]["in_collectives"] > 0.01) == (ranks > 1)
    (gathers,) = rows(records, part, "gathers of the direction")
    assert 0 < gathers["share"] < 1 and gathers["by_unit_s"] < gathers["pass_s"]


def test_what_is_computed_stands_beside_what_is_measured(records: list[dict[str, Any]]) -> None:
    update, ghost = rows(records, "calculator", "memory and time")
    assert update["computed_of_update"] == update["measured_of_update"] == 1.0
    assert all(row["computed_gb"] > 0 and row["tflop_per_s"] > 0 for row in (update, ghost))
