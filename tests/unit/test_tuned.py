# SPDX-License-Identifier: Apache-2.0
"""Comparisons at equal generated responses: what is run, which learning rate is taken, and what the tables say."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from typer.testing import CliRunner

from verl_gradalign import configs
from verl_gradalign.cli import app
from verl_gradalign.config import ScoreOptions
from verl_gradalign.experiments import shuffled_scores, tuned
from verl_gradalign.experiments.compare import Comparison
from verl_gradalign.experiments.learning_curves import LearningCurve, area, paired, read_curve, responses_to
from verl_gradalign.experiments.methods import BATCH_SIZE, DEFAULT_METHODS, METHODS, overrides_of
from verl_gradalign.experiments.plan import DONE, RunPlan
from verl_gradalign.experiments.tuned import Tuning, choose_rates, compare_tuned
from verl_gradalign.experiments.tuned_report import by_method, summary_table, threshold, write_report
from verl_gradalign.selection.own_scores import made_up
from verl_gradalign.selection.scores import SCORES, score_of
from verl_gradalign.toy.regimes import MINIATURES, write_miniature
from verl_gradalign.toy.train_files import write_mixed, write_oracle

BUDGET = 1000
LEARNING_RATE_KEY = "actor_rollout_ref.actor.optim.lr"
REGIME = "imbalance_mini"


def curve_of(method, seed, accuracy, learning_rate=4e-4):
    """A curve with tests at equal distances; the audit set is a point worse, and a tenth of the training is watched."""
    run = RunPlan(REGIME, method, seed, None, learning_rate)
    responses = np.linspace(0, BUDGET, len(accuracy))
    return LearningCurve(run, responses, np.array(accuracy), np.array(accuracy) - 0.01, 40, 60.0 + seed, 0.1)


def write_run(run, tests, learning_rate=None):
    """Leave what a run leaves, with a step of 256 responses for every test after the first."""
    run.folder.mkdir(parents=True)
    with (run.folder / "metrics.jsonl").open("w") as file:
        for step, accuracy in enumerate(tests):
            data = {f"val-core/gradalign/tasks/{name}/acc/mean@1": accuracy for name in ("rotation", "audit")}
            data["val-core/gradalign/tasks/sorting/acc/mean@1"] = 0.0
            if step:
                data |= {"timing_s/step": 2.0, "actor/lr": learning_rate or run.learning_rate}
                data |= {"experiment/share/gradalign/tasks/rotation": 0.25, "experiment/num_responses": 256.0 * step}
            file.write(json.dumps({"step": step, "data": data}) + "\n")
    (run.folder / DONE).touch()


def test_a_curve_counts_responses_and_is_of_the_trusted_families_alone(tmp_path):
    run = RunPlan(REGIME, "random", 1, tmp_path / "run", 2e-4)
    write_run(run, [0.5, 0.6, 0.8])
    curve = read_curve(run)
    np.testing.assert_allclose(curve.responses, [0, 256, 512])
    np.testing.assert_allclose(curve.accuracy, [0.5, 0.6, 0.8])
    np.testing.assert_allclose(curve.audit, [0.5, 0.6, 0.8])
    assert (curve.num_steps, curve.seconds, curve.share) == (2, 4.0, 0.25)


def test_a_run_that_was_made_with_another_learning_rate_is_refused(tmp_path):
    run = RunPlan(REGIME, "random", 1, tmp_path / "run", 2e-4)
    write_run(run, [0.5, 0.6], learning_rate=4e-4)
    with pytest.raises(ValueError, match="actor/lr="):
        read_curve(run)


def test_the_area_is_the_mean_accuracy_of_the_budget():
    assert area(curve_of("random", 1, [0.4, 0.8]), BUDGET) == pytest.approx(0.6)
    assert area(curve_of("random", 1, [0.4, 0.8]), BUDGET / 2) == pytest.approx(0.5)
    # What lies beyond the budget does not count; what is missing goes on as it ended.
    assert area(curve_of("random", 1, [0.4, 0.8, 0.0]), BUDGET / 2) == pytest.approx(0.6)
    assert area(curve_of("random", 1, [0.4, 0.8]), 2 * BUDGET) == pytest.approx(0.7)


def test_responses_to_an_accuracy_are_interpolated_up_to_the_first_time_it_is_reached():
    curve = curve_of("random", 1, [0.4, 0.6, 0.5, 0.9])
    assert responses_to(curve, 0.55) == pytest.approx(BUDGET / 4)
    assert responses_to(curve, 0.4) == 0 and responses_to(curve, 0.7) == pytest.approx(BUDGET * (2 + 0.5) / 3)
    assert responses_to(curve, 0.95) == float("inf")


def test_the_paired_interval_is_students_of_the_differences():
    mean, half_width = paired([0.5, 0.7, 0.6, 0.9, 0.8], [0.4, 0.5, 0.5, 0.7, 0.6])
    assert mean == pytest.approx(0.16)
    # sd 0.0548, t(4) 2.776, five seeds
    assert half_width == pytest.approx(0.0680, abs=5e-4)
    assert np.isnan(paired([0.5], [0.4])[1])


def test_every_method_takes_the_learning_rate_of_its_own_largest_area():
    tried = [curve_of("random", 0, [0.4, end], rate) for rate, end in ((1e-4, 0.6), (2e-4, 0.9), (4e-4, 0.7))]
    tried += [curve_of("oracle", 0, [0.4, end], rate) for rate, end in ((4e-4, 0.8), (1e-4, 0.8))]
    assert choose_rates(tried, BUDGET) == {"random": 2e-4, "oracle": 1e-4}


@pytest.fixture
def curves():
    ends = {"random": [0.8, 0.82, 0.84], "oracle": [0.9, 0.94, 0.93], "filter_groups": [0.7, 0.86, 0.8]}
    return [curve_of(m, seed, [0.4, 0.6, end]) for m, of_seed in ends.items() for seed, end in enumerate(of_seed, 1)]


def test_the_table_pairs_every_method_with_random_and_marks_what_is_surely_better(curves):
    table = summary_table(by_method(curves), "target", BUDGET)
    random, oracle, filtered = table.splitlines()[2:]
    assert threshold(by_method(curves), BUDGET) == pytest.approx(0.71)
    assert "| random | 0.0004 | 0.500 0.600 0.710 0.820 | 0.605 |  |" in random
    assert "**+0.026 ± " in oracle and "**" not in filtered
    assert "3 of 3" in oracle and "2 of 3" in filtered and "| 0.913 | 0.10 | 40 | 62 |" in oracle


def test_the_median_of_seeds_that_mostly_miss_the_mark_is_more_than_the_budget(curves):
    low = [curve_of("low", seed, [0.4, 0.5, 0.6]) for seed in (1, 2)]
    table = summary_table(by_method([*curves, *low]), "target", BUDGET)
    assert "| > 1,000 (0 of 2) |" in table.splitlines()[-1]


def test_the_report_shows_every_seed_what_was_tried_and_a_figure(curves, tmp_path):
    tried = [curve_of("random", 0, [0.4, 0.6], rate) for rate in (1e-4, 2e-4)]
    write_report(curves, tried, MINIATURES[REGIME], BUDGET, BUDGET, tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    assert "| oracle | 0.625 | 0.635 | 0.632 |" in summary and "Seeds: 1, 2, 3," in summary
    assert "| method | 0.0001 | 0.0002 |" in (tmp_path / "tuning.md").read_text()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9 * 3 + 2 * 2


def test_a_comparison_that_is_done_is_tuned_and_summed_up_without_starting_anything(tmp_path):
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").touch()
    ends = {2e-4: 0.7, 4e-4: 0.9, 8e-4: 0.8}
    for method in ("random", "oracle"):
        for rate, end in ends.items():
            write_run(RunPlan(REGIME, method, 0, tmp_path / f"runs/{method}/lr-{rate:g}/seed-0", rate), [0.5, end])
        for seed in (1, 2):
            write_run(
                RunPlan(REGIME, method, seed, tmp_path / f"runs/{method}/lr-0.0004/seed-{seed}", 4e-4), [0.5, 0.8]
            )
    comparison = Comparison(REGIME, tmp_path, ("random", "oracle"), (1, 2), python="/no/such/python")
    summary = compare_tuned(comparison, Tuning(num_responses=256), Console(file=io.StringIO()))
    assert "| oracle | 0.0004 |" in summary.read_text()
    assert not list(tmp_path.glob("series-*"))
    with pytest.raises(ValueError, match="choose another --output"):
        compare_tuned(comparison, Tuning(num_responses=512), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("regime", "methods", "tuning", "message"),
    [
        ("unreliable", ("random",), Tuning(), "only miniatures are tuned"),
        (REGIME, ("cosine",), Tuning(), "methods=.*unknown here"),
        (REGIME, ("random",), Tuning(seed=2), "tuning seed 2 is among"),
    ],
)
def test_what_cannot_be_tuned_is_refused(tmp_path, regime, methods, tuning, message):
    comparison = Comparison(regime, tmp_path, methods, (1, 2))
    with pytest.raises(ValueError, match=message):
        compare_tuned(comparison, tuning, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_miniature("coin_flips_mini", folder, seed=0)
    return folder


def prompts(path):
    return [row["prompt"][0]["content"] for row in pq.read_table(path).to_pylist()]


def test_the_oracles_file_is_the_useful_part_of_the_pool(data, tmp_path):
    oracle = pq.read_table(write_oracle(MINIATURES["coin_flips_mini"], data)).to_pylist()
    assert len(oracle) == 128 and not any(row["extra_info"]["corrupted"] for row in oracle)
    assert {row["prompt"][0]["content"] for row in oracle} < set(prompts(data / "pool.parquet"))
    write_miniature("skill_mini", tmp_path, seed=0)
    oracle = pq.read_table(write_oracle(MINIATURES["skill_mini"], tmp_path)).to_pylist()
    assert len(oracle) == 720 and {row["ability"] for row in oracle} == {"addition", "subtraction"}


def test_half_of_every_mixed_batch_is_trusted_and_none_is_repeated_before_all_were_drawn(data):
    mixed = prompts(write_mixed(data, num_batches=40, batch_size=32, seed=1))
    trusted = set(prompts(data / "trusted.parquet"))
    is_trusted = np.array([prompt in trusted for prompt in mixed]).reshape(40, 32)
    assert (is_trusted.sum(axis=1) == 16).all() and not is_trusted[:, :16].all()
    first_pass = [prompt for prompt in mixed if prompt in trusted][:64]
    assert set(first_pass) == trusted
    of_pool = [prompt for prompt in mixed if prompt not in trusted]
    assert len(set(of_pool[:256])) == 256 == len(set(of_pool[256:512]))


def test_the_audit_set_is_of_the_trusted_kinds_and_shares_no_prompt(data):
    audit = pq.read_table(data / "audit.parquet").to_pylist()
    assert {row["data_source"] for row in audit} == {"gradalign/tasks/audit"} and len(audit) == 200
    assert {row["ability"] for row in audit} == set(MINIATURES["coin_flips_mini"].trusted)
    others = {p for split in ("pool", "trusted", "test") for p in prompts(data / f"{split}.parquet")}
    assert not others & set(prompts(data / "audit.parquet"))


@pytest.mark.parametrize("name", ["dot", "confident_cosine"])
def test_shuffled_scores_are_the_same_scores_of_other_problems(name):
    shuffled, real = score_of(f"verl_gradalign.experiments.shuffled_scores:{name}"), SCORES[name]
    m, options = made_up(True, True, True), ScoreOptions()
    assert real.rank is not None and shuffled.rank is not None
    ours, theirs = shuffled.rank(m, options), real.rank(m, options)
    assert torch.equal(ours.sort().values, theirs.sort().values)
    assert torch.equal(ours, shuffled.rank(m, options))
    assert (shuffled.direction, shuffled.needs_norm) == (real.direction, real.needs_norm)
    assert shuffled_scores.dot.needs_norm is False


def test_a_budget_tests_after_equal_parts_and_ends_when_it_is_spent():
    from verl_gradalign.cpu.series import Budget

    budget = Budget(num_responses=1024, num_tests=4)
    said = [budget.note(generated) for generated in (256, 300, 511, 800, 1023, 1100)]
    assert said == [(True, False), (False, False), (False, False), (True, False), (False, False), (True, True)]


def test_runs_of_all_methods_and_learning_rates_compose_and_share_processes(tmp_path):
    from verl_gradalign.cpu.series import check_series
    from verl_gradalign.integration.checks import read_config
    from verl_gradalign.integration.compose import compose_run, composing

    configs = {}
    with composing():
        for number, method in enumerate(METHODS):
            run = RunPlan("inverted_mini", method, 1, tmp_path / method, 1e-4 * (number + 1))
            configs[method] = compose_run(overrides_of(run, tmp_path, tmp_path))
    check_series(configs)
    for method, config in configs.items():
        assert config.data.train_batch_size == BATCH_SIZE and config.actor_rollout_ref.rollout.n == 8, method
        assert config.reward.custom_reward_function.reward_kwargs.corruption == "inverted"
        is_plugin = config.trainer.v1.trainer_mode == "gradalign"
        assert is_plugin == (METHODS[method].group is not None)
        if is_plugin:
            own = read_config(config)
            # 64 trusted problems x 4 in ten steps; where these are trained on, x 8 in twenty.
            trusted = own.direction.refresh_interval, own.validation.n
            assert trusted == ((20, 8) if own.direction.train_on_trusted else (10, 4)), method
    assert read_config(configs["forecast"]).measures_in_update
    assert read_config(configs["difficulty_forecast"]).is_forecast


@pytest.mark.parametrize("name", MINIATURES)
def test_the_learning_rate_of_a_regimes_file_is_the_middle_one_that_is_tried(name):
    own, shared = (OmegaConf.load(Path(configs.__path__[0]) / "regime" / f"{file}.yaml") for file in (name, "mini"))
    rate = OmegaConf.select(own, LEARNING_RATE_KEY) or OmegaConf.select(shared, LEARNING_RATE_KEY)
    assert rate == MINIATURES[name].learning_rates[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "1e-4"], "--rates 1e-4: is for --tuned"),
        (["--responses", "512"], "--responses 512: is for --tuned"),
        (["--tuning-responses", "512"], "--tuning-responses 512: is for --tuned"),
        (["--tuned", "--rates", "high,low"], "--rates high,low: must be numbers above 0"),
        (["--tuned", "--rates", "1e-4,1e-4"], "none twice"),
    ],
)
def test_options_of_tuned_comparisons_are_refused_elsewhere_and_where_they_are_no_numbers(tmp_path, options, message):
    done = CliRunner().invoke(app, ["compare", REGIME, "--output", str(tmp_path), *options])
    assert done.exit_code == 2 and message in done.output


def test_the_command_hands_on_what_is_tuned_and_knows_the_usual_methods_and_seeds(tmp_path, monkeypatch):
    given = []

    def note(*arguments):
        given.extend(arguments)
        raise ValueError("noted")

    monkeypatch.setattr(tuned, "compare_tuned", note)
    options = [
        "--tuned",
        "--rates",
        "1e-4,2e-4",
        "--tuning-seed",
        "7",
        "--responses",
        "512",
        "--tuning-responses",
        "256",
    ]
    CliRunner().invoke(app, ["compare", REGIME, "--output", str(tmp_path), *options])
    comparison, tuning, _ = given
    assert (comparison.methods, comparison.seeds) == (DEFAULT_METHODS, (1, 2, 3, 4, 5))
    assert tuning == Tuning(seed=7, learning_rates=(1e-4, 2e-4), num_responses=512, num_tuning_responses=256)


def test_a_learning_rate_is_tried_in_a_quarter_of_a_long_run_and_never_in_more_than_a_run():
    long, short = MINIATURES["skill_mini"], MINIATURES[REGIME]
    assert [b["num_responses"] for b in Tuning().budgets(long)] == [10_240, 40_960]
    assert [b["num_responses"] for b in Tuning().budgets(short)] == [10_240, 10_240]
    assert [b["num_responses"] for b in Tuning(num_responses=512).budgets(short)] == [512, 512]
