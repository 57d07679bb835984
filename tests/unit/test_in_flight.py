# SPDX-License-Identifier: Apache-2.0
"""Problems between trainer and sampler keep what was forecast of them, also through a checkpoint."""

from dataclasses import asdict

import numpy as np
import pytest

from verl_gradalign.integration.in_flight import InFlight, picks_of, with_forecasts
from verl_gradalign.selection.groups import Problem
from verl_gradalign.selection.state_file import load_state, save_state
from verl_gradalign.types import Picks


def picks(ids, mean):
    count = len(ids)
    return Picks(np.array(ids), np.full(count, mean), np.full(count, 0.5), np.arange(count) % 2 == 1)


def sent(step, ids):
    return with_forecasts([Problem(f"{step}-{i}", i, "tasks") for i in ids], picks(ids, float(step)))


def test_groups_of_several_steps_have_each_the_forecast_of_their_own():
    in_flight = InFlight()
    in_flight.add(sent(1, [7, 3, 9]))
    in_flight.add([Problem("t", 0, "tasks", "trusted")])
    in_flight.add(sent(2, [4, 8]))
    found = picks_of(in_flight.take({"1-3", "1-9", "2-4", "t"}))
    assert found.problem_id_P.tolist() == [3, 9, 4]
    assert found.mean_P.tolist() == [1.0, 1.0, 2.0]
    assert found.deviation_P.tolist() == [0.5, 0.5, 0.5]
    assert found.is_uniform_P.tolist() == [True, False, False]


def test_forecasts_of_problems_in_flight_outlive_a_checkpoint(tmp_path):
    in_flight = InFlight()
    in_flight.add(sent(1, [7, 3]))
    save_state(tmp_path / "state.npz", {}, {"in_flight": [asdict(problem) for problem in in_flight]})
    restored = [Problem(**values) for values in load_state(tmp_path / "state.npz")["in_flight"]]
    before, after = picks_of(in_flight), picks_of(restored)
    for name in ("problem_id_P", "mean_P", "deviation_P", "is_uniform_P"):
        assert getattr(before, name).tolist() == getattr(after, name).tolist()


def test_of_a_problem_that_is_taken_twice_the_earlier_forecast_counts():
    assert picks_of([*sent(1, [7]), *sent(2, [7])]).mean_P.tolist() == [1.0]


def test_problems_without_forecasts_give_no_picks():
    found = picks_of([Problem("a", 1, "tasks"), Problem("t", 2, "tasks", "trusted")])
    assert found.problem_id_P.shape == found.is_uniform_P.shape == (0,)


def test_picks_of_other_problems_are_refused():
    with pytest.raises(ValueError, match="2 problems were sent, and the 2 picks are of others"):
        with_forecasts([Problem("a", 1, "tasks"), Problem("b", 2, "tasks")], picks([2, 1], 0.0))
