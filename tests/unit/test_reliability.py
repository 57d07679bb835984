# SPDX-License-Identifier: Apache-2.0
"""Split-half reliability: nothing is found where there is nothing, and what is found is what a repetition gives."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.unit.test_scores import OPTIONS, Pool, make_pool
from verl_gradalign.rank_correlation import spearman, spearman_brown
from verl_gradalign.selection.reliability import half_of, score_errors, score_reliability, without_response
from verl_gradalign.selection.scores import SCORES, Score


def draw_pool(rng, alignment, num_problems=120, num_responses=16, size=24):
    """Responses whose gradients are noise, but that reward shifts them along v by each problem's alignment."""
    v = np.zeros(size)
    v[0] = 1.0
    gradients, rewards = [], []
    for strength in alignment:
        reward = rng.permutation([1.0] * (num_responses // 2) + [0.0] * (num_responses // 2))
        noise = rng.standard_normal((num_responses, size))
        gradients.append(noise - strength * np.outer(reward - 0.5, v))
        rewards.append(reward)
    return Pool(gradients, rewards, v)


@pytest.mark.parametrize("name", ["cosine", "dot", "correlation"])
def test_noise_alone_has_no_reliability(name):
    """Advantages are centred over the whole group and both halves share its norm; neither correlates them."""
    rng = np.random.default_rng(0)
    values = [
        score_reliability(draw_pool(rng, np.zeros(120)).measurements(), SCORES[name], OPTIONS).spearman
        for _ in range(30)
    ]
    # One has a standard deviation of 0.09 under the null, their mean of 0.017.
    assert abs(np.mean(values)) < 0.05


@pytest.mark.parametrize("name", ["cosine", "dot"])
def test_the_corrected_value_is_the_correlation_with_a_repetition(name):
    rng = np.random.default_rng(1)
    alignment = rng.standard_normal(400)
    first, second = (draw_pool(rng, alignment, 400).measurements() for _ in range(2))
    repetition = spearman(SCORES[name].rank(first, OPTIONS), SCORES[name].rank(second, OPTIONS))
    found = np.mean([score_reliability(m, SCORES[name], OPTIONS).corrected for m in (first, second)])
    assert 0.4 < repetition < 0.9
    assert found == pytest.approx(repetition, abs=0.08)  # of 400 problems, each known to about 0.04


@pytest.mark.parametrize("name", ["cosine", "dot", "cosine_learnability"])
def test_half_scores_along_one_direction_average_to_the_score(name):
    m = make_pool(5, num_problems=9, min_responses=4).measurements()
    halves = [half_of(m, which) for which in (0, 1)]
    mean_P = sum(half.dot_P for half in halves) / 2
    torch.testing.assert_close(mean_P, m.dot_P)
    mean_P = sum(half.cosine_P for half in halves) / 2
    torch.testing.assert_close(mean_P, m.cosine_P)


def test_a_half_scores_by_its_own_responses_alone():
    pool = make_pool(2, num_problems=5, min_responses=6)
    for which in (0, 1):
        alone = Pool([q[which::2] for q in pool.gradients], [r[which::2] for r in pool.rewards], pool.direction)
        half = half_of(pool.measurements(), which)
        rho = SCORES["correlation"].rank(half, OPTIONS)
        # Pearson's correlation centres by itself, so the whole group's mean in the advantages does not matter.
        torch.testing.assert_close(rho, SCORES["correlation"].rank(alone.measurements(), OPTIONS))
        torch.testing.assert_close(half.success_rate_P, alone.measurements().success_rate_P)


def test_what_cannot_be_split_has_no_reliability():
    m = make_pool(0).measurements()
    for name in ("learnalign", "pool_cosine", "norm", "random"):
        assert math.isnan(score_reliability(m, SCORES[name], OPTIONS).spearman)
    few = make_pool(0, num_problems=2).measurements()
    assert math.isnan(score_reliability(few, SCORES["cosine"], OPTIONS).corrected)
    unknown = dataclasses.replace(m, half_dot_P2=torch.full_like(m.half_dot_P2, math.nan))
    assert score_reliability(unknown, SCORES["cosine"], OPTIONS).num_problems == 0


def test_spearman_gives_equal_values_their_mean_rank():
    first, second = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    ranks = np.corrcoef([0.0, 1.5, 1.5, 3.0], [0.0, 2.0, 1.0, 3.0])[0, 1]
    assert spearman(first, second) == pytest.approx(ranks)
    assert spearman(first, first) == pytest.approx(1.0) and math.isnan(spearman(torch.ones(3), second[:3]))


def test_spearman_brown_doubles_the_length():
    assert spearman_brown(0.5) == pytest.approx(2 / 3)
    assert spearman_brown(0.0) == 0.0 and spearman_brown(1.0) == 1.0
    assert spearman_brown(-0.9) == spearman_brown(-1.0) == -1.0


def spread_over_repetitions(name, rewards_of, num_repetitions=120, num_responses=12):
    """The mean standard error of one problem's score, and how much the score varies over fresh responses."""
    rng = np.random.default_rng(0)
    v = np.eye(24)[0]
    scores, errors = [], []
    for _ in range(num_repetitions):
        reward = rewards_of(rng, num_responses)
        gradient = rng.standard_normal((num_responses, 24)) - 2 * np.outer(reward - 0.5, v)
        m = Pool([gradient], [reward], v).measurements()
        scores.append(SCORES[name].rank(m, OPTIONS).item())
        errors.append(score_errors(m, SCORES[name], OPTIONS).item())
    return np.mean(np.square(errors)) ** 0.5, np.std(scores)


@pytest.mark.parametrize("name", ["dot", "cosine", "correlation", "lower_bound", "cosine_learnability"])
def test_the_standard_error_is_how_much_a_score_varies_with_the_responses(name):
    """Where a cosine is large its norm varies along with its dot product, but counts as known: 1.6 times too much."""
    error, spread = spread_over_repetitions(name, lambda rng, num: rng.permutation([1.0] * 6 + [0.0] * (num - 6)))
    assert 0.8 < error / spread < 1.8


def test_the_standard_error_of_a_success_rate_is_the_binomial_one():
    by_rate = Score(lambda m, _: m.success_rate_P)
    pool = make_pool(3, num_problems=20, min_responses=3)
    p = np.array([r.mean() for r in pool.rewards])
    n = np.array([len(r) for r in pool.rewards])
    found = score_errors(pool.measurements(), by_rate, OPTIONS).numpy()
    np.testing.assert_allclose(found, np.sqrt(p * (1 - p) / (n - 1)))


def test_the_standard_error_of_dot_is_that_of_its_measurements():
    m = make_pool(1, num_problems=30).measurements()
    torch.testing.assert_close(score_errors(m, SCORES["dot"], OPTIONS), m.dot_error_P, rtol=1e-12, atol=0)
    unknown = torch.full_like(m.contribution_PR, math.nan)
    by_half = dataclasses.replace(m, contribution_PR=unknown)
    torch.testing.assert_close(score_errors(by_half, SCORES["dot"], OPTIONS), by_half.dot_error_P)
    mixed = dataclasses.replace(m, contribution_PR=torch.cat([unknown[:5], m.contribution_PR[5:]]))
    torch.testing.assert_close(score_errors(mixed, SCORES["dot"], OPTIONS), mixed.dot_error_P)
    nothing = dataclasses.replace(by_half, half_dot_P2=torch.full_like(m.half_dot_P2, math.nan))
    assert score_errors(nothing, SCORES["dot"], OPTIONS).isnan().all()


def test_a_group_without_a_response_is_that_group_measured_alone():
    pool = make_pool(4, num_problems=6, min_responses=4)
    left = without_response(pool.measurements(), 2)
    others = [np.arange(len(r)) != 2 for r in pool.rewards]
    contribution = [
        -a[k] * (q[k] @ pool.direction) / np.linalg.norm(pool.direction) / len(a)
        for a, q, k in zip(pool.advantages, pool.gradients, others, strict=True)
    ]
    expected = [c.sum() * len(r) / (len(r) - 1) for c, r in zip(contribution, pool.rewards, strict=True)]
    np.testing.assert_allclose(left.dot_P, expected)
    np.testing.assert_allclose(left.contribution_PR.nansum(1), expected)
    rates = [r[k].mean() for r, k in zip(pool.rewards, others, strict=True)]
    np.testing.assert_allclose(left.success_rate_P, rates)


def test_what_no_part_of_a_group_is_an_estimate_of_has_no_standard_error():
    m = make_pool(0).measurements()
    for name in ("learnalign", "pool_cosine", "norm", "random"):
        assert score_errors(m, SCORES[name], OPTIONS).isnan().all()
    single = Pool([np.ones((1, 3))], [np.array([1.0])], np.ones(3)).measurements()
    assert score_errors(single, SCORES["correlation"], OPTIONS).isnan().all()
