# SPDX-License-Identifier: Apache-2.0
"""The report says whether a forecast pays, which sources it prefers and starves, and what that rests on."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tests.benchmarks.report_logs import LogPlan, write_log
from verl_gradalign.log.parts import parts_of
from verl_gradalign.log.selection_log import read_selection_log
from verl_gradalign.report.findings import findings_of, headline_of, summary_of
from verl_gradalign.report.forecast_findings import forecast_findings
from verl_gradalign.report.html import render
from verl_gradalign.report.run import find_runs, read_run

PLAN = LogPlan(num_steps=40, num_candidates=48, num_problems=600, num_samples=1, floor=0.125)


def run_of(folder, change=None, **plan):
    """Read a run whose selection is changed."""
    write_log(folder, LogPlan(**{**vars(PLAN), **plan}))
    for part in parts_of(folder, "selection") if change else ():
        pq.write_table(change(pq.read_table(part.path)), part.path)
    return read_run(find_runs([folder])[0])


def said(run, area="forecast"):
    (found,) = (finding for finding in forecast_findings(run) if finding.area == area)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("forecast"))


def test_a_forecast_that_pays_is_the_first_sentence_with_its_numbers(run):
    verdict, headline = headline_of(run)
    assert verdict == "good" and headline == said(run).message
    assert headline.startswith("The forecast pays: problems it chose score 1.")
    assert headline.endswith("; 1,680 and 240 problems).") and "(90% interval 1." in headline


def test_a_forecast_that_knows_nothing_is_said_not_to_pay_with_a_remedy(tmp_path):
    run = run_of(tmp_path, forecast_error=100.0)
    assert headline_of(run)[0] == "watch"
    assert said(run).message.startswith("The forecast does not pay here: problems it chose score ")
    assert "the interval holds 1" in said(run).message
    assert "Set gradalign.forecast.on_no_lift=uniform" in said(run).remedy
    assert said(run) in findings_of(run)


def test_without_random_draws_nothing_is_claimed_and_the_key_is_named(tmp_path):
    run = run_of(tmp_path, floor=0.0)
    assert headline_of(run)[0] == "watch"
    assert said(run).message.startswith("Whether the forecast pays cannot be said yet: ")
    assert said(run).message.endswith("of what it chose 1,920 problems were measured, of random draws 0.")
    assert "gradalign.forecast.floor=0.125" in said(run).remedy


def test_the_lift_is_that_of_the_rows_with_zeros_for_dead_groups(run):
    rows = read_selection_log(run.folder).to_pandas()
    means = rows.groupby("pick")["observed"].mean()
    assert run.forecast.lift.ratio == pytest.approx(means["forecast"] / means["uniform"])
    assert (rows["observed"] == 0).mean() > 0.1 and rows["score"].isna().mean() > 0.1
    correlation, count = run.forecast.spearman()
    assert count == 40 * 48
    assert correlation == pytest.approx(rows["forecast_mean"].rank().corr(rows["observed"].rank()))


def test_everything_that_is_compared_is_forecast_picks_with_random_draws(run):
    rows = read_selection_log(run.folder).to_pandas()
    rate = rows.groupby("pick")["success_rate"].mean()
    assert run.steps.mean("success_rate", False) == pytest.approx(rate["uniform"])
    assert run.steps.mean("success_rate", True) == pytest.approx(rate["forecast"])
    shares = rows.groupby("pick")["data_source"].value_counts(normalize=True)
    for source, of_pool, of_chosen in run.composition("data_source"):
        assert of_pool == pytest.approx(shares["uniform", source])
        assert of_chosen == pytest.approx(shares["forecast", source])
    texts = " ".join(finding.message for finding in findings_of(run))
    assert "of what the forecast chose" in texts and "of random draws" in texts
    assert "candidates" not in next(f.message for f in findings_of(run) if f.area.startswith("composition"))


def test_sources_are_told_by_forecast_and_by_measurement(run):
    rows = read_selection_log(run.folder).to_pandas()
    uniform = rows[rows["pick"] == "uniform"].groupby("data_source")
    table = run.forecast.sources(list(run.columns["data_source"].values))
    assert [row.name for row in table] == uniform["forecast_mean"].mean().sort_values(ascending=False).index.tolist()
    for row in table:
        observed = rows[(rows["pick"] == "uniform") & (rows["data_source"] == row.name)]["observed"]
        assert row.mean_observed == pytest.approx(observed.mean()) and row.num_observed == len(observed)
        assert row.error == pytest.approx(observed.sem())
    assert said(run, "sources").message.startswith(f"By forecast {table[0].name} (")
    assert f"{table[-1].name} (" in said(run, "sources").message


def test_a_starved_source_is_named_with_what_was_measured_of_it(tmp_path):
    def starve(table):
        """The forecast picks of a source become another's, and what is measured of the source is zero."""
        is_mine = pc.equal(table["data_source"], "dapo")
        is_forecast = pc.equal(table["pick"], "forecast")
        source = pc.if_else(pc.and_(is_mine, is_forecast), "math", table["data_source"])
        observed = pc.if_else(is_mine, 0.0, table["observed"])
        table = table.set_column(table.column_names.index("data_source"), "data_source", source)
        return table.set_column(table.column_names.index("observed"), "observed", observed)

    run = run_of(tmp_path, change=starve)
    found = said(run, "starved sources")
    assert found.level == "watch" and found in findings_of(run)
    assert "dapo: " in found.message and ", 0% of the forecast picks, as its " in found.message
    assert "not one is above 0: look at its rewards" in found.message and "gradalign.forecast.floor" in found.remedy


def test_a_source_that_is_avoided_for_good_reason_is_noted_without_alarm(run):
    found = said(run, "starved sources")
    assert (found.level, found.remedy) == ("note", "")
    assert found.message.startswith("Hardly ever chosen: dapo: 20% of the pool, 2% of the forecast picks, as its ")
    assert found not in findings_of(run)


def test_the_trusted_set_s_share_and_the_agreement_are_said(run, tmp_path):
    assert said(run, "trusted responses").message == "The trusted set's responses were 9.1% of all that were generated."
    agreement = said(run, "forecasts and measurements").message
    assert "Features explain 30% of their variance, the problems' own parts 10%" in agreement
    assert f"{run.forecast.spearman()[0]:.2f} (rank correlation of 1,920 picks, out of sample)" in agreement


def test_the_page_has_the_section_with_figures_and_table(run):
    page = render([run], top=1)
    section = page[page.index("<h3>Does the forecast pay?</h3>") : page.index("<h3>Score against success rate</h3>")]
    assert "The forecast pays" in section and section.count("<figure") == 3
    assert "Line chart of lift of the forecast by step: 1." in section and "90% interval" in section
    assert "measured of forecast picks" in section and "webinstruct" in section
    assert ">forecast picks / random draws<" in page


def test_the_numbers_are_there_for_machines(run):
    summary = json.loads(json.dumps(summary_of(run)))["forecast"]
    assert summary["pays"] is True and summary["lift"]["low"] > 1 and summary["num_compared"] == 1920
    assert len(summary["sources"]) == 5 and len(summary["sentences"]) == 5
    assert summary["starved"] == [
        source.in_words() for source in run.forecast.starved(list(run.columns["data_source"].values))
    ]


def test_a_run_of_another_schedule_has_no_such_section(tmp_path):
    run = run_of(tmp_path, floor=None)
    assert not run.forecast.has_picks and run.groups == ("candidates", "kept")
    assert list(forecast_findings(run)) == [] and summary_of(run)["forecast"] is None
    assert run.missing == []  # columns that only a forecast has are not missed


def test_columns_that_are_lost_or_strange_end_no_report(tmp_path):
    def spoil(table):
        places = np.arange(len(table)) % 4
        table = table.drop_columns(["forecast_mean"])
        values = pa.array(np.choose(places, [np.nan, np.inf, -np.inf, 0.1]))
        table = table.set_column(table.column_names.index("observed"), "observed", values)
        names = pa.array([["uniform", None, "?", "forecast"][place] for place in places])
        return table.set_column(table.column_names.index("pick"), "pick", names)

    run = run_of(tmp_path, change=spoil)
    assert run.forecast.num_observed == (480, 0) and np.isnan(run.forecast.spearman()[0])
    assert "cannot be said yet" in headline_of(run)[1]
    assert "Does the forecast pay?" in render([run], top=1)
