# SPDX-License-Identifier: Apache-2.0
"""One-hot of sources, hashed n-grams, and projections that are fitted once and kept by problem."""

import tracemalloc

import numpy as np
import pytest

from verl_gradalign.selection.features import MAX_VALUES, NARROW, OTHER, Sources, hashed_ngrams
from verl_gradalign.selection.projection import LARGEST, SAMPLE, Projected, Projection
from verl_gradalign.selection.state_file import load_state, save_state

POOL = np.arange(1000, 3000)
SPREAD = 1e-3  # of a variance: float32, and a randomised decomposition


def values_of(problem_ids, num=40):
    """Numbers of a problem, of different sizes and not independent; the same whenever it is asked."""
    draws = np.stack([np.random.default_rng(i).standard_normal(num) for i in problem_ids])
    draws[:, 1] = 5 * draws[:, 0] + 0.1 * draws[:, 1]
    return 100 + draws * np.arange(1, num + 1)


class Counted:
    """A measurement that notes what it was asked for."""

    def __init__(self, shift=0.0):
        self.asked, self.shift = [], shift

    def __call__(self, problem_ids):
        self.asked.append(problem_ids.tolist())
        return values_of(problem_ids) + self.shift


def projected(measure, num=8, **options):
    return Projected("text", measure, POOL, num, seed=0, **options)


def test_a_problem_has_one_feature_of_each_column():
    sources = Sources(np.array([7, 2, 5]), {"data_source": ["b", "a", "b"], "level": ["1", "2", "3"]})
    assert sources.names == ["data_source=b", "data_source=a", "level=1", "level=2", "level=3"]
    assert sources.of(np.array([2, 7, 5, 2])).tolist() == [
        [0, 1, 0, 1, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 0, 0, 1],
        [0, 1, 0, 1, 0],
    ]


def test_a_column_of_one_value_has_no_feature():
    sources = Sources(POOL, {"data_source": ["only"] * len(POOL), "level": ["1"] * len(POOL)})
    assert sources.of(POOL[:3]).shape == (3, 0) and sources.names == []


def test_rare_values_of_a_column_share_one_feature_whichever_problems_are_asked_for():
    values = ["common"] * 1000 + ["known"] * 500 + [f"rare {i:03}" for i in range(500)]
    sources = Sources(POOL, {"data_source": values})
    assert len(sources.names) == MAX_VALUES and sources.names[-1] == f"data_source={OTHER}"
    features = sources.of(POOL[[0, 1200, 1999, 1998]])
    assert features.argmax(axis=1).tolist() == [0, 1, MAX_VALUES - 1, MAX_VALUES - 1]
    assert (features.sum(axis=1) == 1).all()


def test_texts_alike_but_for_their_numbers_are_the_same_and_others_are_not():
    same, as_same, other, nothing = hashed_ngrams(["what is 12 + 34?", "what is 98 + 76?", "reverse the word abc", ""])
    np.testing.assert_array_equal(same, as_same)
    assert same @ other < 0.3 and not nothing.any()
    longer = hashed_ngrams(["what is 12 + 34? " * 50])[0]
    assert same @ longer > 0.8
    assert (longer @ longer, same @ same) == pytest.approx((1, 1))


def test_no_text_gives_no_row():
    assert hashed_ngrams([]).shape == (0, 4096)


def test_projected_numbers_have_mean_0_and_variance_1_over_the_sample_and_are_not_correlated():
    values = values_of(range(400))
    numbers = Projection.fit(values, 12, seed=3)(values).astype(np.float64)
    assert numbers.shape == (400, 12)
    np.testing.assert_allclose(numbers.mean(axis=0), 0, atol=SPREAD)
    np.testing.assert_allclose(np.cov(numbers.T, bias=True), np.eye(12), atol=0.02)  # bounded at LARGEST


def test_the_largest_principal_components_are_kept():
    values = values_of(range(400))
    numbers = Projection.fit(values, 1, seed=0)(values)[:, 0]
    standardised = (values - values.mean(axis=0)) / values.std(axis=0)
    exact = np.linalg.svd(standardised, full_matrices=False)[0][:, 0]
    assert abs(np.corrcoef(numbers, exact)[0, 1]) > 0.999


def test_a_projection_is_the_same_for_the_same_seed():
    values = values_of(range(100))
    first, again = (Projection.fit(values, 8, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.axes_DK, again.axes_DK)


@pytest.mark.parametrize("is_standardised", [True, False])
def test_columns_that_never_vary_have_no_part(is_standardised):
    values = values_of(range(100))
    padded = np.hstack([np.full((100, 3), 0.1), values, np.zeros((100, 2))]).astype(np.float32)
    projection = Projection.fit(padded, 8, 0, is_standardised)
    assert not projection.axes_DK[:3].any() and not projection.axes_DK[-2:].any()
    assert np.isfinite(projection(padded)).all()
    moved = padded.copy()
    moved[:, 0] += 1e6
    np.testing.assert_allclose(projection(moved), projection(padded), atol=SPREAD)


@pytest.mark.parametrize("num", [1, 5, 32])
def test_problems_that_are_all_alike_have_no_numbers(num):
    values = np.full((300, num), 1 / 3)
    assert Projection.fit(values, 32, 0)(values).shape == (300, 0)


def test_there_are_no_more_numbers_than_the_sample_can_carry():
    assert Projection.fit(values_of(range(20)), 32, 0).axes_DK.shape == (40, 10)
    two = np.repeat(values_of(range(100), num=2), 5, axis=1)
    assert Projection.fit(two, 32, 0).axes_DK.shape == (10, 2)
    assert Projection.fit(values_of(range(1)), 32, 0).axes_DK.shape == (40, 0)


def test_one_number_of_a_function_is_standardised():
    level = np.repeat([1.0, 2.0, 3.0], 100)[:, None]
    numbers = Projection.fit(level, 32, 0)(level)
    assert numbers.shape == (300, 1) and abs(numbers.std() - 1) < SPREAD
    assert len(set(np.round(np.abs(numbers[[0, 299], 0]), 3))) == 1


def test_an_odd_problem_is_bounded():
    projection = Projection.fit(values_of(range(300)), 8, 0)
    assert np.abs(projection(1e9 * np.ones((1, 40)))).max() == LARGEST


def test_what_is_kept_is_not_measured_again():
    measure = Counted()
    kept = projected(measure)
    first = kept.of(POOL[:300], step=1)
    assert measure.asked == [POOL[:300].tolist()] and first.shape == (300, 8) and first.dtype == np.float64
    again = kept.of(POOL[[299, 0, 400, 0]], step=50)
    assert measure.asked[1:] == [[1400]]
    np.testing.assert_array_equal(again[[0, 1, 3]], first[[299, 0, 0]])


def test_a_small_first_shortlist_is_filled_up_at_random_to_fit_the_projection():
    measure = Counted()
    numbers = projected(measure).of(POOL[:3], step=1)
    assert (
        numbers.shape == (3, 8) and len(set(measure.asked[0])) == SAMPLE and measure.asked[0][:3] == [1000, 1001, 1002]
    )
    few = Projected("text", Counted(), POOL[:20], 32, seed=0)
    assert few.of(POOL[:3], 1).shape == (3, 10)


def test_numbers_are_taken_anew_after_the_interval_along_the_same_axes():
    measure = Counted()
    kept = projected(measure, interval=10)
    first = kept.of(POOL[:300], step=1)
    measure.shift = 50.0
    np.testing.assert_array_equal(kept.of(POOL[:300], step=10), first)
    moved = kept.of(POOL[:2], step=11)
    assert measure.asked[1:] == [[1000, 1001]] and not np.allclose(moved, first[:2])
    measure.shift = 0.0
    np.testing.assert_allclose(kept.of(POOL[:2], step=21), first[:2], atol=1e-5)


@pytest.mark.parametrize("step", [1, 7])
def test_a_resumed_run_has_the_same_numbers(tmp_path, step):
    """Also of problems that it measures after the resume."""
    whole, before, after = (projected(Counted(), interval=5) for _ in range(3))
    for kept in (whole, before):
        kept.of(POOL[:300], step=1)
    save_state(tmp_path / "state.npz", {}, {"text": before.state()})
    after.restore(load_state(tmp_path / "state.npz")["text"])
    np.testing.assert_array_equal(after.of(POOL[200:500], step), whole.of(POOL[200:500], step))
    np.testing.assert_array_equal(after.prior_K, whole.prior_K)


def test_a_run_that_asked_nothing_is_resumed_as_new():
    measure = Counted()
    kept = projected(measure)
    kept.restore(projected(Counted()).state())
    assert kept.of(POOL[:2], 1).shape == (2, 8) and len(measure.asked) == 1


def test_all_numbers_together_explain_at_most_the_narrow_prior():
    kept = projected(Counted())
    numbers = kept.of(POOL[:300], 1)
    explained = numbers**2 @ kept.prior_K**2
    assert explained.mean() == pytest.approx(NARROW**2, rel=0.02)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_refused_with_the_problem(value):
    def measure(problem_ids):
        values = values_of(problem_ids)
        values[problem_ids == 1005, 3] = value
        return values

    with pytest.raises(ValueError, match=r"gradalign.forecast.features: text of problem 1005 is not finite. Remedy: "):
        projected(measure).of(POOL[:10], 1)


def test_another_number_of_numbers_than_before_is_refused():
    kept, changed = projected(Counted()), projected(lambda ids: values_of(ids)[:, :7])
    kept.of(POOL[:10], 1)
    changed.restore(kept.state())
    with pytest.raises(ValueError, match=r"text gave 40 numbers a problem before, and 7 now. Remedy: "):
        changed.of(POOL[600:610], 1)


def test_a_pool_of_millions_costs_what_was_asked_for_alone():
    pool = np.arange(3_000_000)
    kept = Projected("text", lambda ids: np.random.default_rng(0).standard_normal((len(ids), 40)), pool, 32, seed=0)
    tracemalloc.start()
    kept.of(pool[:512], 1)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / 512 < 1000  # measured 500 bytes a problem, the projection included
