# SPDX-License-Identifier: Apache-2.0
"""Shortlists, picks and observations: what holds of every step, of resuming, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.simulated_pool import Pool, config_of
from verl_gradalign.selection.features import Features
from verl_gradalign.selection.forecast import Forecaster
from verl_gradalign.selection.state_file import load_state, save_state
from verl_gradalign.types import Observations

untimed = settings(deadline=None, max_examples=30)
SMALL = Pool(400, noise=0.1, dead=0.2, own=0.05, common=0.02, num_noise_features=3)


def pick(forecaster, pool, step, num, floor=None):
    shortlist = forecaster.shortlist(step, num)
    return shortlist, forecaster.pick(step, shortlist, pool.features(shortlist), num, floor)


def trained(num_steps=10, pool=SMALL, **values):
    """A forecaster after some steps, and its pool, with random numbers of its own."""
    pool = dataclasses.replace(pool)
    forecaster = pool.forecaster(**values)
    pool.run(forecaster, num_steps)
    return forecaster, pool


@untimed
@given(
    num=st.integers(1, 40),
    oversample=st.sampled_from([1, 1.1, 2.34, 4, 8]),
    floor=st.sampled_from([0.0, 0.1, 0.125, 0.29, 0.5, 1.0]),
    rest=st.integers(0, 8),
    seed=st.integers(0, 5),
)
def test_a_step_is_a_whole_batch_of_distinct_problems_of_the_shortlist_with_its_uniform_part(
    num, oversample, floor, rest, seed
):
    pool = Pool(300, noise=0.1)
    forecaster = pool.forecaster(num, oversample=oversample, seed=seed, floor=floor, rest=rest)
    last_step = {}
    for step in range(1, 8):
        shortlist, picks = pick(forecaster, pool, step, num)
        ids = picks.problem_id_P
        assert len(shortlist) == min(math.ceil(round(oversample * num, 9)), 300)
        assert len(set(shortlist.tolist())) == len(shortlist) and set(shortlist.tolist()) <= set(pool.ids.tolist())
        assert len(set(ids.tolist())) == len(ids) == num and set(ids.tolist()) <= set(shortlist.tolist())
        if step > 1:
            assert abs(picks.is_uniform_P.sum() - floor * num) < 1
            assert np.isfinite(picks.mean_P).all() and (picks.deviation_P > 0).all()
        awake = [i for i in pool.ids.tolist() if last_step.get(i, -99) < step - rest]
        asleep = set(pool.ids.tolist()) - set(awake)
        if len(awake) >= len(shortlist):
            assert not asleep & set(shortlist.tolist())
        else:  # all who are awake, and of the others those that rest longest
            assert set(awake) <= set(shortlist.tolist())
            back, left = asleep & set(shortlist.tolist()), asleep - set(shortlist.tolist())
            assert max((last_step[i] for i in back), default=0) <= min((last_step[i] for i in left), default=99)
        last_step |= dict.fromkeys(ids.tolist(), step)
        forecaster.observe(step, pool.measure(ids))


def test_what_is_uniform_rounds_to_the_floor_on_average():
    forecaster, pool = trained(floor=0.29)
    counts = [pick(forecaster, pool, step, 10)[1].is_uniform_P.sum() for step in range(11, 411)]
    assert np.mean(counts) == pytest.approx(2.9, abs=0.1) and set(counts) == {2, 3}
    forecaster, pool = trained()
    assert pick(forecaster, pool, 11, 10, floor=1.0)[1].is_uniform_P.all()
    assert not pick(forecaster, pool, 12, 10, floor=0.0)[1].is_uniform_P.any()


def test_shortlists_and_uniform_picks_are_uniform_over_what_is_awake():
    pool = Pool(60, noise=0.1)
    forecaster = pool.forecaster(6, rest=0, oversample=2)
    in_shortlist, picked = np.zeros(60), np.zeros(60)
    for step in range(1, 1001):
        shortlist, picks = pick(forecaster, pool, step, 6, floor=0.5)
        in_shortlist[pool.rows(shortlist)] += 1
        picked[pool.rows(picks.problem_id_P[picks.is_uniform_P])] += 1
        if step == 1:
            forecaster.observe(step, pool.measure(picks.problem_id_P))
    for count in (in_shortlist, picked):
        expected = count.sum() / 60
        assert np.sum((count - expected) ** 2 / expected) < 100  # chi-square of 59: .999 below 98.3


def test_before_anything_is_observed_all_picks_are_uniform_and_marked_so():
    pool = Pool(400)
    forecaster = pool.forecaster()
    for step in (1, 2):
        picks = pick(forecaster, pool, step, 32)[1]
        assert picks.is_uniform_P.all() and not picks.mean_P.any() and np.isnan(picks.deviation_P).all()
    dead = Observations(picks.problem_id_P, np.zeros(32), np.full(32, np.nan), np.full(32, 9.0))
    forecaster.observe(2, dead)  # zeros alone have no size
    assert pick(forecaster, pool, 3, 32)[1].is_uniform_P.all()


def test_the_order_of_picks_tells_nothing():
    forecaster, pool = trained(20, Pool(3000, noise=0.05))
    places = []
    for step in range(21, 221):
        picks = pick(forecaster, pool, step, 32)[1]
        places += [np.argsort(np.argsort(picks.problem_id_P)), np.flatnonzero(picks.is_uniform_P)]
    uniform = np.concatenate(places[1::2])
    assert uniform.mean() == pytest.approx(15.5, abs=1.5)
    assert np.mean(places[::2], axis=0).std() < 2  # of ranks 0 to 31


@untimed
@given(stop=st.integers(0, 9), delay=st.integers(0, 3), per=st.sampled_from(["response", "token"]))
def test_a_run_killed_and_resumed_after_any_step_picks_the_same(tmp_path_factory, stop, delay, per):
    """Measurements come `delay` steps late, as in an asynchronous run: what is waited for is part of the state."""
    path = tmp_path_factory.mktemp("state") / "forecast.npz"
    measure = Pool(120, noise=0.1, own=0.1, dead=0.2)
    values = {}

    def measured(ids, step):
        if step not in values:
            values[step] = measure.measure(ids)
        return values[step]

    def run(forecaster, first, last, picked):
        for step in range(first, last + 1):
            picks = pick(forecaster, measure, step, 8)[1]
            further = forecaster.further(step % 3)
            picked.append((picks.problem_id_P.tolist(), further.tolist(), picks.mean_P.tolist()))
            if step > delay:
                forecaster.observe(step, measured(np.array(picked[step - delay - 1][0]), step - delay))
        return picked

    unbroken = run(measure.forecaster(8, per=per), 1, 10, [])
    first = measure.forecaster(8, per=per)
    picked = run(first, 1, stop, [])
    save_state(path, {}, first.state())
    resumed = measure.forecaster(8, per=per)
    resumed.restore(load_state(path))
    assert run(resumed, stop + 1, 10, picked) == unbroken


def test_equal_seeds_agree_and_others_differ():
    picked = []
    for seed in (3, 3, 4):
        forecaster, pool = trained(seed=seed)
        picked.append(pick(forecaster, pool, 11, 32)[1].problem_id_P.tolist())
    assert picked[0] == picked[1] != picked[2]


@pytest.mark.parametrize("exponent", [-40, 40])
def test_the_unit_of_the_score_changes_no_pick(exponent):
    """By a power of two, so that rounding is the same."""
    picked = []
    for unit in (1.0, 2.0**exponent):
        pool = dataclasses.replace(SMALL)
        steps = pool.run(pool.forecaster(), 12, unit=unit)
        picked.append([p.problem_id_P.tolist() for p in steps])
    assert picked[0] == picked[1]


@untimed
@given(seed=st.integers(0, 1000), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_is_no_observation(seed, bad):
    """With bad values among them a step teaches what it teaches without them."""
    rng = np.random.default_rng(seed)
    means = []
    for is_there in (True, False):
        forecaster, pool = trained(3)
        _, picks = pick(forecaster, pool, 4, 32)
        o = pool.measure(picks.problem_id_P)
        is_bad = np.random.default_rng(seed).random(32) < 0.3
        o.value_P[is_bad] = bad
        o.error_P[is_bad] = rng.choice([np.nan, np.inf, 1.0], is_bad.sum())
        if not is_there:
            o = Observations(*(getattr(o, f.name)[~is_bad] for f in dataclasses.fields(o)))
        forecaster.observe(4, o)
        assert all(math.isfinite(value) for value in forecaster.summary().values())
        means.append(forecaster.forecast(5, pool.ids, pool.features(pool.ids)))
    np.testing.assert_array_equal(means[0], means[1])
    assert np.isfinite(means[0]).all()


def test_an_unknown_error_is_the_typical_one():
    found = []
    for value in (np.nan, np.inf, 0.1):
        forecaster, pool = trained(0, dataclasses.replace(SMALL, dead=0.0))
        _, picks = pick(forecaster, pool, 1, 32)
        o = pool.measure(picks.problem_id_P)
        error_P = np.where(np.arange(32) < 8, value, 0.1)
        forecaster.observe(1, dataclasses.replace(o, error_P=error_P))
        found.append(forecaster.forecast(2, pool.ids, pool.features(pool.ids))[0])
    np.testing.assert_allclose(found[0], found[2], atol=0.02)
    assert np.isfinite(found[1]).all()


def test_one_wild_measurement_is_not_all_that_is_remembered():
    """A gradient a hundred times as large as the others."""
    found = []
    for wild in (1.0, 1e6):
        forecaster, pool = trained(8, Pool(3000, means=(0.1, 0.0), noise=0.1))
        _, picks = pick(forecaster, pool, 9, 32)
        o = pool.measure(picks.problem_id_P)
        o.value_P[0] *= wild
        o.error_P[0] *= wild
        forecaster.observe(9, o)
        found.append(forecaster.forecast(10, pool.ids, pool.features(pool.ids))[0])
    assert np.abs(found[0] - found[1]).max() < 0.03


def test_observations_may_come_steps_later_and_each_is_learnt_from_once():
    forecaster, pool = trained(0)
    picks = [pick(forecaster, pool, step, 32)[1] for step in (1, 2, 3)]
    first = pool.measure(picks[0].problem_id_P)
    forecaster.observe(3, first)
    assert forecaster.summary()["known"] == 32
    before = forecaster.forecast(4, pool.ids, pool.features(pool.ids))
    forecaster.observe(3, first)
    np.testing.assert_array_equal(before, forecaster.forecast(4, pool.ids, pool.features(pool.ids)))
    strangers = dataclasses.replace(first, problem_id_P=first.problem_id_P + 1)
    with pytest.raises(ValueError, match="not of the pool"):
        forecaster.observe(3, strangers)


def test_a_direction_that_is_held_says_less_than_as_many_new_ones():
    deviation = {}
    for is_fresh in (True, False):
        forecaster, pool = trained(0, Pool(3000, means=(0.1, 0.0), noise=0.02))
        for step in range(1, 7):
            picks = pick(forecaster, pool, step, 32)[1]
            forecaster.observe(step, pool.measure(picks.problem_id_P), is_fresh=is_fresh or step == 1)
        deviation[is_fresh] = forecaster.forecast(7, pool.ids, pool.features(pool.ids))[1].mean()
    assert deviation[False] > 1.3 * deviation[True]


def test_thousands_of_steps_of_dead_groups_end_in_uniform_picks_and_what_follows_is_learnt():
    forecaster, pool = trained(5)
    for step in (6000, 20_000):
        picks = pick(forecaster, pool, step, 32)[1]
        dead = Observations(picks.problem_id_P, np.zeros(32), np.full(32, np.nan), np.full(32, 9.0))
        forecaster.observe(step, dead)
    picks = pick(forecaster, pool, 20_001, 32)[1]
    assert picks.is_uniform_P.all()
    forecaster.observe(20_001, pool.measure(picks.problem_id_P))
    picks = pick(forecaster, pool, 20_002, 32)[1]
    assert not picks.is_uniform_P.all() and np.isfinite(picks.deviation_P).all()


def test_further_problems_are_the_next_best_then_any_that_are_not_in_the_step():
    forecaster, pool = trained(20, Pool(400, noise=0.01, means=(1.0, 0.0)), oversample=2)
    shortlist, picks = pick(forecaster, pool, 21, 16, floor=0.0)
    in_step = set(picks.problem_id_P.tolist())
    mean = dict(zip(shortlist.tolist(), forecaster.forecast(21, shortlist, pool.features(shortlist))[0], strict=True))
    best = forecaster.further(10)
    left = sorted((mean[i] for i in set(shortlist.tolist()) - in_step), reverse=True)
    np.testing.assert_allclose(sorted([mean[i] for i in best.tolist()], reverse=True), left[:10], atol=0.05)
    others = forecaster.further(30)
    assert set(others[:6].tolist()) == set(shortlist.tolist()) - in_step - set(best.tolist())
    everything = [*picks.problem_id_P.tolist(), *best.tolist(), *others.tolist()]
    assert len(set(everything)) == len(everything) == 56
    assert not set(everything) & set(forecaster.shortlist(22).tolist())  # they rest
    assert len(forecaster.further(1000)) == 400 - 56 and len(forecaster.further(1)) == 0


def test_alignment_by_token_prefers_short_responses():
    shares = {}
    for per in ("response", "token"):
        pool = Pool(4000, shares=(0.5, 0.5), means=(0.1, 0.15), noise=0.05)
        forecaster = pool.forecaster(per=per)
        for step in range(1, 21):
            _, picks = pick(forecaster, pool, step, 32)
            o = pool.measure(picks.problem_id_P)
            tokens_P = np.where(pool.kind[pool.rows(o.problem_id_P)] == 0, 50.0, 200.0)
            forecaster.observe(step, dataclasses.replace(o, response_tokens_P=tokens_P))
        shares[per] = np.mean(
            [pool.share_of_targets(pick(forecaster, pool, step, 32)[1].problem_id_P) for step in (21, 22, 23)]
        )
    assert shares["token"] > 0.85 and shares["response"] < 0.2


def test_features_that_cannot_be_used_are_refused_by_key_and_problem():
    forecaster, pool = trained(1)
    shortlist = forecaster.shortlist(2)
    good = pool.features(shortlist)
    values_SF = good.values_SF.copy()
    values_SF[3, 2] = np.nan
    narrower = Features(good.values_SF[:, :-1], good.prior_F[:-1])
    for features, what in [
        (Features(values_SF, good.prior_F), f"not finite for problems \\[{shortlist[3]}\\]"),
        (Features(good.values_SF[:-1], good.prior_F), "in place of"),
        (narrower, "6 numbers a problem before, 5 now"),
        (Features(good.values_SF, 2 * good.prior_F), "changed their priors"),
        (Features(good.values_SF, 0 * good.prior_F), "prior of 0.0"),
    ]:
        with pytest.raises(ValueError, match=f"gradalign.forecast.features=.*{what}.*Remedy"):
            forecaster.pick(2, shortlist, features, 32)


def test_a_pool_or_shortlist_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="data.train_files: hold 5 problems.*Remedy.*train_batch_size=5"):
        Forecaster(config_of(), np.arange(5), 6)
    pool = Pool(50)
    forecaster = pool.forecaster(4)
    shortlist = forecaster.shortlist(1)[:3]
    with pytest.raises(ValueError, match="oversample.*holds 3 problems, 4 are to be picked.*Remedy"):
        forecaster.pick(1, shortlist, pool.features(shortlist), 4)


def test_the_state_of_another_pool_or_seed_is_refused():
    forecaster, pool = trained(2)
    state = forecaster.state()
    with pytest.raises(ValueError, match="problem_ids_crc32.*cannot go on.*Remedy"):
        Forecaster(config_of(), pool.ids[:-1], 32).restore(state)
    with pytest.raises(ValueError, match="gradalign.seed=1.*cannot go on.*Remedy"):
        pool.forecaster(seed=1).restore(state)


def test_the_order_of_the_pool_changes_no_forecast():
    pool = dataclasses.replace(SMALL)
    forecaster = Forecaster(config_of(), pool.ids[::-1], 32)
    for step in range(1, 4):
        picks = pool.run_step(forecaster, step)
        assert set(picks.problem_id_P.tolist()) <= set(pool.ids.tolist())
    assert forecaster.summary()["known"] > 32
