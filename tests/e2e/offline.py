# SPDX-License-Identifier: Apache-2.0
"""Launches of `verl-gradalign score`, and what is read of the folder that it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from tests.e2e.runs import BATCHED, REPOSITORY, TIMEOUT_S, Workplace, cpu_environment, kill_at_marker

NUM_PROBLEMS = 48


@dataclass(frozen=True)
class Scoring:
    """A folder that `verl-gradalign score` wrote, and what it printed last."""

    folder: Path
    summary: dict

    @property
    def scores(self) -> list[dict]:
        return pq.read_table(self.folder / "scores.parquet").to_pylist()

    def rollouts(self) -> dict[tuple[str | None, int], list[dict]]:
        """All stored rows by trusted set and problem."""
        rows = [row for path in rollout_files(self.folder) for row in pq.read_table(path).to_pylist()]
        groups = defaultdict(list)
        for row in rows:
            groups[row["trusted_set"], row["problem_id"]].append(row)
        return dict(groups)


@dataclass(frozen=True)
class Resumed:
    """A scoring that was killed and resumed."""

    scoring: Scoring
    pool: Path
    times: dict[str, int]
    """Of the files that the killed one left."""
    lost: list[dict]
    """Rows that the resumed one was deprived of."""


def rollout_files(folder: Path) -> list[Path]:
    return sorted((folder / "state").glob("rollouts-*.parquet"))


def start(pool: Path, model: Path, output: Path, *options: object, interrupt_at: str = "") -> subprocess.Popen:
    """Start (or resume) the scoring of a pool."""
    command = [sys.executable, "-m", "verl_gradalign.cli", "score", "--pool", pool, "--model", model]
    # Sampling in float64 is not tipped by rounding.
    own = ["+platform=cpu", "+regime=quickstart", "gradalign.poll_interval_s=0.02", *BATCHED]
    own += ["actor_rollout_ref.rollout.agent.num_workers=1", "actor_rollout_ref.rollout.dtype=float64"]
    command += ["--output", output, "--json", *options, "--", *own]
    environment = cpu_environment()
    if interrupt_at:
        environment |= {"VERL_USE_EXTERNAL_MODULES": "tests.e2e.interruption", "INTERRUPT_AT": interrupt_at}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, output: Path) -> Scoring:
    """Wait for the end of a scoring."""
    printed, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors[-5000:]
    return Scoring(output, json.loads(printed))


def clean_pool(workplace: Workplace) -> Path:
    """Return few problems without coin flips, which a repeated rollout would throw again."""
    path = workplace.root / "score_pool.parquet"
    if not path.exists():
        rows = pq.read_table(workplace.files["pool"]).to_pylist()
        clean = [row for row in rows if not row["extra_info"]["corrupted"]][:NUM_PROBLEMS]
        schema = pq.read_schema(workplace.files["pool"])
        pq.write_table(pq.read_table(workplace.files["pool"]).from_pylist(clean, schema=schema), path)
    return path


def killed_and_resumed(workplace: Workplace) -> Resumed:
    """Score along the trusted set; kill while the second chunk is scored, take some rollouts away, resume."""
    pool, output, marker = clean_pool(workplace), workplace.root / "scored", workplace.root / "score_marker"
    options = ["--trusted", workplace.files["trusted"], "--keep", "0.25", "--chunk", "8"]
    process = start(pool, workplace.model, output, *options, interrupt_at=f"scoring 2 {marker}")
    kill_at_marker(process, marker, output / "state" / "run.log")
    state = output / "state"
    (measured,) = state.glob("measured-*.pt")
    # As if it had been killed in the middle of the rollout.
    last = rollout_files(output)[-1]
    lost = pq.read_table(last).to_pylist()
    assert not any(row["trusted_set"] for row in lost)
    last.unlink()
    (state / "failed.json").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in [*rollout_files(output), measured]}
    return Resumed(finish(start(pool, workplace.model, output, *options), output), pool, times, lost)


def from_shards(workplace: Workplace) -> tuple[Scoring, Path]:
    """Return LearnAlign's scores of a policy that verl saved as shards, and the folder of the whole policy."""
    folder = workplace.root / "shards"
    folder.mkdir()
    command = [sys.executable, "-m", "tests.e2e.shards", str(workplace.model), str(folder)]
    subprocess.run(command, cwd=REPOSITORY, env=cpu_environment(), check=True, capture_output=True, timeout=TIMEOUT_S)
    output = workplace.root / "scored_shards"
    options = ["--score", "learnalign", "--keep", "10", "--chunk", "8"]
    scoring = finish(start(clean_pool(workplace), folder / "global_step_7", output, *options), output)
    return scoring, folder / "policy"
