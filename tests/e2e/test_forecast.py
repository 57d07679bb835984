# SPDX-License-Identifier: Apache-2.0
"""Problems are chosen by a forecast, trained on all of them, and measured by the update that trains on them."""

from __future__ import annotations

import math

import pytest

from tests.e2e.runs import Run
from tests.e2e.series_runs import NUM_STEPS

pytestmark = pytest.mark.e2e

BATCH, N = 4, 8
"""configs/regime/quickstart.yaml"""
NUM_TRUSTED, INTERVAL = 24, 4
MAX_SUM_ERROR = 1e-5  # measured 1e-8 in float32


@pytest.fixture
def run(series: dict[str, Run]) -> Run:
    return series["whole_forecast"]


def test_nothing_is_generated_but_what_is_trained_on_and_a_share_of_the_trusted_set(run: Run) -> None:
    assert len(run.steps) == NUM_STEPS
    trusted = [m["gradalign/responses/trusted"] for m in run.steps]
    num_of_a_problem = trusted[0] / (NUM_TRUSTED / INTERVAL)
    assert num_of_a_problem == int(num_of_a_problem) >= 2
    for m in run.steps:
        assert m["gradalign/responses/trusted"] == NUM_TRUSTED / INTERVAL * num_of_a_problem
        assert m["gradalign/responses/trained"] == BATCH * N
        assert m["gradalign/responses/generated"] == BATCH * N + m["gradalign/responses/trusted"]
        assert m["gradalign/cost/trusted_share"] == pytest.approx(m["gradalign/responses/trusted"] / (BATCH * N))


def test_a_step_trains_on_what_it_picked_and_none_returns_before_its_rest(run: Run) -> None:
    picked = [{row["problem_id"] for row in run.log if row["step"] == step} for step in range(1, NUM_STEPS + 1)]
    assert all(len(problems) == BATCH for problems in picked)
    for step, problems in enumerate(picked):
        assert not problems & set().union(*picked[max(0, step - 2) : step]), "forecast.rest=2"
        assert len(run.trained_rows(step + 1)) == BATCH * N
    assert all(row["kept"] and row["reason"] in ("forecast", "uniform") for row in run.log)


def test_the_first_step_is_drawn_uniformly_and_later_ones_mostly_by_forecast(run: Run) -> None:
    reasons = [[row["reason"] for row in run.log if row["step"] == step] for step in range(1, NUM_STEPS + 1)]
    assert set(reasons[0]) == {"uniform"}
    assert all(of_step.count("uniform") <= 1 for of_step in reasons[1:]), "an eighth of four, rounded at random"
    assert all(row["forecast_mean"] == 0 for row in run.log if row["step"] == 1)
    later = [row for row in run.log if row["step"] > 1]
    assert all(math.isfinite(row["forecast_mean"]) and row["forecast_deviation"] > 0 for row in later)


def test_what_the_update_measured_adds_up_to_its_own_gradient(run: Run) -> None:
    audited = [m for m in run.steps if "gradalign/update/fidelity" in m]
    assert [int(m["training/global_step"]) for m in audited] == [1, 3, 5], "probe.canary_interval=2"
    for m in run.steps:
        assert 0 < m["gradalign/update/energy_kept"] <= 1
        # Along the direction cut to rank 4: what is cut off is missing from the sum.
        assert 0 <= m["gradalign/update/sum_error"] < 1
    assert all(m["gradalign/update/fidelity"] > 0.5 for m in audited)
    measured = [row for row in run.log if row["dot"] is not None and math.isfinite(row["dot"])]
    assert len(measured) > len(run.log) / 3 and all(row["norm"] is None or math.isnan(row["norm"]) for row in measured)
    assert all(row["observed"] == pytest.approx(row["dot"]) and row["dot_error"] > 0 for row in measured)


def test_every_step_has_a_direction_of_kept_responses(run: Run) -> None:
    kept = [m["gradalign/direction/kept_responses"] for m in run.steps]
    assert kept == sorted(kept) and kept[-1] > kept[0] > 0
    for m in run.steps:
        assert m["gradalign/direction/age"] == 0 and 0 < m["gradalign/direction/part_responses"]
        assert 0 <= m["gradalign/direction/accuracy"] <= 1


def test_candidates_of_every_step_are_scored_along_kept_responses_too(series: dict[str, Run]) -> None:
    for m in series["kept"].steps:
        assert m["gradalign/candidates"] == 2 * BATCH and m["gradalign/kept"] == BATCH
        assert m["gradalign/responses/trusted"] < NUM_TRUSTED * N / 2
        assert m["gradalign/direction/age"] == 0 and m["gradalign/direction/part_responses"] >= N
        assert math.isfinite(m["gradalign/score/mean"])


def test_cosine_is_forecast_too_and_trusted_groups_take_places_of_the_batch(series: dict[str, Run]) -> None:
    run = series["forecast_before"]
    for step, m in enumerate(run.steps, start=1):
        rows = [row for row in run.log if row["step"] == step]
        num_trusted = m["gradalign/responses/trusted"] / N
        assert num_trusted == NUM_TRUSTED / 12
        # Of the two that a step rolls out those of the audit are not trained on.
        assert BATCH - num_trusted <= len(rows) <= BATCH
        assert m["gradalign/responses/trained"] == BATCH * N == len(run.trained_rows(step))
        assert {"gradalign/direction/accuracy", "gradalign/score/mean"} <= set(m)
    assert any(math.isfinite(row["norm"]) for row in run.log if row["norm"] is not None)


def test_the_whole_direction_is_exact_in_the_update_and_may_be_held(series: dict[str, Run]) -> None:
    run = series["forecast_held"]
    assert [m["gradalign/responses/trusted"] > 0 for m in run.steps] == [True, False, True]
    assert [m["gradalign/direction/age"] for m in run.steps] == [0, 1, 0]
    for m in run.steps:
        assert m["gradalign/update/sum_error"] < 1e-4 and m["gradalign/update/energy_kept"] == 1
    assert any(-1 <= row["score"] <= 1 for row in run.log if row["score"] is not None)


def test_a_difficulty_forecast_needs_no_trusted_set_and_measures_nothing(series: dict[str, Run]) -> None:
    run = series["difficulty"]
    for m in run.steps:
        assert m["gradalign/responses/generated"] == m["gradalign/responses/trained"] == BATCH * N
        assert "gradalign/update/sum_error" not in m and "gradalign/direction/norm" not in m
    for row in run.log:
        live = 0 < row["success_rate"] < 1
        assert row["observed"] == pytest.approx(0.5 - abs(row["success_rate"] - 0.5) if live else 0.0)


def test_an_asynchronous_run_learns_from_groups_that_were_chosen_steps_before(asynchronous_forecast: Run) -> None:
    run = asynchronous_forecast
    assert len(run.steps) == 4
    for m in run.steps:
        assert m["gradalign/responses/trained"] == BATCH * N
    # What was sent ahead of the first step was drawn without a forecast, and shows no lift.
    ahead = [row for row in run.log if row["pick"] == ""]
    assert len(ahead) == BATCH
    drawn = [row for row in run.log if row["pick"]]
    assert len(drawn) == 3 * BATCH and {row["step"] for row in drawn} == {2, 3, 4}
    assert run.steps[-1]["gradalign/forecast/known"] > 0
    assert all(m["gradalign/update/sum_error"] < 1 for m in run.steps if "gradalign/update/sum_error" in m)
    assert sum("gradalign/update/sum_error" in m for m in run.steps) >= 2, "directions are of kept responses"


def test_what_is_generated_apart_is_measured_by_each_of_a_steps_updates_and_learnt_from_once(
    separate_forecast: tuple[Run, Run],
) -> None:
    first, resumed = separate_forecast
    steps = [*first.steps, *resumed.steps]
    assert [m["training/global_step"] for m in steps] == [1, 2, 3, 4]
    for step, m in enumerate(steps, start=1):
        # Of both updates, though verl reports the mean of several.
        assert m["gradalign/candidates"] == m["gradalign/kept"] == BATCH
        assert m["gradalign/responses/trained"] == BATCH * N
        assert m["gradalign/responses/generated"] == BATCH * N + m["gradalign/responses/trusted"]
        assert m["gradalign/seconds/update"] == m["timing_s/update_actor"]
        assert len((first if step < 4 else resumed).trained_rows(step)) == BATCH * N
        assert len([row for row in first.log if row["step"] == step]) == BATCH
    measured = [m for m in steps if "gradalign/update/sum_error" in m]
    assert len(measured) >= 2, "none is measured before the first trusted groups are there"
    for m in measured:
        assert m["gradalign/direction/age"] == 0 and m["gradalign/direction/part_responses"] > 0
        # Along the whole direction the responses' parts add up, in the second update as in the first.
        assert m["gradalign/update/sum_error"] < MAX_SUM_ERROR
    # In the first step no trusted group may be there yet, so that nothing is learnt of it.
    known = [m.get("gradalign/forecast/known", 0.0) for m in steps]
    assert known == sorted(known) and known[-1] > known[0]


def test_a_run_beside_its_rollout_goes_on_with_the_picks_that_were_in_flight(
    separate_forecast: tuple[Run, Run],
) -> None:
    first, resumed = separate_forecast
    assert resumed.steps[0]["gradalign/forecast/known"] >= first.steps[-1]["gradalign/forecast/known"] > 0
    ahead = [row["step"] for row in first.log if row["pick"] == ""]
    assert ahead == [1] * BATCH, "drawn ahead of the first step without a forecast; none was drawn so on resuming"
    last = [row for row in first.log if row["step"] == 4]
    assert all(math.isfinite(row["forecast_mean"]) and math.isfinite(row["observed"]) for row in last)
