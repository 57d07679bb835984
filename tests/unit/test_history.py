# SPDX-License-Identifier: Apache-2.0
"""The running record of each problem, and scores drawn to it."""

import numpy as np
import pytest

from verl_gradalign.selection.history import ProblemRecord


def test_count_and_mean_are_those_of_all_scores():
    rng = np.random.default_rng(0)
    record, scores = ProblemRecord(6), {i: [] for i in range(6)}
    for _ in range(40):
        ids = rng.permutation(6)[: rng.integers(1, 6)]
        score = rng.standard_normal(len(ids))
        score[rng.random(len(ids)) < 0.1] = np.nan
        record.add(ids, score)
        for i, s in zip(ids, score, strict=True):
            if np.isfinite(s):
                scores[i].append(s)
    for i in range(6):
        assert record.count_A[i] == len(scores[i])
        assert record.mean_A[i] == pytest.approx(np.mean(scores[i]))


def test_full_shrinkage_is_the_running_mean_and_none_changes_nothing():
    record, ids = ProblemRecord(3), np.array([0, 2])
    seen = []
    for score in ([1.0, -1.0], [3.0, 0.0], [2.0, 4.0]):
        score_P = np.array(score)
        seen.append(score)
        np.testing.assert_allclose(record.shrunk(ids, score_P, 1.0), np.mean(seen, axis=0))
        np.testing.assert_array_equal(record.shrunk(ids, score_P, 0.0), score_P)
        half = record.shrunk(ids, score_P, 0.5)
        assert (np.abs(half - score_P) <= np.abs(record.shrunk(ids, score_P, 1.0) - score_P) + 1e-12).all()
        record.add(ids, score_P)
    assert record.count_A.tolist() == [3, 0, 3] and record.mean_A[1] == 0


def test_scores_that_are_not_finite_stay_as_they_are():
    record, ids = ProblemRecord(2), np.array([0, 1])
    record.add(ids, np.array([1.0, 1.0]))
    shrunk = record.shrunk(ids, np.array([np.nan, np.inf]), 0.5)
    assert np.isnan(shrunk[0]) and np.isinf(shrunk[1])


def test_the_record_survives_a_checkpoint_and_refuses_another_data_set():
    record, ids = ProblemRecord(4), np.array([1, 3])
    record.add(ids, np.array([0.2, 0.7]))
    other = ProblemRecord(4)
    other.restore(record.state())
    for name in ("count_A", "mean_A"):
        np.testing.assert_array_equal(getattr(record, name), getattr(other, name))
    with pytest.raises(ValueError, match="4 problems.*5"):
        ProblemRecord(5).restore(record.state())


def test_a_record_with_the_columns_of_an_earlier_version_is_read():
    record = ProblemRecord(2)
    columns = {"count": [1, 0], "mean": [0.5, 0.0], "squares": [0.0, 0.0], "success_sum": [1.0, 0.0]}
    record.restore({name: np.array(values) for name, values in columns.items()})
    assert record.count_A.tolist() == [1, 0] and record.mean_A.tolist() == [0.5, 0.0]
