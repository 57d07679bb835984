# SPDX-License-Identifier: Apache-2.0
"""What the forecast learns on made-up pools: how far and how fast, and the two traps that it stays out of."""

import dataclasses

import numpy as np
import pytest

from tests.unit.simulated_pool import Pool
from verl_gradalign.selection.features import Features

SEEDS = range(3)
CEILING = 0.875 * 4 * 0.12 + 0.125 * 0.12
"""Share of targets at most: four times the pool's in what is forecast, the pool's in the uniform part."""


def shares_by_step(num_steps, batch_size=32, seeds=SEEDS, **values):
    """Share of targets in the picks, steps by seeds."""
    columns = []
    for seed in seeds:
        pool = Pool(20_000, seed=seed, **values)
        steps = pool.run(pool.forecaster(batch_size, seed=seed), num_steps, batch_size)
        columns.append([pool.share_of_targets(picks.problem_id_P) for picks in steps])
    return np.array(columns).T


def test_targets_of_twelve_per_cent_are_found_through_noise_eight_times_their_score():
    """Mean .04, noise .3. Measured: .28, .36, .33, .37, .40, .40 in tens of steps of a batch of 32 (eight seeds); .20,
    .32, .42, .42 in fives of steps of a batch of 128 (four). At most .435.
    """
    share = shares_by_step(60)
    assert share[:1].mean() < 0.25 and share[10:60].mean() > 0.25
    large = shares_by_step(30, 128)
    assert large[20:].mean() > 0.85 * CEILING


def test_kinds_whose_scores_are_surely_small_are_not_explored_for_ever():
    """Targets as above; a third of the pool is solved, and over half has small scores: guesses, which pull nowhere.

    A shortlist of eight batches holds as many targets as are picked. Measured .61, .73, .78, .78 in fifteens of steps
    (eight seeds); .50, .62, .62, .58 if all scores are taken for equally uncertain.
    """
    kinds = {
        "shares": (0.12, 0.33, 0.55),
        "means": (0.04, 0.0, 0.0),
        "noise": (0.3, 0.1, 0.06),
        "dead": (0.2, 0.97, 0.1),
    }
    shares = []
    for seed in range(8):
        pool = Pool(20_000, seed=seed, **kinds)
        steps = pool.run(pool.forecaster(oversample=8, seed=seed), 60)
        shares.append([pool.share_of_targets(picks.problem_id_P) for picks in steps])
    assert np.mean(shares, axis=0)[15:].mean() > 0.68


def test_features_that_tell_nothing_cost_little():
    """32 of them, a batch of 128: measured .24, .29, .37, .40 in tens of steps."""
    assert shares_by_step(30, 128, (0,), num_noise_features=32)[15:].mean() > 0.24


def test_the_common_error_of_a_step_does_not_lock_the_choice_in():
    """Each kind's score is off by more than the targets' mean in every step, alike for all that is measured.

    Batch of 128: measured .24, .35, .37, .38, .41 in tens of steps.
    """
    assert shares_by_step(50, 128, common=0.05)[30:].mean() > 0.2


def test_own_parts_raise_what_is_picked_where_problems_differ_and_are_met_again():
    """One kind, own parts .1, noise .1, a pool of 400: picks beyond the pool's mean, in standard deviations of u."""
    gains = {}
    for own in (0.1, 0.0):
        pool = Pool(400, shares=(1.0,), means=(0.05,), own=own, noise=0.1)
        forecaster = pool.forecaster()
        steps = pool.run(forecaster, 80)
        chosen = np.concatenate([p.problem_id_P[~p.is_uniform_P] for p in steps[40:]])
        gains[own] = (pool.truth(chosen).mean() - pool.truth(pool.ids).mean()) / 0.1
        assert forecaster.summary()["tau"] == pytest.approx(own, abs=0.04)
    assert gains[0.1] > 0.5 and abs(gains[0.0]) < 0.05


def test_own_parts_are_not_drawn_as_the_largest_of_thousands_of_draws_is_noise():
    """The best 64 of two thousand, of which 12% are targets. Measured over six seeds: 94% targets without draws of u,
    41% with them; mean true score .18 and .07, where the truth's own best have .25.
    """
    found, shares = {"mean": [], "drawn": []}, {"mean": [], "drawn": []}
    for seed in SEEDS:
        pool = Pool(4000, means=(0.1, 0.0), own=0.1, noise=0.15, seed=seed)
        forecaster = pool.forecaster(64, seed=seed)
        pool.run(forecaster, 60, 64)
        assert forecaster.summary()["tau"] > 0.03
        ids = np.random.default_rng(seed).permutation(pool.ids)[:2000]
        mean, deviation = forecaster.forecast(61, ids, pool.features(ids))
        drawn = mean + deviation * pool.rng.standard_normal(len(ids))
        for name, value in (("mean", mean), ("drawn", drawn)):
            best = ids[np.argsort(-value)[:64]]
            found[name].append(pool.truth(best).mean())
            shares[name].append(pool.share_of_targets(best))
    assert np.mean(shares["mean"]) > 0.8 > 0.6 > np.mean(shares["drawn"])
    assert np.mean(found["mean"]) > 1.5 * np.mean(found["drawn"])


def test_near_duplicates_fill_the_best_of_the_whole_pool_and_not_a_batch():
    """A hundred clusters of forty near-duplicates: the pool's best 32 are of one of them, the picks of twenty."""
    rng = np.random.default_rng(0)
    pool = Pool(4000, shares=(1.0,), means=(0.0,), noise=0.1, own=0.0)
    cluster = np.arange(4000) % 100
    centre_CF = rng.standard_normal((100, 8))
    values = centre_CF[cluster] + 0.01 * rng.standard_normal((4000, 8))
    pool.u = 0.1 * (centre_CF @ rng.standard_normal(8))[cluster]

    def features(ids):
        return Features(values[pool.rows(ids)], np.full(8, 0.5))

    pool.features = features
    forecaster = pool.forecaster()
    pool.run(forecaster, 30)
    mean, _ = forecaster.forecast(31, pool.ids, features(pool.ids))
    best = pool.ids[np.argsort(-mean)[:32]]
    shortlist = forecaster.shortlist(31)
    picks = forecaster.pick(31, shortlist, features(shortlist), 32)
    clusters = [len(set(cluster[pool.rows(ids)].tolist())) for ids in (best, picks.problem_id_P)]
    largest = [np.bincount(cluster[pool.rows(ids)]).max() for ids in (best, picks.problem_id_P)]
    assert clusters[0] <= 4 and clusters[1] >= 15
    assert largest[0] >= 20 and largest[1] <= 8
    assert pool.truth(picks.problem_id_P).mean() > 0.1


def test_concentration_is_bounded_by_the_shortlist():
    """However sure it is, no kind is picked more than `oversample` times as often as the pool holds it."""
    pool = Pool(20_000, shares=(0.02, 0.98), means=(1.0, 0.0), noise=0.01)
    steps = pool.run(pool.forecaster(128, floor=0.0), 30, 128)
    share = np.mean([pool.share_of_targets(picks.problem_id_P) for picks in steps[5:]])
    assert 0.05 < share < 1.05 * 4 * 0.02  # some of the few rest


@pytest.mark.parametrize(("value", "is_dead", "most"), [(0.0, True, 10), (0.0, False, 10), (-0.1, False, 20)])
def test_a_source_whose_rewards_break_for_fifty_steps_comes_back_after_their_repair(value, is_dead, most):
    """The best of four sources, a quarter of the pool; back: half of a batch.

    Measured over 24 seeds: after 7 steps on average (15 at most) of groups that were dead, 5 (13) of scores around 0, 8
    (15) and 13 (23) of scores that were half as bad, and as bad, as they had been good. What is seen of it meanwhile is
    what the uniform part holds, one problem a step, and what was believed fades with a memory of 20 steps.
    """
    seeds = range(8)
    share = np.zeros((len(seeds), 89))
    for seed in seeds:
        pool = Pool(4000, shares=(0.25,) * 4, means=(0.1, 0.02, 0.02, 0.02), noise=0.1, seed=seed)
        forecaster = pool.forecaster(seed=seed)
        for step in range(1, 90):
            shortlist = forecaster.shortlist(step)
            picks = forecaster.pick(step, shortlist, pool.features(shortlist), 32)
            o = pool.measure(picks.problem_id_P)
            is_hit = (16 <= step < 66) & (pool.kind[pool.rows(o.problem_id_P)] == 0)
            value_P = np.where(is_hit, 0.0 if is_dead else o.value_P - 0.1 + value, o.value_P)
            error_P = np.where(is_hit & is_dead, np.nan, o.error_P)
            forecaster.observe(step, dataclasses.replace(o, value_P=value_P, error_P=error_P))
            share[seed, step - 1] = pool.share_of_targets(picks.problem_id_P)
    assert share[:, 8:15].mean() > 0.6 > 0.45 > share[:, 40:65].mean()
    is_back = share[:, 65:] >= 0.5
    assert is_back.any(axis=1).all() and (is_back.argmax(axis=1) + 1).mean() <= most


def test_shares_of_variance_explained_tell_features_from_own_parts():
    summaries = {}
    for name, values in {
        "features": {"means": (0.5, 0.0), "noise": 0.1},
        "own": {"means": (0.0, 0.0), "own": 0.3, "noise": 0.1},
        "nothing": {"means": (0.0, 0.0), "noise": 0.1},
    }.items():
        pool = Pool(300, **values)
        forecaster = pool.forecaster()
        pool.run(forecaster, 60)
        summaries[name] = forecaster.summary()
    assert summaries["features"]["explained_features"] > 0.6 > 0.1 > summaries["features"]["explained_problems"]
    assert summaries["own"]["explained_problems"] > 0.3 > 0.1 > summaries["own"]["explained_features"]
    assert abs(summaries["nothing"]["explained_features"]) < 0.1 and summaries["nothing"]["tau"] < 0.03
