# SPDX-License-Identifier: Apache-2.0
"""How large scores are for different kinds of problems, learnt from what is measured of them."""

import numpy as np
import pytest

from verl_gradalign.selection.scales import LEAST, Scales

KEEP = 0.95


def learnt(scale_K, share_alive_K=None, steps=150, num=32, unit=1.0, seed=0):
    """Learn from kinds whose values have a long tail and this root mean square; some are 0 but for a share of them."""
    rng, scales = np.random.default_rng(seed), Scales(1 + len(scale_K))
    scale_K, share_K = np.asarray(scale_K), np.ones(len(scale_K)) if share_alive_K is None else share_alive_K
    for _ in range(steps):
        kind_P = rng.integers(len(scale_K), size=num)
        y_P = scale_K[kind_P] * rng.standard_t(5, num) * (3 / 5) ** 0.5
        y_P = np.where(rng.random(num) < share_K[kind_P], y_P, 0.0)
        scales.learn(one_hot(kind_P, len(scale_K)), unit * y_P, KEEP)
    return scales


def one_hot(kind_P, num_kinds):
    return np.hstack([np.ones((len(kind_P), 1)), np.eye(num_kinds)[kind_P]])


def of_kinds(scales, num_kinds):
    return scales.of(one_hot(np.arange(num_kinds), num_kinds))


def test_kinds_of_other_sizes_are_told_apart():
    found = np.mean([of_kinds(learnt([1.0, 0.3, 0.1], seed=seed), 3) for seed in range(4)], axis=0)
    np.testing.assert_allclose(found, [1.0, 0.3, 0.1], rtol=0.25)


def test_a_kind_that_is_all_zeros_is_small_and_can_wake_up():
    scales = learnt([1.0, 0.0])
    large, small = of_kinds(scales, 2)
    # Of zeros alone some tens are remembered: what they say is that the next one is hardly larger than a tenth.
    assert LEAST * scales.size <= small < 0.2 * large
    for _ in range(20):
        scales.learn(one_hot(np.array([1]), 2), np.array([1.0]), KEEP)
    assert of_kinds(scales, 2)[1] > 0.3


def test_nothing_depends_on_the_unit_of_what_is_measured():
    np.testing.assert_allclose(
        of_kinds(learnt([1.0, 0.3], unit=1e-9), 2), 1e-9 * of_kinds(learnt([1.0, 0.3]), 2), rtol=1e-9
    )


@pytest.mark.parametrize("values", [[], [np.zeros(4)], [np.zeros(4)] * 300])
def test_of_zeros_alone_nothing_is_known(values):
    scales = Scales(3)
    for y_P in values:
        scales.learn(one_hot(np.arange(4) % 2, 2), y_P, KEEP)
    assert not scales.is_known


def test_a_restored_one_goes_on_alike():
    scales, restored = learnt([1.0, 0.3]), Scales(3)
    restored.restore(scales.state())
    for each in (scales, restored):
        each.learn(one_hot(np.array([0, 1]), 2), np.array([2.0, -0.1]), KEEP)
    np.testing.assert_array_equal(of_kinds(scales, 2), of_kinds(restored, 2))
