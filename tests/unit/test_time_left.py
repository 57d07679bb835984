# SPDX-License-Identifier: Apache-2.0
"""What a tuned comparison says of its duration, before its first run and after every one."""

import io
import json
import sys

import pytest
from rich.console import Console

from tests.unit.curves import REGIME, write_run
from verl_gradalign.experiments.budget import Budget
from verl_gradalign.experiments.compare import Comparison
from verl_gradalign.experiments.plan import RunPlan
from verl_gradalign.experiments.time_left import START_S, USUAL_S, PlannedRun, TimeLeft, duration
from verl_gradalign.experiments.tuned import Tuning, compare_tuned

BUDGET = Budget(1024)


def run_of(output, method, seed, rate=2e-4):
    return RunPlan(REGIME, method, seed, output / "runs" / method / f"lr-{rate:g}" / f"seed-{seed}", rate)


def left_of(output, num_series=1, budget=BUDGET):
    return TimeLeft(output, [PlannedRun(m, s, budget, 4) for s in (1, 2) for m in ("random", "oracle")], num_series)


def test_before_the_first_run_it_goes_by_another_machine_and_names_it(tmp_path):
    left = left_of(tmp_path)
    of_run = 1024 * USUAL_S["responses"] + 5 * 3.5
    assert left.seconds() == pytest.approx(4 * of_run + START_S)
    assert left.seconds(is_policy_made=False) == pytest.approx(4 * of_run + START_S + 120)
    assert left.said().startswith("to do: 4 runs of 1,024 responses: about 3 min, one after the other; ")
    assert "Intel Xeon" in left.said() and "until a run is done here" in left.said()
    assert "2 side by side" in left_of(tmp_path, 2).said()


def test_after_a_run_it_goes_by_what_runs_took_here(tmp_path):
    write_run(run_of(tmp_path, "random", 1), [0.5, 0.6, 0.7, 0.8, 0.9])
    left = left_of(tmp_path)
    # 2 s for 256 responses, 1 s for each of five tests.
    assert left.seconds() == pytest.approx(3 * (8 + 5) + START_S)
    assert "3 runs of 1,024 responses (1 of 4 are done)" in left.said()
    assert left.said().endswith("0.0078 s a response and 1.0 s a test, measured on 1 run done here")


def test_a_method_that_has_been_run_goes_by_its_own_runs(tmp_path):
    for method, tests in (("random", [0.5, 0.6]), ("oracle", [0.5, 0.6])):
        write_run(run_of(tmp_path, method, 1), tests)
    slow = tmp_path / "runs" / "oracle" / "lr-0.0002" / "seed-1" / "metrics.jsonl"
    slow.write_text(slow.read_text().replace('"timing_s/step": 2.0', '"timing_s/step": 20.0'))
    assert left_of(tmp_path).seconds() == pytest.approx((8 + 5) + (80 + 5) + START_S)


def test_a_budget_in_seconds_takes_these_seconds_and_the_tests(tmp_path):
    left = left_of(tmp_path, budget=Budget(100, "seconds"))
    assert left.seconds() == pytest.approx(4 * (100 + 5 * 3.5) + START_S)
    write_run(run_of(tmp_path, "random", 1), [0.5, 0.6])
    assert left.seconds() == pytest.approx(3 * (100 + 5 * 1) + START_S)


def test_every_run_takes_the_tests_that_it_makes(tmp_path):
    short, whole = PlannedRun("random", 0, Budget(512), 2, 2e-4), PlannedRun("random", 1, BUDGET, 4)
    of_tests = (2 + 1) * 3.5 + (4 + 1) * 3.5
    assert TimeLeft(tmp_path, [short, whole], 1).seconds() == pytest.approx(
        (512 + 1024) * USUAL_S["responses"] + of_tests + START_S
    )


def test_what_is_done_takes_no_time(tmp_path):
    for method in ("random", "oracle"):
        for seed in (1, 2):
            write_run(run_of(tmp_path, method, seed), [0.5, 0.6])
    assert left_of(tmp_path).seconds() == 0 and left_of(tmp_path).said() == "all 4 runs are done"


def test_a_duration_is_said_in_minutes_or_hours():
    assert [duration(s) for s in (5, 119, 3600, 7500)] == ["1 min", "2 min", "1 h 0 min", "2 h 5 min"]


STANDS_FOR_A_SERIES = """#!{python}
import json, sys, pathlib, time
for run in json.loads(pathlib.Path(sys.argv[3]).read_text()):
    folder = pathlib.Path(run["folder"])
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in (0, 1):
            data = {{"val-core/gradalign/tasks/rotation/acc/mean@1": 0.5 + step / 4}}
            data |= {{"timing_s/step": 2.0, "timing_s/testing": 1.0}} if step else {{}}
            data |= {{"experiment/num_" + unit: 256.0 * step for unit in ("responses", "tokens")}}
            file.write(json.dumps({{"step": step, "data": data}}) + chr(10))
    time.sleep(1.5)
    pathlib.Path(run["done"]).touch()
time.sleep(1.5)
"""


def test_the_time_is_said_before_anything_starts_and_again_when_a_run_is_done(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").touch()
    python = tmp_path / "python"
    python.write_text(STANDS_FOR_A_SERIES.format(python=sys.executable))
    python.chmod(0o755)
    comparison = Comparison(
        REGIME, tmp_path / "out", ("random",), (1,), 1, policy=tmp_path / "policy", python=str(python)
    )
    said = io.StringIO()
    compare_tuned(comparison, Tuning(learning_rates=(4e-4,), budget=Budget(256)), Console(file=said, width=200))
    lines = said.getvalue().splitlines()
    assert lines[0].startswith("to do: 1 run of 256 responses: about ") and "all 1 runs are done" in lines
    (specification,) = json.loads((tmp_path / "out" / "series-0.json").read_text())
    assert specification["budget"] == {"amount": 256, "unit": "responses", "num_tests": 8}


def test_a_comparison_of_seconds_side_by_side_is_told_that_they_grow(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").touch()
    for seed in (1, 2):
        write_run(run_of(tmp_path, "random", seed, 4e-4), [0.5, 0.6])
    comparison = Comparison(REGIME, tmp_path, ("random",), (1, 2), num_jobs=2, policy=tmp_path / "policy")
    said = io.StringIO()
    budget = Budget(2, "seconds")
    compare_tuned(comparison, Tuning(learning_rates=(4e-4,), budget=budget), Console(file=said, width=200))
    assert "--jobs 2: seconds are compared" in said.getvalue()
