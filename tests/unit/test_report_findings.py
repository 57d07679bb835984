# SPDX-License-Identifier: Apache-2.0
"""The summary says what is in the log: good where it is good, with a remedy where it is not."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.benchmarks.report_logs import LogPlan, write_log
from verl_gradalign.log.parts import parts_of
from verl_gradalign.report.findings import findings_of, headline_of, summary_of
from verl_gradalign.report.run import find_runs, read_run

PLAN = {"num_steps": 20, "num_candidates": 48, "num_problems": 120, "num_samples": 1}


def run_with(folder, metrics=(), change=None, **plan):
    """Read a run whose metrics are replaced by these, and whose selection is changed."""
    write_log(folder, LogPlan(**PLAN, **plan))
    for part in parts_of(folder, "metrics"):
        table = pq.read_table(part.path)
        values = [
            dict(metrics).get(name, value)
            for name, value in zip(table["name"].to_pylist(), table["value"].to_pylist(), strict=True)
        ]
        table = table.set_column(2, "value", pa.array(values))
        new = table.slice(0, 1).to_pylist()[0]
        rows = [{**new, "name": name, "value": value} for name, value in dict(metrics).items()]
        rows = [row for row in rows if row["name"] not in set(table["name"].to_pylist())]
        pq.write_table(pa.concat_tables([table, pa.Table.from_pylist(rows, table.schema)]), part.path)
    for part in parts_of(folder, "selection") if change else ():
        pq.write_table(change(pq.read_table(part.path)), part.path)
    return read_run(find_runs([folder])[0])


def verdicts(run):
    return {finding.area: finding.level for finding in findings_of(run)}


def finding(run, topic):
    (found,) = (finding for finding in findings_of(run) if finding.area == topic)
    return found


def test_a_run_that_works_is_called_good(tmp_path):
    run = run_with(tmp_path)
    found = verdicts(run)
    assert headline_of(run)[0] == "good"
    for topic in (
        "held-out accuracy",
        "alignment",
        "reliability of scores",
        "reliability of the direction",
        "exactness",
    ):
        assert found[topic] == "good"
    assert "problem" not in found.values()


@pytest.mark.parametrize(("value", "verdict"), [(0.1, "problem"), (0.4, "watch"), (0.7, "good")])
def test_reliability_decides_the_headline(tmp_path, value, verdict):
    run = run_with(tmp_path, {"gradalign/reliability/scores": value})
    assert headline_of(run)[0] == verdict
    said = finding(run, "reliability of scores")
    assert said.level == verdict and f"{value:.2f}" in said.message
    assert (verdict == "good") == (said.remedy == "")
    if verdict == "problem":
        assert "mostly noise" in headline_of(run)[1] and "rollout.n (now 16)" in said.remedy


@pytest.mark.parametrize(
    ("metrics", "topic", "verdict", "remedy"),
    [
        ({"gradalign/reliability/direction": 0.2}, "reliability of the direction", "problem", "gradalign.validation.n"),
        ({"gradalign/probe/canary/relative_error": 0.2}, "exactness", "problem", "gradalign.estimator=backward"),
        ({"gradalign/reliability/fallback": 1.0}, "steps without a reliable ranking", "problem", "min_reliability"),
        ({"gradalign/direction/degenerate": 0.0}, None, None, None),
        ({"gradalign/direction/degenerate": 1.0}, "degenerate directions", "problem", "trusted problems"),
        ({"gradalign/seconds/share_of_step": 0.9}, "cost", "watch", "gradalign.oversample"),
        ({"gradalign/probe/oversized": 20.0}, "oversized problems", "note", "max_tokens_per_rank"),
        (
            {"gradalign/direction/age": 9.0, "gradalign/direction/cosine_previous": 0.1},
            "age of the direction",
            "watch",
            "refresh_interval",
        ),
        (
            {"val-core/aime24/acc/mean@8": 0.2, "val-core/math500/acc/mean@1": 0.5},
            "held-out accuracy",
            "watch",
            "random",
        ),
    ],
)
def test_what_is_wrong_is_found_with_its_remedy(tmp_path, metrics, topic, verdict, remedy):
    run = run_with(tmp_path, metrics)
    if topic is None:
        assert "degenerate directions" not in verdicts(run)
        return
    said = finding(run, topic)
    assert said.level == verdict and remedy in said.remedy


def test_estimated_norms_are_said_with_their_error(tmp_path):
    metrics = {"gradalign/probe/oversized": 20.0, "gradalign/probe/oversized_norm_error": 0.07}
    said = finding(run_with(tmp_path, metrics), "oversized problems")
    assert "Their norms are estimates, off by about 7%." in said.message
    exact = run_with(tmp_path / "exact", {"gradalign/probe/oversized": 20.0})
    assert "estimates" not in finding(exact, "oversized problems").message


def test_dead_and_failed_groups_are_counted(tmp_path):
    def spoil(table):
        reasons = ["failed" if i % 10 == 0 else "dead" for i in range(len(table))]
        return table.set_column(table.column_names.index("reason"), "reason", pa.array(reasons))

    found = verdicts(run_with(tmp_path, change=spoil))
    assert found["dead groups"] == "watch" and found["failed groups"] == "problem"


def test_rewards_that_are_not_numbers_are_named_as_that_and_not_as_difficulty(tmp_path):
    def spoil(table):
        reasons = ["reward_not_finite" if i % 10 == 0 else "top" for i in range(len(table))]
        return table.set_column(table.column_names.index("reason"), "reason", pa.array(reasons))

    run = run_with(tmp_path, change=spoil)
    assert verdicts(run)["rewards that are not numbers"] == "problem" and "dead groups" not in verdicts(run)
    said = finding(run, "rewards that are not numbers")
    assert "nan, infinite or missing" in said.message and "verl-gradalign doctor" in said.remedy
    assert summary_of(run)["reasons"]["reward_not_finite"] > 0


def test_what_selection_prefers_and_avoids_is_named_with_shares(tmp_path):
    def avoid(table):
        sources = table["data_source"].to_pylist()
        kept = [keep and source != "dapo" for keep, source in zip(table["kept"].to_pylist(), sources, strict=True)]
        return table.set_column(table.column_names.index("kept"), "kept", pa.array(kept))

    said = finding(run_with(tmp_path, change=avoid), "composition by data_source")
    assert said.level == "watch" and "avoids dapo" in said.message and "0% of what is kept" in said.message
    assert "Nearly nothing of dapo" in said.remedy


def test_suspicious_problems_are_counted_with_what_chance_would_give(tmp_path):
    run = run_with(tmp_path, mislabelled=0.2)
    said = finding(run, "suspicious problems")
    assert said.level == "watch"
    assert re.search(
        r"\d+ of \d+ problems look suspicious, \d+ of them .* by chance one would expect about \d+", said.message
    )


def test_a_run_without_alignment_is_a_baseline_not_a_failure(tmp_path):
    run = run_with(tmp_path, random_scores=True)
    assert headline_of(run)[0] == "note" and "baseline" in headline_of(run)[1]
    assert "alignment" not in verdicts(run) and "suspicious problems" not in verdicts(run)


def test_scores_that_do_not_tell_kept_from_rejected_are_a_problem(tmp_path):
    def reverse(table):
        kept = [not keep for keep in table["kept"].to_pylist()]
        return table.set_column(table.column_names.index("kept"), "kept", pa.array(kept))

    run = run_with(tmp_path, change=reverse)
    assert headline_of(run) == (
        "problem",
        "What was kept scores no higher by cosine than what was not: the selection selects nothing.",
    )
