# SPDX-License-Identifier: Apache-2.0
"""What a run with schedule forecast writes down: picks with what was forecast and observed, lift, and trusted share."""

from dataclasses import asdict

import numpy as np
import pyarrow.parquet as pq
import pytest

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.log.columns import StepSeconds, cost_metrics, log_columns
from verl_gradalign.log.parts import parts_of
from verl_gradalign.log.run_log import RunNotes
from verl_gradalign.log.selection_log import PICKS, SCHEMA, SelectionLog, read_selection_log
from verl_gradalign.metrics import named
from verl_gradalign.report.findings import headline_of
from verl_gradalign.report.run import find_runs, read_run
from verl_gradalign.selection.candidates import tabulate
from verl_gradalign.selection.chooser import Choice
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.selection.lift import LiftMeter
from verl_gradalign.selection.select import select_picks
from verl_gradalign.types import Observations, Picks

NUM_PROBLEMS, BATCH, NUM_UNIFORM, NUM_RESPONSES = 500, 16, 4, 2
SECONDS = StepSeconds(step=10.0, rollout=4.0, selection=1.0, update=3.0)


class Pool:
    """Problems of two sources."""

    def text(self, problem_id):
        return f"prompt {problem_id}", "answer"

    def values(self, column):
        return [source_of(problem_id) for problem_id in range(NUM_PROBLEMS)]

    def read_labels(self, columns):
        assert not columns


def source_of(problem_id):
    return "sums" if problem_id % 4 else "coins"


def group_of(problem_id, trusted=None, is_failed=False, is_live=True):
    keys = () if is_failed else tuple(f"{problem_id}_{session}_{output}" for session in (0, 1) for output in (0, 1))
    rewards = () if is_failed else (1.0, 0.0)
    problem = Problem(str(problem_id), problem_id, source_of(problem_id), trusted)
    return Group(problem, keys, 40, rewards, is_failed, is_live and not is_failed, num_response_tokens=20)


class Run:
    """Steps in the order in which a trainer that measures in the update takes them; only the numbers are made up."""

    def __init__(self, folder, **config):
        values = {"schedule": "forecast", "validation": {"files": ["trusted"]}} | config
        self.config = GradAlignConfig.from_mapping(values)
        self.folder = folder
        self.notes = RunNotes(self.config, folder / "gradalign", {}, Pool(), decode=str)
        self.notes.begin(0)
        self.meter = LiftMeter(self.config, {"sums": 375, "coins": 125})
        self.random, self.metrics = np.random.default_rng(0), {}

    def take(self, step):
        shuffled = self.random.permutation(NUM_PROBLEMS)
        uniform, others = shuffled[:NUM_UNIFORM], shuffled[NUM_UNIFORM:]
        # The forecast knows the sources, and chooses sums.
        ids = np.concatenate([uniform, others[others % 4 > 0][: BATCH - NUM_UNIFORM]])
        is_uniform_P = np.arange(BATCH) < NUM_UNIFORM
        picks = Picks(ids, np.where(ids % 4, 0.3, 0.0), np.full(len(ids), 0.1), is_uniform_P)
        order = self.random.permutation(len(ids))
        groups = [group_of(int(i), is_failed=i % 50 == 1, is_live=i % 50 != 2) for i in ids[order]]
        value_P = np.where(ids % 4, 0.3, 0.0)[order] + 0.1 * self.random.standard_normal(len(ids))
        value_P = np.array([np.nan if g.is_failed else v * g.is_live for g, v in zip(groups, value_P, strict=True)])
        observed = Observations(ids[order], value_P, np.full(len(ids), 0.1), np.full(len(ids), 10.0))
        candidates = tabulate(groups, 0.5)
        candidates = candidates.of_live(score_P=value_P[candidates.is_live_P], dot_P=value_P[candidates.is_live_P])
        is_uniform_of = dict(zip(picks.problem_id_P.tolist(), picks.is_uniform_P, strict=True))
        selection = select_picks(candidates, np.array([is_uniform_of[i] for i in candidates.problem_id_P.tolist()]))
        trusted = {"trusted": [group_of(9, "trusted"), group_of(10, "trusted")]}
        self.meter.add(step, picks, observed, [source_of(i) for i in ids])
        metrics = self.notes.record(
            *(step, lambda keys: [np.arange(3)] * len(keys), groups, Choice(selection, candidates), None, trusted),
            *(picks, observed),
        )
        metrics |= {**self.meter.metrics(), "responses/trained": len(selection.kept) * NUM_RESPONSES}
        full = named(metrics)
        self.metrics = full | self.notes.end_step(step, full, SECONDS, None)
        return picks, observed, groups


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"), log={"steps_per_part": 20})
    run.steps = {step: run.take(step) for step in range(1, 51)}
    return run


def test_every_pick_is_in_the_log_with_what_was_forecast_and_observed(run):
    table = read_selection_log(run.folder / "gradalign")
    assert table.schema.names == [*SCHEMA.names, *PICKS.names]
    rows = table.to_pandas()
    for step, (picks, observed, groups) in run.steps.items():
        mine = rows[rows["step"] == step].set_index("problem_id")
        assert mine.index.tolist() == [g.problem.problem_id for g in groups]
        by_pick = mine.loc[picks.problem_id_P]
        np.testing.assert_array_equal(by_pick["forecast_mean"], picks.mean_P)
        np.testing.assert_array_equal(by_pick["forecast_deviation"], picks.deviation_P)
        assert (by_pick["pick"] == np.where(picks.is_uniform_P, "uniform", "forecast")).all()
        np.testing.assert_array_equal(mine.loc[observed.problem_id_P]["observed"], observed.value_P)
        is_failed = np.array([g.is_failed for g in groups])
        assert (mine["reason"] == np.where(is_failed, "failed", mine["pick"])).all()
        assert (mine["kept"] == ~is_failed).all()
    assert (rows["observed"] == 0).any() and rows["observed"].isna().any()


def test_the_report_finds_the_lift_that_the_run_logged(run):
    read = read_run(find_runs([run.folder])[0])
    assert [line for line in read.missing if "column" in line] == []
    # 200 uniform picks: all of the run is in the meter's window.
    assert run.meter.lift.num_uniform < 256
    assert asdict(read.forecast.lift) == pytest.approx(asdict(run.meter.lift), rel=1e-12)
    assert run.metrics["gradalign/forecast/lift"] == run.meter.lift.ratio
    assert headline_of(read)[1].startswith("The forecast pays: problems it chose score 1.")
    assert read.metrics.points("gradalign/forecast/lift")[0].tolist() == list(range(10, 51))


def test_responses_are_counted_by_session_and_the_trusted_share_is_of_those_trained_on(run):
    picks, _, groups = run.steps[50]
    num_generated = sum(not g.is_failed for g in groups)
    assert run.metrics["gradalign/responses/generated"] == 2 * (num_generated + 2)
    assert run.metrics["gradalign/responses/trusted"] == 4
    assert run.metrics["gradalign/cost/trusted_share"] == 4 / (2 * num_generated)
    assert "cost/trusted_share" not in cost_metrics({"gradalign/responses/trusted": 4.0}, SECONDS)


def test_texts_are_read_of_groups_that_were_measured_alone(run):
    (part, *_) = parts_of(run.folder / "gradalign", "samples")
    sampled = set(pq.read_table(part.path)["problem_id"].to_pylist())
    assert sampled and not any(problem_id % 50 in (1, 2) for problem_id in sampled)


def test_problems_that_were_not_picked_are_told_apart():
    """As a refill of verl's group filter, or a trusted problem that is trained on."""
    candidates = tabulate([group_of(3), group_of(7), group_of(5)], 0.5)
    picks = Picks(np.array([5, 3]), np.array([0.5, 0.3]), np.array([0.05, 0.03]), np.array([True, False]))
    observed = Observations(np.array([7]), np.array([0.7]), np.array([0.1]), np.array([9.0]))
    columns = log_columns(1, candidates, select_picks(candidates, np.array([False, False, True])), picks, observed)
    assert columns["pick"].tolist() == ["forecast", "", "uniform"]
    np.testing.assert_array_equal(columns["forecast_mean"], [0.3, np.nan, 0.5])
    np.testing.assert_array_equal(columns["observed"], [np.nan, 0.7, np.nan])


def test_other_schedules_have_no_such_columns(tmp_path):
    candidates = tabulate([group_of(3), group_of(7)], 0.5)
    columns = log_columns(1, candidates, select_picks(candidates, np.array([False, False])))
    assert columns["pick"].tolist() == ["", ""]
    SelectionLog(tmp_path).write(1, columns)
    assert read_selection_log(tmp_path).schema.names == SCHEMA.names
