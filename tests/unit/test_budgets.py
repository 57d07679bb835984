# SPDX-License-Identifier: Apache-2.0
"""Budgets of a tuned comparison: what ends a run, and what the command accepts and refuses."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from verl_gradalign.cli import app
from verl_gradalign.cli.compare import WAYS
from verl_gradalign.experiments import tuned
from verl_gradalign.experiments.budget import Budget
from verl_gradalign.experiments.compare import Comparison, check_same
from verl_gradalign.experiments.methods import DEFAULT_METHODS, METHODS
from verl_gradalign.experiments.tuned import Tuning, compare_tuned
from verl_gradalign.toy.regimes import MINIATURES

REGIME = "imbalance_mini"


def invoke(output, *options):
    return CliRunner().invoke(app, ["compare", REGIME, "--output", str(output), *options])


@pytest.mark.parametrize("unit", ["responses", "tokens", "seconds"])
def test_a_run_is_tested_after_equal_parts_of_its_budget_and_ends_when_that_is_spent(unit):
    from verl_gradalign.cpu.series import Meter

    meter = Meter(1024, unit, num_tests=4)
    said = [meter.note(spent) for spent in (256, 300, 511.5, 800, 1023.9, 1100)]
    assert said == [(True, False), (False, False), (False, False), (True, False), (False, False), (True, True)]


class Steps:
    """Stands in verl's place."""

    def on_step_begin(self):
        pass

    def on_step_end(self):
        pass


@pytest.mark.parametrize("unit", ["responses", "tokens", "seconds"])
def test_the_step_in_which_a_budget_of_any_unit_is_spent_is_tested_and_the_last_one(unit, monkeypatch):
    from verl_gradalign.cpu import series

    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(series.time, "perf_counter", lambda: next(clock))
    trainer = type("Trainer", (series.SharesProcesses, Steps), {})()
    trainer.meter = series.Meter(300, unit, num_tests=1)
    trainer.agent_loop_manager = SimpleNamespace(num_responses=0, num_tokens=0)
    trainer.config, trainer.total_training_steps = SimpleNamespace(trainer=SimpleNamespace()), series.NEVER
    is_tested = []
    for trainer.global_steps in (1, 2, 3):
        # A step takes 100 s and generates as many responses and tokens; so does a test, which is not counted.
        trainer.on_step_begin()
        trainer.agent_loop_manager.num_responses += 100
        trainer.agent_loop_manager.num_tokens += 100
        trainer.on_step_end()
        is_tested.append(trainer.config.trainer.test_freq == 1)
        next(clock)
    assert is_tested == [False, False, True] and trainer.total_training_steps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "1e-4"], "--rates 1e-4: is for --tune. Remedy: add --tune"),
        (["--budget-responses", "512"], "--budget-responses 512: is for --tune"),
        (["--budget-tokens", "512"], "--budget-tokens 512: is for --tune"),
        (["--budget-seconds", "0"], "--budget-seconds 0.0: is for --tune"),
        (["--tuning-budget", "512"], "--tuning-budget 512.0: is for --tune"),
        (["--tuning-seed", "0"], "--tuning-seed 0: is for --tune"),
        (["--threshold", "0.8"], "--threshold 0.8: is for --tune"),
        (["--methods", "random_large_batch"], "--methods random_large_batch: is unknown without --tune. Remedy: add"),
        (
            ["--tune", "--methods", "baseline"],
            "--methods baseline: is unknown with --tune. Remedy: choose among",
        ),
        (["--tune", "--rates", "high,low"], "--rates high,low: must be numbers above 0"),
        (["--tune", "--rates", "1e-4,1e-4"], "none twice"),
        (["--tune", "--budget-tokens", "9000", "--budget-seconds", "9"], "--budget-seconds 9: --budget-tokens ends"),
        (["--tune", "--budget-responses", "0"], "--budget-responses 0: is less than a step"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_with_the_remedy(tmp_path, options, message):
    done = invoke(tmp_path / "out", *options)
    assert done.exit_code == 2 and message in done.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("methods", "tuning", "message"),
    [
        (("random",), Tuning(budget=Budget(255)), "--budget-responses 255: is less than a step of random, which gene"),
        (("random",), Tuning(budget=Budget(255, "tokens")), "--budget-tokens 255: .*256 responses of a token at least"),
        (("random",), Tuning(budget=Budget(0, "seconds")), "--budget-seconds 0: must be a number of seconds above 0"),
        (("random",), Tuning(budget=Budget(float("nan"), "seconds")), "--budget-seconds nan: must be"),
        (("random",), Tuning(tuning_amount=100), "--tuning-budget 100: .*give --tuning-budget 256 or more\\.$"),
        (("random",), Tuning(tuning_amount=20_000), "--tuning-budget 20000: is more than .* of 10,240 responses"),
        (("random", "confident_cosine"), Tuning(budget=Budget(512)), "512: .*1,024.*or leave out confident_cosine"),
    ],
)
def test_a_budget_smaller_than_one_step_is_refused_with_the_remedy(tmp_path, methods, tuning, message):
    comparison = Comparison(REGIME, tmp_path / "out", methods, (1, 2))
    with pytest.raises(ValueError, match=message):
        compare_tuned(comparison, tuning, Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "budget"),
    [
        (["--budget-responses", "2048"], Budget(2048)),
        (["--budget-tokens", "9000"], Budget(9000, "tokens")),
        (["--budget-seconds", "7.5"], Budget(7.5, "seconds")),
        ([], None),
    ],
)
def test_the_command_hands_on_what_is_tuned_and_knows_the_usual_methods_and_seeds(
    tmp_path, monkeypatch, options, budget
):
    given = []

    def note(*arguments):
        given.extend(arguments)
        raise ValueError("noted")

    monkeypatch.setattr(tuned, "compare_tuned", note)
    further = ["--tune", "--rates", "1e-4,2e-4", "--tuning-seed", "7", "--tuning-budget", "256", "--threshold", "0.8"]
    invoke(tmp_path, *further, *options)
    comparison, tuning, _ = given
    assert (comparison.methods, comparison.seeds) == (DEFAULT_METHODS, (1, 2, 3, 4, 5))
    assert tuning == Tuning(7, (1e-4, 2e-4), budget, 256, 0.8)


def test_the_usual_methods_are_the_baselines_and_the_help_has_all_by_name(tmp_path):
    baselines = {"random", "random_large_batch", "trusted_mixed", "difficulty_forecast", "filter_groups", "oracle"}
    selection = {"forecast", "confident_cosine", "forecast_shuffled"}
    assert set(DEFAULT_METHODS) == baselines | selection
    assert list(WAYS) and set(WAYS) == set(METHODS)
    said = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).output
    assert all(f"{name}: {what}" in said for name, what in WAYS.items())


def amounts(tuning, name):
    return [budget.amount for budget in tuning.budgets(MINIATURES[name])]


def test_a_learning_rate_is_tried_in_half_a_run_and_never_in_more_than_a_run():
    assert amounts(Tuning(), REGIME) == [5_120, 10_240]
    assert amounts(Tuning(budget=Budget(512)), REGIME) == [512, 512]
    assert amounts(Tuning(budget=Budget(200, "seconds")), REGIME) == [100, 200]
    assert amounts(Tuning(budget=Budget(9000, "tokens"), tuning_amount=3000), REGIME) == [3000, 9000]


@pytest.mark.parametrize(("part", "num"), [(10_240, 8), (5_120, 4), (100, 1)])
def test_what_a_learning_rate_is_tried_in_is_tested_as_often_in_the_same_stretch(part, num):
    assert Tuning().tests_in(Budget(part), Budget(10_240)) == num


TUNED = {"budget_responses": 512, "tuning_budget": 256, "tuning_seed": 0, "rates": [1e-4], "num_tests": 8}


def folder_of(tmp_path, **settings):
    """A folder of a comparison with these settings beside those of every one, and the comparison."""
    comparison = Comparison(REGIME, tmp_path, ("random",), (1,))
    check_same(comparison, tmp_path, **settings)
    return comparison


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        (TUNED, {**TUNED, "rates": [2e-4]}, "--rates was 0.0001, now it is 0.0002"),
        (
            TUNED,
            {**{key: TUNED[key] for key in list(TUNED)[1:]}, "budget_tokens": 9000.0},
            "--budget-responses was 512, now it is not given; --budget-tokens was not given, now it is 9000",
        ),
        (
            {},
            TUNED,
            "the runs here were made without --tune, this comparison is of the other kind. Remedy: run it without",
        ),
        (TUNED, {}, "the runs here were made with --tune.*Remedy: run it with --tune"),
        ({"tuning_seed": 0, "num_responses": 10_240}, TUNED, "of an earlier version.*num_responses=10240"),
    ],
)
def test_a_folder_of_another_protocol_is_refused_by_what_differs_alone(tmp_path, before, now, says):
    comparison = folder_of(tmp_path, **before)
    with pytest.raises(ValueError, match=says) as refusal:
        check_same(comparison, tmp_path, **now)
    message = str(refusal.value)
    assert "Remedy: " in message and "or choose another --output, or delete the folder" in message
    assert "warm_up_steps" not in message and "--policy" not in message
    # The folder is as it was.
    check_same(comparison, tmp_path, **before)


def test_a_threshold_may_change_and_the_first_one_is_remembered(tmp_path):
    comparison = folder_of(tmp_path, **TUNED, threshold=0.8)
    assert check_same(comparison, tmp_path, **TUNED, threshold=0.7)["threshold"] == 0.8
    assert json.loads((tmp_path / "comparison.json").read_text())["threshold"] == 0.8


def test_settings_that_cannot_be_read_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "comparison.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON. Remedy: delete it"):
        folder_of(tmp_path)
