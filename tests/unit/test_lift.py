# SPDX-License-Identifier: Apache-2.0
"""Whether a forecast pays is told by the run itself, with an interval that holds what it should."""

import json
import logging

import numpy as np
import pytest

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.metrics import named
from verl_gradalign.selection.lift import MIN_STEPS, PROBE_SHARE, WINDOW, LiftMeter
from verl_gradalign.selection.lift_estimate import PickSums, estimate
from verl_gradalign.selection.starved import SourceCounts, starved_sources
from verl_gradalign.selection.state_file import load_state, save_state
from verl_gradalign.types import Observations, Picks

POOL = {"math": 800, "code": 150, "logic": 50}


def config_of(**forecast):
    return GradAlignConfig.from_mapping(
        {"schedule": "forecast", "validation": {"files": ["trusted"]}, "forecast": forecast}
    )


def values_of(random, size, mean, dead=0.0, kind="normal"):
    """Measured scores of this mean, a share of them the zeros of dead groups."""
    noise = {"normal": 1 + 1.5 * random.standard_normal(size), "skewed": random.exponential(size=size)}[kind]
    return mean / (1 - dead) * noise * (random.random(size) >= dead)


def sums_of(random, num_steps, num_forecast, num_uniform, lift, dead=0.0, kind="normal", mean=1.0):
    """Sums of steps whose scores get smaller, by half over the window, and are all too high or too low in a step."""
    size_S = np.exp(-0.7 * np.arange(num_steps) / num_steps) * (1 + 0.3 * random.standard_normal(num_steps))
    forecast = values_of(random, (num_steps, num_forecast), lift * mean, dead, kind).sum(1) * size_S
    uniform = values_of(random, (num_steps, num_uniform), mean, dead, kind).sum(1) * size_S
    return PickSums(np.full(num_steps, num_forecast), forecast, np.full(num_steps, num_uniform), uniform)


@pytest.mark.parametrize(("kind", "dead"), [("normal", 0.0), ("normal", 0.7), ("skewed", 0.7)])
@pytest.mark.parametrize("lift", [1.0, 2.0])
@pytest.mark.parametrize(("num_steps", "num_forecast", "num_uniform"), [(64, 28, 4), (100, 7, 1), (24, 4, 28)])
def test_the_90_percent_interval_holds_the_true_lift_in_nine_of_ten_runs(
    num_steps, num_forecast, num_uniform, lift, dead, kind
):
    random = np.random.default_rng(0)
    lifts = [estimate(sums_of(random, num_steps, num_forecast, num_uniform, lift, dead, kind)) for _ in range(400)]
    bounded = [found for found in lifts if found.has_ratio]
    assert len(bounded) > 0.8 * len(lifts)
    # 400 runs: a standard deviation of 1.5 points. Skewed scores with many zeros lose up to three points.
    covered = np.mean([found.low <= lift <= found.high for found in bounded])
    assert 0.85 < covered < 0.94
    if lift == 1:  # then the verdict is right as often
        assert 0.85 < np.mean([found.difference_low <= 0 <= found.difference_high for found in lifts]) < 0.94


def test_the_intervals_of_ratio_and_difference_always_decide_alike():
    random = np.random.default_rng(1)
    for _ in range(400):
        found = estimate(sums_of(random, 40, 14, 2, random.uniform(0.5, 2.0)))
        if found.has_ratio:
            assert (found.low > 1) == (found.difference_low > 0)
            assert (found.high < 1) == (found.difference_high < 0)
            assert found.low < found.ratio < found.high


@pytest.mark.parametrize("mean", [0.0, -0.5])
def test_where_the_uniform_mean_is_not_above_zero_the_difference_is_said_and_covers(mean):
    """Uniform picks of this mean, forecast picks of half a unit more."""
    random = np.random.default_rng(2)
    held, bounded = 0, 0
    for _ in range(500):
        uniform, forecast = random.normal(mean, 1, (50, 4)), random.normal(mean + 0.5, 1, (50, 12))
        found = estimate(PickSums(np.full(50, 12), forecast.sum(1), np.full(50, 4), uniform.sum(1)))
        held += found.difference_low <= 0.5 <= found.difference_high
        bounded += found.has_ratio
    assert 0.86 < held / 500 < 0.94 and bounded < 0.1 * 500
    assert found.pays and "90% interval of the difference" in found.in_words() and "times" not in found.in_words()


def test_a_share_of_uniform_picks_that_changes_while_scores_fall_makes_no_lift():
    """Scores fall tenfold, and the second half of the steps draws nearly all of its problems uniformly."""
    random = np.random.default_rng(3)
    num_uniform_S = np.repeat([4, 28], 40)
    mean_S = np.repeat([1.0, 0.1], 40)
    sums = [
        np.array([values_of(random, num, mean).sum() for num, mean in zip(num_S, mean_S, strict=True)])
        for num_S in (32 - num_uniform_S, num_uniform_S)
    ]
    found = estimate(PickSums(32 - num_uniform_S, sums[0], num_uniform_S, sums[1]))
    assert found.low < 1 < found.high
    assert sums[0].sum() / (32 - num_uniform_S).sum() > 3 * sums[1].sum() / num_uniform_S.sum()  # what it would make


def test_steps_without_a_uniform_pick_are_put_to_those_that_have_one():
    blocks = PickSums(*map(np.array, ([2, 2, 0, 3, 1], [1.0, 2, 0, 4, 5], [0, 1, 1, 0, 0], [0.0, 6, 7, 0, 0]))).blocks()
    assert blocks.num_forecast_S.tolist() == [4, 4] and blocks.num_uniform_S.tolist() == [1, 1]
    assert blocks.sum_forecast_S.tolist() == [3, 9] and blocks.sum_uniform_S.tolist() == [6, 7]
    random = np.random.default_rng(4)
    num_uniform_S = np.tile([0, 1], 60)
    uniform_S = num_uniform_S * values_of(random, 120, 1.0)
    found = estimate(PickSums(np.full(120, 7), values_of(random, (120, 7), 2.0).sum(1), num_uniform_S, uniform_S))
    assert (found.num_forecast, found.num_uniform) == (840, 60) and found.low < 2 < found.high


def test_too_little_gives_no_lift_and_nothing_but_zeros_gives_no_ratio():
    nothing = np.zeros(0)
    assert estimate(PickSums(nothing, nothing, nothing, nothing)) is None
    for num_steps, num_uniform in ((9, 40), (23, 1)):
        counts = np.full(num_steps, num_uniform)
        assert estimate(PickSums(counts, counts * 1.0, counts, counts * 1.0)) is None
    zeros = estimate(PickSums(np.full(30, 20), np.zeros(30), np.full(30, 4), np.zeros(30)))
    assert not zeros.has_ratio and zeros.pays is False and zeros.difference == 0


@pytest.mark.parametrize(
    ("lift", "num_uniform", "beginning"),
    [
        (2.0, 4, "The forecast pays: problems it chose score 2.18 times as high as randomly drawn ones (90% interval "),
        (1.0, 4, "The forecast does not pay here: problems it chose score 1.09 times as high as randomly drawn ones; "),
        (0.4, 4, "The forecast chooses worse than chance: problems it chose score 0.44 times as high as randomly "),
        (1.0, 1, "Whether the forecast pays cannot be said yet: problems it chose score 1.10 times as high as "),
    ],
)
def test_a_sentence_says_whether_it_pays_with_numbers(lift, num_uniform, beginning):
    found = estimate(sums_of(np.random.default_rng(5), 60, 28, num_uniform, lift))
    assert found.in_words().startswith(beginning)
    assert found.in_words().endswith(f"1,680 and {60 * num_uniform} problems).")


def test_a_lift_that_is_hidden_by_noise_is_not_denied():
    """Targets of .04 among single problems' noise of .3: 12% of random draws, 55% of forecast picks, 64 steps of 32."""
    random, found = np.random.default_rng(0), []
    for _ in range(200):
        uniform, forecast = (
            (0.04 * (random.random((64, num)) < share) + 0.3 * random.standard_normal((64, num))).sum(1)
            for num, share in ((4, 0.12), (28, 0.55))
        )
        found.append(estimate(PickSums(np.full(64, 28), forecast, np.full(64, 4), uniform)))
    assert 0.1 < np.mean([lift.pays for lift in found]) < 0.4
    assert np.mean(["The forecast does not pay here" in lift.in_words() for lift in found]) < 0.05


class Run:
    """A run whose forecast has this lift, step by step, as the meter of it sees it."""

    def __init__(self, batch=32, seed=0, **forecast):
        self.config = config_of(**forecast)
        self.meter = LiftMeter(self.config, POOL)
        self.random = np.random.default_rng(seed)
        self.batch, self.step, self.floors = batch, 0, []

    def picks(self, sources):
        floor = self.meter.effective_floor(self.config.forecast.floor)
        self.floors.append(floor)
        is_uniform = np.arange(self.batch) < round(floor * self.batch)
        ids = self.random.choice(10_000, self.batch, replace=False)
        return Picks(ids, self.random.normal(0.1, 0.02, self.batch), np.full(self.batch, 0.05), is_uniform)

    def go(self, num_steps, lift, mean=0.1, of_source=None):
        """Take steps: `of_source` gives sources and scores by pick, else all are of one source."""
        for _ in range(num_steps):
            self.step += 1
            picks = self.picks(POOL)
            value = values_of(self.random, self.batch, mean, dead=0.3) * np.where(picks.is_uniform_P, 1, lift)
            sources = ["math"] * self.batch
            if of_source is not None:
                sources, value = of_source(picks, value)
            order = self.random.permutation(self.batch)
            ids = picks.problem_id_P[order]
            observed = Observations(ids, value[order], np.full(self.batch, 0.1), np.full(self.batch, 9.0))
            self.meter.add(self.step, picks, observed, sources)
        return self


@pytest.mark.parametrize(("lift", "pays"), [(2.5, True), (1.0, False)])
def test_a_run_learns_whether_its_forecast_pays(lift, pays):
    run = Run().go(5, lift)
    assert run.meter.pays is None and "forecast/lift" not in run.meter.metrics()
    run.go(75, lift)
    assert run.meter.pays is pays
    metrics = run.meter.metrics()
    assert metrics["forecast/lift_low"] < lift < metrics["forecast/lift_high"]
    assert (metrics["forecast/picks"], metrics["forecast/uniform"], metrics["forecast/floor"]) == (28, 4, 0.125)
    assert named(metrics)


def test_a_forecast_without_lift_gives_way_to_uniform_draws_and_comes_back_when_it_is_repaired(caplog):
    caplog.set_level(logging.INFO)
    run = Run(on_no_lift="uniform").go(100, 2.5)
    assert set(run.floors) == {0.125}
    run.go(150, 1.0)  # what it knew is of no use any more
    assert run.floors[-1] == 1 - PROBE_SHARE
    # 256 uniform picks are 64 steps, after which nothing of the good time is left.
    assert 110 < run.floors.index(1 - PROBE_SHARE) < 100 + 90
    num_uniform = len(run.floors)
    run.go(200, 2.5)
    assert run.floors.index(0.125, num_uniform) - num_uniform < 90
    assert run.floors[-1] == 0.125 and sum(a != b for a, b in zip(run.floors, run.floors[1:], strict=False)) == 2
    assert "drawing all but a few problems uniformly" in caplog.text and "choosing by forecast again" in caplog.text
    assert "The forecast pays" in caplog.text and "Remedy: gradalign.forecast.on_no_lift" in caplog.text


@pytest.mark.parametrize(("lift", "least", "most"), [(1.0, 0.85, 1.0), (2.5, 0.0, 0.01)])
def test_the_floor_stays_where_it_belongs(lift, least, most):
    """Six runs of 400 steps; of a forecast without lift chance lets one in twenty judgements go the other way."""
    shares = []
    for seed in range(6):
        floors = np.array(Run(seed=seed, on_no_lift="uniform").go(400, lift).floors)
        shares.append((floors[100:] > 0.5).mean())
    assert least <= np.mean(shares) <= most


def test_on_no_lift_keep_says_it_and_changes_nothing(caplog):
    run = Run().go(150, 1.0)
    assert set(run.floors) == {0.125} and run.meter.pays is False
    assert caplog.text.count("Remedy: gradalign.forecast.on_no_lift=uniform") == 1


def test_a_configured_floor_is_never_lowered():
    run = Run(on_no_lift="uniform", floor=0.95, batch=64).go(150, 1.0)
    assert set(run.floors) == {0.95}
    run = Run(floor=1.0).go(40, 1.0)
    assert run.meter.pays is None and run.meter.metrics()["forecast/picks"] == 0


def test_the_rank_correlation_is_of_forecasts_with_what_was_measured_of_the_same_problems():
    meter, random = LiftMeter(config_of(), POOL), np.random.default_rng(0)
    for step in range(1, 41):
        ids, mean = random.choice(9999, 32, replace=False), random.standard_normal(32)
        truth = mean + random.standard_normal(32)  # a correlation of .71
        order = random.permutation(32)[:30]
        picks = Picks(ids, mean, np.ones(32), np.arange(32) < 4)
        meter.add(step, picks, Observations(ids[order], truth[order], truth, truth), ["math"] * 32)
    assert meter.metrics()["forecast/spearman"] == pytest.approx(0.69, abs=0.04)


def test_observations_of_an_earlier_step_count_there_and_bad_ones_nowhere():
    """As in an asynchronous run: what a step picks is measured in the next; of every batch one value is not finite."""
    in_time, late, random = LiftMeter(config_of(), POOL), LiftMeter(config_of(), POOL), np.random.default_rng(0)
    nothing = Observations(np.zeros(0, dtype=np.int64), *3 * [np.zeros(0)])
    before = nothing
    for step in range(1, 62):
        ids = random.choice(9999, 16, replace=False)
        picks = Picks(ids, random.standard_normal(16), np.ones(16), np.arange(16) < 4)
        values = values_of(random, 16, 1.0)
        values[step % 16] = np.nan if step % 2 else np.inf
        foreign = np.append(ids, 10_000 + step)
        observed = Observations(foreign, np.append(values, 99.0), np.ones(17), np.ones(17))
        if step < 61:
            in_time.add(step, picks, observed, ["math"] * 16)
        late.add(step, picks, before, ["math"] * 16)
        before = observed
    assert late.lift == in_time.lift
    assert in_time.lift.num_forecast + in_time.lift.num_uniform == 60 * 15


def test_the_window_holds_the_latest_steps_and_stays_bounded():
    run = Run(batch=64).go(80, 1.0)
    assert WINDOW <= run.meter.lift.num_uniform < WINDOW + 8
    assert run.meter.state()["rows"]["step"].min() == 80 - WINDOW // 8 + 1
    large = Run(batch=4096).go(40, 1.5)
    assert len(np.unique(large.meter.state()["rows"]["step"])) == MIN_STEPS
    alone = Run(batch=2048, floor=0.0).go(60, 1.0)  # never a uniform pick
    assert len(alone.meter.state()["rows"]["step"]) < 60_000 and alone.meter.lift is None


def test_a_source_whose_grader_breaks_is_named_as_starved_with_what_was_measured():
    def broken(picks, value):
        """Code is 15% of the pool, gives zeros, and the forecast has learnt to leave it out."""
        sources = np.where(np.arange(32) % 7 == 0, "code", "math")
        sources[~picks.is_uniform_P] = "math"
        return sources.tolist(), np.where(sources == "code", 0.0, value)

    run = Run(floor=0.5).go(MIN_STEPS - 1, 2.0, of_source=broken)
    assert run.meter.starved == []
    run.go(30, 2.0, of_source=broken)
    (starved, other) = run.meter.starved
    assert (starved.name, other.name) == ("code", "logic")
    assert starved.in_words().startswith("code: 15% of the pool, 0% of the forecast picks, as its ")
    assert starved.in_words().endswith("not one is above 0: look at its rewards")
    assert "none of it was drawn uniformly" in other.in_words()
    assert run.meter.metrics()["forecast/starved"] == 2


def test_the_reason_for_starving_is_what_was_measured():
    shares = {"math": 0.5, "code": 0.5}
    other = SourceCounts(num_forecast=99, num_uniform=10, num_measured=10, sum_uniform=1.0)

    def reason(num_measured, sum_uniform, num_forecast=1):
        counts = {"math": other, "code": SourceCounts(num_forecast, 10, num_measured, sum_uniform)}
        return [source.in_words() for source in starved_sources(counts, shares)]

    (failed,), (poor,), (good,) = reason(0, 0.0), reason(10, 0.2), reason(10, 3.0)
    assert failed.endswith("none of its 10 uniform picks could be measured: look at its rewards")
    assert poor.endswith("as its 10 uniform picks score 0.02 on average, those of all sources 0.06")
    assert good.endswith("although its 10 uniform picks score 0.3 on average, those of all sources 0.2")
    assert reason(10, 0.2, num_forecast=25) == []
    suspect = [
        starved_sources({"math": other, "code": SourceCounts(1, 10, num, total)}, shares)[0].is_suspect
        for num, total in ((0, 0.0), (10, 0.0), (10, 3.0), (10, 0.2), (10, -1.0))
    ]
    assert suspect == [True, True, True, False, False]
    assert starved_sources({"math": SourceCounts(9), "code": SourceCounts(0)}, shares) == []  # too few picks to say


def test_a_resumed_meter_goes_on_as_the_unbroken_one(tmp_path):
    run = Run(on_no_lift="uniform").go(70, 1.0)
    save_state(tmp_path / "state", {}, run.meter.state())
    json.dumps(run.meter.metrics())
    resumed = Run(on_no_lift="uniform")
    resumed.meter.restore(load_state(tmp_path / "state"))
    resumed.step, resumed.random = run.step, np.random.default_rng(9)
    run.random, run.floors = np.random.default_rng(9), []
    for lift in (1.0, 3.0):
        run.go(60, lift)
        resumed.go(60, lift)
        assert resumed.floors == run.floors and resumed.meter.metrics() == run.meter.metrics()
    assert len(set(run.floors)) == 2
