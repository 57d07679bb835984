# SPDX-License-Identifier: Apache-2.0
"""Regression that forgets, and the error that all measurements along one direction share."""

import numpy as np
import pytest

from verl_gradalign.selection.regression import Regression

RTOL_FLOAT64 = 1e-8  # measured 1e-12


def draw(seed, num=12, num_features=3, noise=0.5):
    rng = np.random.default_rng(seed)
    x_PF = rng.standard_normal((num, num_features))
    noise_P = noise**2 * rng.uniform(0.5, 2.0, num)
    y_P = x_PF @ rng.standard_normal(num_features) + np.sqrt(noise_P) * rng.standard_normal(num)
    return x_PF, y_P, noise_P


def dense_posterior(x_PF, y_P, covariance_PP, prior_variance):
    """Mean and covariance of w by conditioning the joint normal distribution of w and y."""
    joint_PP = prior_variance * x_PF @ x_PF.T + covariance_PP
    gain_FP = prior_variance * x_PF.T @ np.linalg.inv(joint_PP)
    return gain_FP @ y_P, prior_variance * (np.eye(x_PF.shape[1]) - gain_FP @ x_PF)


def test_a_refresh_says_what_the_joint_normal_distribution_with_a_common_error_says():
    prior_variance, refreshes = 2.0, [[draw(0), draw(1, num=5)], [draw(2)]]
    regression, parts, blocks = Regression(3), [], []
    for steps in refreshes:
        regression.begin_refresh(prior_variance)
        for step in steps:
            regression.learn(*step, prior_variance)
        parts += steps
        blocks.append(np.concatenate([x_PF for x_PF, _, _ in steps]))
    regression._common.total, regression._common.weight = 0.0, 0.0  # what was held true throughout
    x_PF, y_P, noise_P = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    covariance_PP, start = np.diag(noise_P), 0
    common = regression.common_variance(prior_variance)
    for block_PF in blocks:
        end = start + len(block_PF)
        covariance_PP[start:end, start:end] += common * block_PF @ block_PF.T
        start = end
    mean_F, covariance_FF = dense_posterior(x_PF, y_P, covariance_PP, prior_variance)
    belief = regression.belief(prior_variance)
    np.testing.assert_allclose(belief.mean_F, mean_F, rtol=RTOL_FLOAT64)
    np.testing.assert_allclose(belief.covariance_FF, covariance_FF, rtol=RTOL_FLOAT64)


def test_a_residual_is_that_of_a_fit_without_its_measurement():
    regression, prior_variance = Regression(3), 1.5
    regression.learn(*draw(3), prior_variance)
    regression.begin_refresh(prior_variance)
    x_PF, y_P, noise_P = draw(4)
    fit = regression.fit(x_PF, y_P, noise_P, prior_variance)
    before = regression.belief(prior_variance)
    common_FF = regression.common_variance(prior_variance) * np.eye(3)
    for i in range(len(y_P)):
        others = np.arange(len(y_P)) != i
        precision_FF = np.linalg.inv(before.covariance_FF + common_FF)
        information_FF = (x_PF[others] / noise_P[others, None]).T @ x_PF[others]
        covariance_FF = np.linalg.inv(precision_FF + information_FF)
        vector_F = precision_FF @ before.mean_F + (x_PF[others] / noise_P[others, None]).T @ y_P[others]
        assert fit.residual_P[i] == pytest.approx(y_P[i] - x_PF[i] @ covariance_FF @ vector_F, rel=RTOL_FLOAT64)
        expected = noise_P[i] + x_PF[i] @ covariance_FF @ x_PF[i]
        assert fit.variance_P[i] == pytest.approx(expected, rel=RTOL_FLOAT64)


def test_what_is_known_fades_to_the_prior():
    regression = Regression(3)
    regression.learn(*draw(5), 1.0)
    variances = []
    for _ in range(400):
        regression.discount(0.95)
        variances.append(np.trace(regression.belief(1.0).covariance_FF))
    assert (np.diff(variances) > 0).all() and variances[-1] == pytest.approx(3.0, abs=1e-4)
    np.testing.assert_allclose(regression.belief(1.0).mean_F, 0, atol=1e-4)


def follow(regression, weights_F, num_steps, num, common, rng, noise=1.0):
    """Steps along directions with errors of their own; the last one's error is returned."""
    for _ in range(num_steps):
        regression.discount(0.95)
        regression.begin_refresh(1.0)
        x_PF = rng.standard_normal((num, len(weights_F))) / len(weights_F) ** 0.5
        wrong_F = common * rng.standard_normal(len(weights_F))
        y_P = x_PF @ (weights_F + wrong_F) + noise * rng.standard_normal(num)
        regression.learn(x_PF, y_P, np.full(num, noise**2), 1.0)


@pytest.mark.parametrize("common", [0.0, 0.2, 0.5])
def test_the_common_error_is_found_from_how_much_refreshes_disagree(common):
    found = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        regression = Regression(10)
        follow(regression, rng.standard_normal(10), 60, 200, common, rng)
        found.append(regression.common_variance(1.0) ** 0.5)
    assert np.mean(found) == pytest.approx(common, abs=0.06)


def test_a_wrong_direction_asked_often_is_not_believed_more():
    """One refresh of 30 or of 30,000 measurements, after some that disagreed: as much of w's variance is left, and the
    wrong direction moves w as little."""
    moved, variance = [], []
    for num in (30, 30_000):
        rng = np.random.default_rng(0)
        regression = Regression(2)
        follow(regression, np.zeros(2), 60, 100, 0.5, rng, noise=0.5)
        before = regression.belief(1.0)
        regression.begin_refresh(1.0)
        x_PF = rng.standard_normal((num, 2))
        y_P = x_PF @ np.array([1.0, -1.0]) + 0.5 * rng.standard_normal(num)  # w is 0
        regression.learn(x_PF, y_P, np.full(num, 0.25), 1.0)
        after = regression.belief(1.0)
        variance.append(np.trace(after.covariance_FF) / np.trace(before.covariance_FF))
        moved.append(np.linalg.norm(after.mean_F - before.mean_F) / 2**0.5)
    # Measured: 0.960 and 0.959 of the variance are left, and w moved by 0.035 and 0.038 of the error.
    assert variance[1] > 0.9 and abs(variance[1] - variance[0]) < 0.05
    assert moved[1] < 0.12 and moved[1] < 1.5 * moved[0]


def test_several_steps_along_one_direction_count_as_one_refresh():
    """Held for ten steps, a direction says no more than its common error allows; ten directions say more."""
    variance = {}
    for is_fresh in (True, False):
        rng = np.random.default_rng(1)
        regression = Regression(2)
        for _ in range(10):
            if is_fresh:
                regression.begin_refresh(1.0)
            x_PF = rng.standard_normal((1000, 2))
            regression.learn(x_PF, 0.3 * rng.standard_normal(1000), np.full(1000, 0.09), 1.0)
            regression._common.total = regression._common.weight = 0.0  # the share before it was measured, 1/4
        variance[is_fresh] = np.trace(regression.belief(1.0).covariance_FF) / 2
    assert variance[False] == pytest.approx(1 / (1 + 4), rel=0.01)
    assert variance[True] == pytest.approx(1 / (1 + 10 * 4), rel=0.01)


def test_a_state_goes_on_as_it_was():
    regression, other = Regression(3), Regression(3)
    rng = np.random.default_rng(0)
    follow(regression, np.ones(3), 5, 20, 0.3, rng)
    other.restore(regression.state())
    for r in (regression, other):
        follow(r, np.ones(3), 5, 20, 0.3, np.random.default_rng(9))
    np.testing.assert_array_equal(regression.belief(1.0).mean_F, other.belief(1.0).mean_F)
    np.testing.assert_array_equal(regression.belief(1.0).covariance_FF, other.belief(1.0).covariance_FF)
