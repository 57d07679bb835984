# SPDX-License-Identifier: Apache-2.0
"""Suspicious problems: mislabelled and coin-flip problems are found, sound ones are left alone."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.benchmarks.report_logs import CLEAN, COIN_FLIP, MISLABELLED, LogPlan, write_log
from verl_gradalign.report.run import find_runs, read_run
from verl_gradalign.report.suspicious import find_suspects
from verl_gradalign.report.tallies import ProblemSums, Rows
from verl_gradalign.student import Z_90, student_t


def rows_of(problem_id, cosine, error, norm=1.0, freedom=15):
    """Rows of the selection table with these alignments; nan errors and norms are unknown."""
    size = len(problem_id)
    norm = np.broadcast_to(np.asarray(norm, dtype=float), size)
    scale = np.where(np.isnan(norm), 1.0, norm)
    columns = {
        "step": np.ones(size, dtype=int),
        "problem_id": problem_id,
        "data_source": ["a"] * size,
        "score": cosine,
        "dot": cosine * scale,
        "norm": norm,
        "dot_error": np.broadcast_to(error, size) * scale,
        "success_rate": np.full(size, 0.5),
        "num_responses": np.full(size, 16),
        "error_freedom": np.full(size, freedom),
        "response_tokens": np.full(size, 9.0),
        "kept": np.zeros(size, dtype=bool),
        "reason": ["low_score"] * size,
    }
    return pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})


def suspects_of(*pieces):
    sums = ProblemSums()
    for piece in pieces:
        sums.add(Rows.of(piece), np.zeros(len(piece), dtype=int))
    return find_suspects(sums, ["a"])


def ids(suspects, kind=None):
    """The suspicious problems' ids, of one kind or of both."""
    table = suspects.table if kind is None else suspects.table.filter(pc.equal(suspects.table["kind"], kind))
    return table["problem_id"].to_numpy()


def simulated(random, truth_P, num_occurrences, error=0.06, **changes):
    """Measurements of problems with these true alignments, with the noise that their errors say."""
    problem_id = np.repeat(np.arange(len(truth_P)), num_occurrences)
    cosine = truth_P[problem_id] + error * random.standard_normal(len(problem_id))
    return rows_of(problem_id, cosine, error, **changes)


@pytest.mark.parametrize("error_freedom", [15, 1])
def test_mislabelled_and_coin_flip_problems_are_found_in_a_log(tmp_path, error_freedom):
    plan = LogPlan(num_steps=120, num_candidates=64, num_problems=500, error_freedom=error_freedom)
    truth = write_log(tmp_path / "gradalign", plan)
    suspects = read_run(find_runs([tmp_path])[0]).suspects
    found = truth[ids(suspects)]
    is_bad = found != CLEAN
    recall = is_bad.sum() / (truth != CLEAN).sum()
    precision = is_bad.mean()
    assert recall > 0.9 and precision > 0.85
    negative = truth[ids(suspects, "negative")]
    assert (negative == MISLABELLED).mean() > 0.85
    assert (truth[ids(suspects, "noise-like")] == COIN_FLIP).mean() > 0.6
    assert (found[:20] == MISLABELLED).mean() >= 0.9  # the farthest come first


def test_among_sound_problems_there_are_about_as_many_as_expected_by_chance():
    random = np.random.default_rng(0)
    found, expected = [], []
    for _ in range(10):
        truth_P = 0.12 + 0.05 * random.standard_normal(2000)
        suspects = suspects_of(simulated(random, truth_P, 4))
        found.append(len(suspects))
        expected.append(suspects.expected_by_chance)
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.2)
    assert np.mean(found) > 20  # the comparison is of something


@pytest.mark.parametrize("freedom", [1, 3, 15])
def test_errors_that_are_estimated_poorly_accuse_no_more(freedom):
    random = np.random.default_rng(5)
    truth_P = np.zeros(6000)
    problem_id = np.repeat(np.arange(len(truth_P)), 6)
    size = len(problem_id)
    error = 0.06 * np.sqrt(random.chisquare(freedom, size) / freedom)
    suspects = suspects_of(rows_of(problem_id, 0.06 * random.standard_normal(size), error, freedom=freedom))
    assert suspects.num_measured == 6000
    assert suspects.num_negative == pytest.approx(suspects.negative_if_none_aligned, abs=40)


def test_without_any_alignment_one_in_forty_looks_negative_and_that_is_said():
    random = np.random.default_rng(1)
    suspects = suspects_of(simulated(random, np.zeros(4000), 5))
    assert suspects.negative_if_none_aligned == 100
    assert suspects.num_negative == pytest.approx(100, abs=35)


def test_errors_that_are_not_known_come_from_the_spread_between_occurrences():
    random = np.random.default_rng(2)
    truth_P = np.where(np.arange(400) < 20, -0.15, 0.15)
    problem_id = np.repeat(np.arange(400), 8)
    cosine = truth_P[problem_id] + 0.04 * random.standard_normal(len(problem_id))
    suspects = suspects_of(rows_of(problem_id, cosine, np.nan))
    assert set(range(20)) <= set(ids(suspects).tolist())
    assert len(suspects) < 30


def test_an_estimator_without_norms_is_judged_by_its_dot_products():
    random = np.random.default_rng(3)
    truth_P = np.where(np.arange(300) < 15, -2.0, 2.0)
    suspects = suspects_of(simulated(random, truth_P, 5, error=0.7, norm=np.nan))
    assert not suspects.is_cosine
    assert set(range(15)) <= set(ids(suspects).tolist()) and len(suspects) < 20


def test_problems_met_once_are_not_accused_for_an_error_that_is_small_by_chance():
    """One degree of freedom: an error within a tenth of the true one in 8% of cases. No problem is aligned."""
    random = np.random.default_rng(6)
    size, error = 6000, 0.06
    errors = error * np.abs(random.standard_normal(size))
    cosine = error * random.standard_normal(size)
    suspects = suspects_of(rows_of(np.arange(size), cosine, errors, freedom=1))
    assert suspects.num_measured == size
    assert 0.3 < suspects.num_negative / suspects.negative_if_none_aligned < 1.1
    assert (cosine < -1.96 * errors).sum() > 5 * suspects.negative_if_none_aligned  # what taking them as they are does


def test_problems_met_once_are_found_where_they_stand_out():
    random = np.random.default_rng(7)
    truth_P = np.where(np.arange(2000) < 100, -0.3, 0.15)
    errors = 0.06 * np.abs(random.standard_normal(2000))
    suspects = suspects_of(rows_of(np.arange(2000), truth_P + 0.06 * random.standard_normal(2000), errors, freedom=1))
    is_bad = ids(suspects) < 100
    assert is_bad.sum() > 90 and is_bad.mean() > 0.6


def test_sums_in_pieces_are_those_of_the_whole():
    random = np.random.default_rng(4)
    piece = simulated(random, np.linspace(-0.1, 0.2, 50), 6)
    order = random.permutation(len(piece))
    whole = suspects_of(piece)
    parts = [piece.take(part) for part in np.array_split(order, 7)]
    divided = suspects_of(*parts)
    assert ids(divided).tolist() == ids(whole).tolist()
    for name in ("alignment", "standard_error"):
        np.testing.assert_allclose(divided.table[name], whole.table[name])


def test_interval_widths_are_students():
    # Quantiles of 0.975 from any table of Student's distribution.
    freedom = np.array([3.0, 5.0, 10.0, 30.0, 1e6])
    np.testing.assert_allclose(student_t(freedom), [3.182, 2.571, 2.228, 2.042, 1.960], rtol=1e-2)
    # ... and of 0.95.
    np.testing.assert_allclose(student_t(freedom, Z_90), [2.353, 2.015, 1.812, 1.697, 1.645], rtol=1e-2)
