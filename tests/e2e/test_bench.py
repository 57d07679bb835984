# SPDX-License-Identifier: Apache-2.0
"""`verl-gradalign bench --dry-run`: all of the kit on a CPU, the runs of verl too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from verl_gradalign.bench.grpo import NUM_DRY_STEPS
from verl_gradalign.bench.page import page_of
from verl_gradalign.bench.registry import NAMES
from verl_gradalign.log.selection_log import read_selection_log

pytestmark = pytest.mark.e2e


def records_of(output: Path) -> list[dict[str, Any]]:
    (lines,) = output.glob("*.jsonl")
    return [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]


def ends_of(records: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    ends = [record for record in records if record.get("event") == "ends"]
    return {record["part"]: (record["status"], record.get("reason", "")) for record in ends}


def assert_trained(records: list[dict[str, Any]], part: str) -> None:
    """The run with selection and the one without made their steps, and selection took its part of them."""
    mine = [record for record in records if record.get("part") == part]
    runs = {record["run"]: record for record in mine if record.get("table") == "runs"}
    assert set(runs) == {"with selection", "without"}
    assert all(run["steps"] == NUM_DRY_STEPS and run["step_s"] > 0 for run in runs.values())
    assert runs["with selection"]["kept"] > 0 and runs["without"]["kept"] is None
    assert 0 < runs["with selection"]["selection_share"] < 1
    (ratio,) = [record for record in mine if record.get("table") == "ratio"]
    expected = runs["with selection"]["step_s"] / runs["without"]["step_s"]
    assert ratio["step_with_over_without"] == pytest.approx(expected)


def test_the_dry_run_measures_every_part_and_every_claim_holds(bench_dry_run: Path) -> None:
    records = records_of(bench_dry_run)
    wanted: dict[str, tuple[str, str]] = dict.fromkeys(NAMES, ("done", ""))
    assert ends_of(records) == wanted | {"model": ("skipped", "no --model FOLDER was given")}
    assert all(record["holds"] for record in records if "claim" in record)
    assert_trained(records, "grpo")


def test_the_page_is_that_of_the_lines(bench_dry_run: Path) -> None:
    records = records_of(bench_dry_run)
    (page,) = bench_dry_run.glob("*.md")
    assert page.read_text(encoding="utf-8") == page_of(records)
    assert "All parts are through." in page.read_text(encoding="utf-8")


def test_the_run_without_selection_knows_nothing_of_it(bench_dry_run: Path) -> None:
    (folder,) = bench_dry_run.glob("*/grpo-tiny")
    assert len(set(read_selection_log(folder / "with" / "gradalign")["step"].to_pylist())) == NUM_DRY_STEPS
    assert not (folder / "without" / "gradalign").exists()
    assert "gradalign/" not in (folder / "without" / "metrics.jsonl").read_text(encoding="utf-8")


@pytest.mark.nightly
def test_a_model_of_the_users_is_trained(bench_own_model: Path) -> None:
    records = records_of(bench_own_model)
    assert ends_of(records) == {"model": ("done", "")}
    assert_trained(records, "model")
