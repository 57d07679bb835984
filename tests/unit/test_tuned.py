# SPDX-License-Identifier: Apache-2.0
"""Comparisons on one budget: what is run, which learning rate is taken, and what the tables say."""

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from tests.unit.curves import BUDGET, REGIME, curve_of, write_run
from verl_gradalign import configs
from verl_gradalign.config import ScoreOptions
from verl_gradalign.experiments import curve_files, shuffled_scores
from verl_gradalign.experiments.budget import Budget
from verl_gradalign.experiments.compare import Comparison
from verl_gradalign.experiments.learning_curves import AXES, area, by_method, paired, read_curve, spent_to
from verl_gradalign.experiments.methods import METHODS, overrides_of
from verl_gradalign.experiments.plan import RunPlan
from verl_gradalign.experiments.tuned import Tuning, choose_rates, compare_tuned
from verl_gradalign.experiments.tuned_report import (
    GivenThreshold,
    spent_table,
    summary_table,
    threshold,
    threshold_remarks,
    write_report,
)
from verl_gradalign.selection.own_scores import made_up
from verl_gradalign.selection.scores import SCORES, score_of
from verl_gradalign.toy.regimes import MINIATURES, write_miniature
from verl_gradalign.toy.train_files import write_mixed, write_oracle

LEARNING_RATE_KEY = "actor_rollout_ref.actor.optim.lr"


def test_a_curve_counts_all_that_is_spent_and_is_of_the_trusted_families_alone(tmp_path):
    run = RunPlan(REGIME, "random", 1, tmp_path / "run", 2e-4)
    write_run(run, [0.5, 0.6, 0.8])
    curve = read_curve(run)
    counted = {"responses": [0, 256, 512], "tokens": [0, 1280, 2560], "seconds": [0, 2, 4], "updates": [0, 1, 2]}
    assert list(curve.spent) == list(counted)
    for axis, spent in counted.items():
        np.testing.assert_allclose(curve.spent[axis], spent)
    np.testing.assert_allclose(curve.accuracy, [0.5, 0.6, 0.8])
    np.testing.assert_allclose(curve.audit, [0.5, 0.6, 0.8])
    assert curve.share == 0.25


def test_a_run_that_was_made_with_another_learning_rate_is_refused(tmp_path):
    run = RunPlan(REGIME, "random", 1, tmp_path / "run", 2e-4)
    write_run(run, [0.5, 0.6], learning_rate=4e-4)
    with pytest.raises(ValueError, match="actor/lr="):
        read_curve(run)


def test_the_area_is_the_mean_accuracy_of_the_budget_in_its_own_unit():
    half, twice = Budget(BUDGET.amount / 2), Budget(2 * BUDGET.amount)
    assert area(curve_of("random", 1, [0.4, 0.8]), BUDGET) == pytest.approx(0.6)
    assert area(curve_of("random", 1, [0.4, 0.8]), half) == pytest.approx(0.5)
    # What lies beyond the budget does not count; what is missing goes on as it ended.
    assert area(curve_of("random", 1, [0.4, 0.8, 0.0]), half) == pytest.approx(0.6)
    assert area(curve_of("random", 1, [0.4, 0.8]), twice) == pytest.approx(0.7)
    assert area(curve_of("random", 1, [0.4, 0.8]), Budget(30.5, "seconds")) == pytest.approx(0.5)
    assert area(curve_of("random", 1, [0.4, 0.8]), Budget(2500, "tokens")) == pytest.approx(0.5)


def test_what_an_accuracy_takes_is_interpolated_up_to_the_first_time_it_is_reached():
    curve = curve_of("random", 1, [0.4, 0.6, 0.5, 0.9])
    spent = spent_to(curve, 0.55, BUDGET)
    assert spent == pytest.approx({"responses": 250, "tokens": 1250, "seconds": 61 / 4, "updates": 10})
    assert spent_to(curve, 0.4, BUDGET)["seconds"] == 0
    assert spent_to(curve, 0.7, BUDGET)["responses"] == pytest.approx(1000 * (2 + 0.5) / 3)
    assert set(spent_to(curve, 0.95, BUDGET).values()) == {float("inf")}
    # A last step may go beyond the budget; what is reached there is not reached within it.
    assert set(spent_to(curve, 0.7, Budget(700)).values()) == {float("inf")}


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
    assert oracle.endswith("| 0.913 | 0.10 | 1,000 | 5,000 | 62 | 40 |")


def test_what_a_threshold_takes_is_said_in_responses_tokens_seconds_and_updates(curves):
    table = spent_table(by_method(curves), 0.71, BUDGET).splitlines()
    assert table[0] == "| method | seeds that reach it | responses | tokens | seconds | updates |"
    oracle, filtered = table[3:]
    # Medians over seeds of 0.667, 0.662 and 0.667 of the run.
    assert oracle == "| oracle | 3 of 3 | 667 | 3,333 | 42 | 27 |"
    assert "| filter_groups | 2 of 3 | 775 | 3,875 |" in filtered


def test_the_median_of_seeds_that_mostly_miss_the_mark_is_more_than_the_budget(curves):
    low = [curve_of("low", seed, [0.4, 0.5, 0.6]) for seed in (1, 2)]
    table = spent_table(by_method([*curves, *low]), 0.71, BUDGET)
    # In seconds, of which runs take different numbers, more than what the quickest of them took.
    assert table.splitlines()[-1] == "| low | 0 of 2 | > 1,000 | > 5,000 | > 61 | > 40 |"
    remarks = " ".join(threshold_remarks(by_method([*curves, *low]), 0.71, GivenThreshold(), BUDGET))
    assert "accuracy that random has after three quarters" in remarks
    assert "No seed reaches it within 1,000 responses with low." in remarks


def test_a_threshold_that_no_run_reaches_is_said_with_the_remedy(curves, tmp_path):
    write_report(curves, [], MINIATURES[REGIME], (BUDGET, BUDGET), GivenThreshold(0.99, 0.99), tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    assert "**No run reaches 0.990 within 1,000 responses.** Remedy: a lower --threshold" in summary
    assert summary.count("| 0 of 3 | > 1,000 | > 5,000 | > 61 | > 40 |") == 3
    assert "0.990 was fixed before the first run" in summary


def test_a_threshold_that_was_given_when_runs_were_there_is_said_to_be(curves):
    later = [threshold_remarks(by_method(curves), 0.8, GivenThreshold(0.8, first), BUDGET)[0] for first in (None, 0.9)]
    assert "**0.800 was given (--threshold) later**: the comparison was begun without one." in later[0]
    assert "begun with 0.9." in later[1]


def test_a_threshold_that_the_untrained_policy_reaches_is_said_to_mean_little(curves):
    assert "has up to 0.400" in " ".join(threshold_remarks(by_method(curves), 0.35, GivenThreshold(0.35, 0.35), BUDGET))


def test_without_random_and_without_a_threshold_the_summary_says_that_there_is_none(curves, tmp_path):
    oracles = [curve for curve in curves if curve.run.method == "oracle"]
    write_report(oracles, [], MINIATURES[REGIME], (BUDGET, BUDGET), GivenThreshold(), tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    assert "Remedy: give --threshold, or run random too." in summary and "nan" not in summary


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (Budget(1000), "1,000 generated responses a run"),
        (Budget(5000, "tokens"), "5,000 generated tokens a run"),
        (Budget(60.5, "seconds"), "60.5 seconds of training a run"),
    ],
)
def test_the_report_shows_every_seed_what_was_tried_and_a_figure_over_all_that_is_spent(curves, tmp_path, budget, says):
    tried = [curve_of("random", 0, [0.4, 0.6], rate) for rate in (1e-4, 2e-4)]
    write_report(curves, tried, MINIATURES[REGIME], (budget, budget), GivenThreshold(), tmp_path)
    summary = (tmp_path / "summary.md").read_text()
    assert says in summary and "Seeds: 1, 2, 3," in summary
    if budget.unit != "seconds":
        assert "| oracle | 0.625 | 0.635 | 0.632 |" in summary
    assert "| method | 0.0001 | 0.0002 |" in (tmp_path / "tuning.md").read_text()
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 * 3 + 2 * 2
    assert [rows[2][axis] for axis in AXES] == ["1000.0", "5000.0", "61.0", "40.0"]


def test_the_figure_has_a_panel_for_everything_that_is_spent(curves, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(curve_files.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    curve_files.draw_curves(by_method(curves), tmp_path / "curves.png")
    assert [panel.get_xlabel() for panel in figures[0].axes] == list(AXES.values())
    # Thin lines for three seeds of three methods, and their means.
    assert all(len(panel.lines) == 9 + 3 for panel in figures[0].axes)


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
    summary = compare_tuned(comparison, Tuning(budget=Budget(256)), Console(file=io.StringIO()))
    assert "| oracle | 0.0004 |" in summary.read_text()
    assert not list(tmp_path.glob("series-*"))
    said = io.StringIO()
    compare_tuned(comparison, Tuning(budget=Budget(256), threshold=0.7), Console(file=said))
    assert "all 10 runs are done" in said.getvalue()
    assert "**0.700 was given (--threshold) later**" in summary.read_text()
    with pytest.raises(ValueError, match="--budget-responses was 256, now it is 512.*choose another --output"):
        compare_tuned(comparison, Tuning(budget=Budget(512)), Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("regime", "methods", "tuning", "message"),
    [
        ("unreliable", ("random",), Tuning(), "only miniatures are tuned"),
        (REGIME, ("cosine",), Tuning(), "--methods cosine: is unknown with --tune. Remedy: choose among random"),
        (REGIME, ("random", "random"), Tuning(), "--methods random,random: names one twice"),
        (REGIME, ("random",), Tuning(seed=2), "--tuning-seed 2: is among --seeds 1,2"),
        (REGIME, ("random",), Tuning(threshold=80.0), "--threshold 80.0: must be an accuracy .* give for instance 0.8"),
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
    assert len(oracle) == 64 and not any(row["extra_info"]["corrupted"] for row in oracle)
    assert {row["prompt"][0]["content"] for row in oracle} < set(prompts(data / "pool.parquet"))
    write_miniature("rare_mini", tmp_path, seed=0)
    oracle = pq.read_table(write_oracle(MINIATURES["rare_mini"], tmp_path)).to_pylist()
    assert len(oracle) == 720 and {row["ability"] for row in oracle} == {"addition", "subtraction"}


def test_an_oracle_trains_on_the_tests_kinds_where_the_trusted_set_is_off(tmp_path):
    files = write_miniature("off_target_mini", tmp_path, seed=0)
    oracle = pq.read_table(write_oracle(MINIATURES["off_target_mini"], tmp_path)).to_pylist()
    kinds = {split: {row["ability"] for row in pq.read_table(path).to_pylist()} for split, path in files.items()}
    assert {row["ability"] for row in oracle} == kinds["test"] == {"reversal"} < kinds["pool"]
    assert kinds["trusted"] == kinds["audit"] == {"rotation"} and not kinds["trusted"] & kinds["pool"]


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


def test_runs_of_all_methods_and_learning_rates_compose_and_share_processes(tmp_path):
    from verl_gradalign.cpu.series import check_series
    from verl_gradalign.integration.checks import read_config
    from verl_gradalign.integration.compose import compose_run, composing

    for regime, group_size in (("rare_mini", 8), ("coin_flips_mini", 4)):
        composed = {}
        with composing():
            for number, method in enumerate(METHODS):
                run = RunPlan(regime, method, 1, tmp_path / method, 1e-4 * (number + 1))
                composed[method] = compose_run(overrides_of(run, tmp_path, tmp_path))
        check_series(composed)
        for method, config in composed.items():
            rollout, num_problems = config.actor_rollout_ref.rollout, config.data.train_batch_size
            assert rollout.n == group_size, method
            assert num_problems * rollout.n == (1024 if method == "random_large_batch" else 256), method
            # One update a step, of all that is trained on.
            assert config.actor_rollout_ref.actor.ppo_mini_batch_size == num_problems, method
            is_plugin = config.trainer.v1.trainer_mode == "gradalign"
            assert is_plugin == (METHODS[method].group is not None)
            if is_plugin:
                own = read_config(config)
                # 64 trusted problems x 4 in ten steps; where these are trained on, as many as in a group, in twenty.
                trusted = own.direction.refresh_interval, own.validation.n
                assert trusted == ((20, group_size) if own.direction.train_on_trusted else (10, 4)), method
        after_rollout = composed["confident_cosine"]
        num_candidates = after_rollout.data.train_batch_size * read_config(after_rollout).oversample
        assert num_candidates == composed["random_large_batch"].data.train_batch_size == 1024 // group_size
        assert read_config(composed["forecast"]).measures_in_update
        assert read_config(composed["difficulty_forecast"]).is_forecast
    assert METHODS["confident_cosine"].num_responses == METHODS["random_large_batch"].num_responses == 1024


def test_the_forecast_that_is_compared_is_what_the_word_stands_for(tmp_path):
    from verl_gradalign.integration.compose import compose_run, composing

    word = OmegaConf.load(Path(configs.__path__[0]) / "gradalign" / "forecast.yaml").gradalign
    with composing():
        compared = compose_run(overrides_of(RunPlan("rare_mini", "forecast", 1, tmp_path, 1e-4), tmp_path, tmp_path))
    assert OmegaConf.merge(compared.gradalign, word) == compared.gradalign


@pytest.mark.parametrize("name", MINIATURES)
def test_the_learning_rate_of_a_regimes_file_is_the_middle_one_that_is_tried(name):
    own, shared = (OmegaConf.load(Path(configs.__path__[0]) / "regime" / f"{file}.yaml") for file in (name, "mini"))
    rate = OmegaConf.select(own, LEARNING_RATE_KEY) or OmegaConf.select(shared, LEARNING_RATE_KEY)
    assert rate == MINIATURES[name].learning_rates[1]
