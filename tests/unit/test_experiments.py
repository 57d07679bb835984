# SPDX-License-Identifier: Apache-2.0
"""Plans, tables and figures of comparisons. Running them: tests/e2e/test_series.py."""

import csv
import io
import json
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from verl_gradalign.experiments.compare import Comparison, compare
from verl_gradalign.experiments.plan import DONE, METHODS, RunPlan, plan_runs
from verl_gradalign.experiments.results import collect, curve, draw_figures, summarise, write_csv, write_markdown
from verl_gradalign.toy.regimes import MINIATURES, write_miniature


def write_run(folder, lines, done=True):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step, data in lines:
            file.write(json.dumps({"step": step, "data": data}) + "\n")
    if done:
        (folder / DONE).touch()


def accuracies(addition, sorting):
    return {
        "val-core/gradalign/tasks/addition/acc/mean@1": addition,
        "val-core/gradalign/tasks/sorting/acc/mean@1": sorting,
    }


def step(tokens, corrupted):
    share = {"experiment/share/corrupted": corrupted, "experiment/share/gradalign/tasks/addition": 1.0}
    return {"timing_s/step": 2.0, "experiment/num_tokens": tokens, **share}


@pytest.fixture
def runs(tmp_path):
    plans = plan_runs("unreliable_mini", ["cosine", "random"], [0, 1], tmp_path)
    for plan in plans:
        final = {("cosine", 0): 0.8, ("cosine", 1): 0.9, ("random", 0): 0.6, ("random", 1): 0.7}[plan.method, plan.seed]
        reliability = {"gradalign/reliability/direction": 0.5} if plan.method == "cosine" else {}
        lines = [(0, accuracies(0.5, 0.3)), (1, {**step(100, 0.25), **reliability})]
        lines.append((2, {**step(200, 0.75), **accuracies(final, final - 0.2)}))
        write_run(plan.folder, lines)
    return plans


def test_a_seeds_methods_stand_together_and_folders_tell_runs_apart(tmp_path):
    plans = plan_runs("imbalance_mini", METHODS, [3, 5], tmp_path)
    assert [p.seed for p in plans] == [3] * 10 + [5] * 10
    assert len({p.folder for p in plans}) == 20


@pytest.mark.parametrize(
    ("regime", "methods", "seeds", "message"),
    [
        ("unreliabel", ["cosine"], [0], "regime=unreliabel is unknown"),
        ("unreliable_mini", ["cosin"], [0], "--methods cosin: is unknown"),
        ("unreliable_mini", [], [0], "--methods : names"),
        ("unreliable_mini", ["cosine"], [0, 0], "--seeds 0,0: names one twice"),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, regime, methods, seeds, message):
    with pytest.raises(ValueError, match=message):
        plan_runs(regime, methods, seeds, tmp_path)


def test_the_table_has_a_row_per_run_and_step(runs, tmp_path):
    rows = collect(runs)
    assert len(rows) == 4 * 3
    first, second, third = rows[:3]
    assert (first["step"], first["tokens"], first["seconds"]) == (0, 0.0, 0.0)
    assert first["accuracy"] == pytest.approx(0.4) and first["share"] is None
    assert (second["tokens"], second["seconds"], second["share"], second["accuracy"]) == (100, 2.0, 0.25, None)
    assert second["reliability/direction"] == 0.5 and rows[-1]["reliability/direction"] is None
    assert (third["tokens"], third["seconds"]) == (200, 4.0)
    assert third["accuracy/gradalign/tasks/sorting"] == pytest.approx(0.6)
    write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert len(read) == 12 and read[2]["accuracy"] == str(third["accuracy"]) and read[0]["share"] == ""


def test_runs_that_are_not_done_are_left_out(tmp_path):
    unfinished = RunPlan("unreliable_mini", "cosine", 0, tmp_path / "run")
    write_run(unfinished.folder, [(1, step(1, 0.0))], done=False)
    assert collect([unfinished]) == []


def test_the_summary_is_over_seeds(runs, tmp_path):
    cosine, random = summarise(collect(runs))
    assert (cosine.method, cosine.seeds) == ("cosine", (0, 1))
    np.testing.assert_allclose(cosine.values["accuracy"], [0.7, 0.8])
    np.testing.assert_allclose(cosine.values["share"], [0.5, 0.5])
    np.testing.assert_allclose(cosine.values["first_share"], [0.25, 0.25])
    np.testing.assert_allclose(random.values["tokens"], [200, 200])
    assert np.isnan(random.values["direction"]).all()
    write_markdown([cosine, random], tmp_path / "summary.md", "corrupted")
    text = (tmp_path / "summary.md").read_text()
    assert "| cosine | 75.0% (70.0% to 80.0%) | 50.0%" in text and "Seeds: 0, 1." in text


def test_only_what_the_trusted_set_is_of_counts_as_tested(tmp_path):
    plan = plan_runs("imbalance_mini", ["cosine"], [0], tmp_path)[0]
    values = {"val-core/gradalign/tasks/rotation/acc/mean@1": 0.9, "val-core/gradalign/tasks/addition/acc/mean@1": 0.1}
    shares = {"experiment/share/gradalign/tasks/rotation": 0.25, "experiment/share/gradalign/tasks/sorting": 0.75}
    write_run(plan.folder, [(1, {"timing_s/step": 1.0, **values, **shares, "experiment/share/corrupted": 0.0})])
    (row,) = collect([plan])
    assert row["accuracy"] == pytest.approx(0.5) and row["tested"] == 0.9 and row["share"] == 0.25


def test_curves_of_unequal_seeds_are_compared_where_both_are_known():
    rows = [{"seed": 0, "tokens": t, "tested": t / 10} for t in (0, 10, 20)]
    rows += [{"seed": 1, "tokens": t, "tested": t / 10 + 1} for t in (5, 15)]
    grid, mean, low, high = curve(rows, "tokens", "tested")
    assert (grid[0], grid[-1]) == (5, 15)
    np.testing.assert_allclose(mean, grid / 10 + 0.5)
    np.testing.assert_allclose(high - low, 1.0)


def test_figures_are_drawn(runs, tmp_path):
    paths = draw_figures(collect(runs), tmp_path, "corrupted")
    assert len(paths) == 4 and all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures_have_the_shares_they_say_and_depend_on_the_seed(name, tmp_path):
    miniature = MINIATURES[name]
    for shares in (miniature.pool, miniature.trusted, miniature.test):
        assert sum(shares.values()) == pytest.approx(1.0)
    pool = pq.read_table(write_miniature(name, tmp_path / "0", seed=0)["pool"]).to_pylist()
    counts = Counter(row["extra_info"]["family"] for row in pool)
    to_a_problem = 1 / len(pool)
    shares = {family: count / len(pool) for family, count in counts.items()}
    assert len(pool) == miniature.num_pool and shares == pytest.approx(miniature.pool, abs=to_a_problem)
    corrupted = np.mean([row["extra_info"]["corrupted"] for row in pool])
    assert corrupted == pytest.approx(miniature.corrupted_share, abs=to_a_problem)
    other = pq.read_table(write_miniature(name, tmp_path / "1", seed=1)["pool"]).to_pylist()
    assert pool != other


def test_a_miniature_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no miniature"):
        write_miniature("unreliable", tmp_path, seed=0)


STANDS_FOR_VERL = """#!{python}
import json, os, sys
with open(os.environ["VERL_FILE_LOGGER_PATH"], "w") as file:
    file.write(json.dumps({{"step": 1, "data": {{"timing_s/step": 1.0, "val-core/amc/acc/mean@1": 0.5}}}}) + chr(10))
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
sys.exit(any("accuracy_greedy" in word for word in sys.argv))
"""


@pytest.fixture
def published(tmp_path):
    """A comparison of a published regime, with a script in verl's place that notes how it is called."""
    calls = tmp_path / "calls.jsonl"
    launcher = tmp_path / "launcher"
    launcher.write_text(STANDS_FOR_VERL.format(python=sys.executable, calls=str(calls)))
    launcher.chmod(0o755)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").touch()
    choice = {"methods": ("cosine", "filter_groups"), "seeds": (0, 1), "data": tmp_path / "data"}
    return Comparison("unreliable", tmp_path / "out", python=str(launcher), **choice), calls


def test_a_published_regime_runs_its_script_once_per_method_and_seed(published):
    comparison, calls = published
    for _ in range(2):
        compare(comparison, Console(file=io.StringIO()))
    made = [json.loads(line) for line in calls.read_text().splitlines()]
    assert len(made) == 4
    assert "+gradalign=cosine" in made[0] and "data.seed=0" in made[0] and "data.seed=1" in made[2]
    assert "algorithm.filter_groups.enable=true" in made[1]
    assert f"trainer.default_local_dir={comparison.output}/runs/cosine/seed-0" in made[0]
    assert (comparison.output / "summary.md").read_text().count("50.0%") == 6


def test_a_run_that_fails_is_told_with_its_output_and_nothing_done_is_lost(published):
    comparison, _ = published
    choice = {"methods": ("cosine", "accuracy_greedy"), "seeds": (0,), "data": comparison.data}
    failing = Comparison("unreliable", comparison.output, python=comparison.python, **choice)
    with pytest.raises(RuntimeError, match="accuracy_greedy/seed-0/run.log"):
        compare(failing, Console(file=io.StringIO()))
    assert (comparison.output / "runs" / "cosine" / "seed-0" / DONE).exists()
    assert not (comparison.output / "runs" / "accuracy_greedy" / "seed-0" / DONE).exists()


def test_a_miniature_that_is_finished_starts_nothing_and_is_summed_up_again(tmp_path):
    output = tmp_path / "out"
    (output / "policy").mkdir(parents=True)
    (output / "policy" / "config.json").touch()
    (run,) = plan_runs("unreliable_mini", ["cosine"], [0], output)
    write_run(run.folder, [(0, accuracies(0.5, 0.3)), (1, {**step(100, 0.25), **accuracies(0.5, 0.7)})])
    choice = {"methods": ("cosine",), "seeds": (0,), "python": "/no/such/python"}
    summary = compare(Comparison("unreliable_mini", output, **choice), Console(file=io.StringIO()))
    assert "cosine" in summary.read_text() and not list(output.glob("series-*"))


def test_a_published_regime_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="verl-gradalign prepare --regime imbalance"):
        compare(Comparison("imbalance", tmp_path / "out", data=tmp_path), Console(file=io.StringIO()))


def test_runs_that_differ_in_what_processes_are_started_with_are_no_series(tmp_path):
    from hydra import initialize_config_module

    from verl_gradalign.cpu.series import check_series
    from verl_gradalign.experiments.plan import miniature_overrides
    from verl_gradalign.integration.compose import compose_run

    runs = plan_runs("unreliable_mini", ["cosine", "filter_groups"], [0], tmp_path)
    with initialize_config_module("verl.trainer.config", version_base=None):
        cosine, filtered = (compose_run(miniature_overrides(run, tmp_path, tmp_path)) for run in runs)
        twice = compose_run([*miniature_overrides(runs[1], tmp_path, tmp_path), "actor_rollout_ref.actor.ppo_epochs=2"])
    check_series({"first": cosine, "second": filtered})
    with pytest.raises(ValueError, match="second: actor_rollout_ref.actor.ppo_epochs=2, in first it is 1"):
        check_series({"first": cosine, "second": twice})
