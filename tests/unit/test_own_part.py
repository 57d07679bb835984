# SPDX-License-Identifier: Apache-2.0
"""A problem's own part: found where problems differ, nothing where they do not, and forgotten as the policy moves."""

import numpy as np
import pytest

from verl_gradalign.selection.own_part import OwnParts


def meet(own, u_A, noise, num_rounds, rng, reported=None):
    """Every problem is measured once a round; `reported` is what its noise is said to be."""
    everyone = np.arange(len(u_A))
    for step in range(1, num_rounds + 1):
        residual = u_A + noise * rng.standard_normal(len(u_A))
        own.learn(everyone, step, residual, np.full(len(u_A), (reported or noise) ** 2))
    return own.predict(everyone, num_rounds)


@pytest.mark.parametrize("tau", [0.1, 0.3])
def test_own_parts_are_found_and_their_errors_are_true(tau):
    rng = np.random.default_rng(0)
    own = OwnParts(400, memory=1e9)
    u_A = tau * rng.standard_normal(400)
    mean_A, variance_A = meet(own, u_A, 0.3, 8, rng)
    assert own.variance**0.5 == pytest.approx(tau, rel=0.3)
    assert np.mean((mean_A - u_A) ** 2 / variance_A) == pytest.approx(1.2, abs=0.35)  # tau is a lower bound
    assert np.corrcoef(mean_A, u_A)[0, 1] > 0.6


@pytest.mark.parametrize("reported", [0.3, 0.1, 1.0])
def test_where_problems_do_not_differ_own_parts_stay_near_zero_whatever_the_noise_is_said_to_be(reported):
    spread = []
    for seed in range(10):
        own = OwnParts(400, memory=1e9)
        mean_A, _ = meet(own, np.zeros(400), 0.3, 6, np.random.default_rng(seed), reported)
        spread.append(mean_A.std())
    assert np.mean(spread) < 0.02  # of measurements with a spread of 0.3


def test_before_problems_are_met_again_nothing_is_their_own():
    own = OwnParts(100, memory=20)
    own.learn(np.arange(100), 1, np.random.default_rng(0).standard_normal(100), np.ones(100))
    mean_A, variance_A = own.predict(np.arange(100), 2)
    assert own.variance == 0 and not mean_A.any() and not variance_A.any() and own.num_known == 100


def test_an_own_part_fades_with_the_steps_since_it_was_measured():
    rng = np.random.default_rng(0)
    own = OwnParts(400, memory=20)
    meet(own, 0.5 * rng.standard_normal(400), 0.3, 8, rng)
    means, variances = zip(*[own.predict(np.arange(400), step) for step in (8, 28, 108, 500)], strict=True)
    assert (np.diff([np.abs(mean_A).mean() for mean_A in means]) < 0).all()
    assert (np.diff([variance_A.mean() for variance_A in variances]) > 0).all()
    assert np.abs(means[-1]).max() < 1e-4 and variances[-1].mean() == pytest.approx(own.variance)


def test_a_state_holds_only_the_problems_that_were_measured():
    own, other = OwnParts(10_000, memory=20), OwnParts(10_000, memory=20)
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        own.learn(np.arange(50), step, rng.standard_normal(50), np.ones(50))
    state = own.state()
    assert len(state["position"]) == 50
    other.restore(state)
    for found, expected in zip(other.predict(np.arange(60), 9), own.predict(np.arange(60), 9), strict=True):
        np.testing.assert_array_equal(found, expected)
