# SPDX-License-Identifier: Apache-2.0
"""Which rollouts of trusted problems are kept, and which of them a direction is made from."""

import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.selection.kept_groups import Kept, KeptGroups


def rollout(problem_id, step, num_rows=4, name="trusted", num_right=2, has_rows=True):
    uid = f"{name}-{problem_id}-{step}"
    keys = tuple(f"{uid}_{k}_0" for k in range(num_rows if has_rows else 0))
    rewards = tuple(float(k < num_right) for k in range(num_rows))
    halves = tuple(int(k >= len(keys) // 2) for k in range(len(keys)))
    group = Group(Problem(uid, problem_id, "tasks", name), keys, 40, rewards, False, has_rows, halves=halves)
    return Kept(group, tuple(range(10, 10 + len(keys))), step)


def kept_of(rollouts, replay=5, seed=0):
    kept = KeptGroups(replay, seed)
    kept.add(rollouts)
    return kept


def uids(part):
    return {name: [each.group.problem.uid for each in members] for name, members in part.items()}


def test_the_last_rollouts_of_a_problem_are_kept_and_the_keys_of_older_ones_returned():
    kept = KeptGroups(replay=2, seed=0)
    assert kept.newest is None
    assert kept.add([rollout(1, 3), rollout(2, 3)]) == kept.add([rollout(1, 5)]) == []
    oldest = rollout(1, 3)
    assert kept.add([rollout(1, 9), rollout(2, 9, has_rows=False)]) == list(oldest.group.keys)
    assert [(each.group.problem.problem_id, each.step) for each in kept] == [(1, 5), (1, 9), (2, 3), (2, 9)]
    assert kept.newest == 9
    # Late, as in asynchronous training: older than what is kept.
    assert kept.add([oldest]) == list(oldest.group.keys)


@given(num=st.integers(1, 30), num_rows=st.integers(1, 9), wanted=st.floats(0.01, 200), seed=st.integers(0, 99))
def test_a_part_is_whole_rollouts_until_there_are_rows_enough(num, num_rows, wanted, seed):
    kept = kept_of([rollout(i, 1, num_rows) for i in range(num)], seed=seed)
    drawn = kept.draw(7, wanted)["trusted"]
    assert len(drawn) == min(num, max(1, math.ceil(wanted / num_rows)))
    assert len(set(uids({"": drawn})[""])) == len(drawn)


def test_a_part_is_drawn_by_seed_and_step_whatever_order_the_rollouts_came_in():
    rollouts = [rollout(i, step) for i in range(12) for step in (1, 2)]
    shuffled = random.Random(3).sample(rollouts, len(rollouts))
    parts = [uids(kept_of(rollouts).draw(step, 12)) for step in range(20)]
    assert parts == [uids(kept_of(shuffled).draw(step, 12)) for step in range(20)]
    assert len({str(part) for part in parts}) == 20 and parts[0] != uids(kept_of(rollouts, seed=1).draw(0, 12))


def test_old_and_new_rollouts_are_drawn_alike():
    kept = kept_of([rollout(i, step) for i in range(10) for step in (1, 50)])
    steps = Counter(each.step for step in range(400) for each in kept.draw(step, 8)["trusted"])
    assert steps[1] + steps[50] == 800 and abs(steps[1] - 400) < 60


def test_sets_give_in_proportion_to_their_rows_and_every_set_something():
    rollouts = [rollout(i, 1, name="large") for i in range(60)] + [rollout(i, 1, name="small") for i in range(20)]
    kept = kept_of([*rollouts, rollout(0, 1, name="tiny"), rollout(0, 1, name="dead", has_rows=False)])
    sizes = {name: len(members) for name, members in kept.draw(1, 80).items()}
    assert sizes == {"large": 15, "small": 5, "tiny": 1}


def test_without_rows_nothing_is_drawn():
    assert kept_of([]).draw(1, 10) == kept_of([rollout(1, 1, has_rows=False)]).draw(1, 10) == {}


def test_accuracy_is_that_of_the_latest_rollouts_of_those_inside_or_outside_the_audit():
    rights = {0: (4, 1), 1: (4, 3), 2: (0, 4), 3: (0, 0)}
    kept = kept_of([rollout(i, step, num_right=right) for i, both in rights.items() for step, right in enumerate(both)])
    audit = {"trusted": frozenset({2, 3})}
    assert kept.accuracy(audit, are_left_out=True, threshold=0.0) == 0.5
    assert kept.accuracy(audit, are_left_out=False, threshold=0.0) == 0.5
    assert kept.accuracy({"trusted": frozenset({2})}, are_left_out=False, threshold=0.0) == 1.0
    assert kept.accuracy({"trusted": frozenset()}, are_left_out=False, threshold=0.0) is None
    assert kept.accuracy(audit, are_left_out=True, threshold=1.0) == 0.0


@pytest.mark.parametrize("num_more", [0, 3])
def test_a_state_read_back_from_json_continues_as_before(num_more):
    first = kept_of([rollout(i, step) for i in range(6) for step in (1, 2, 3)] + [rollout(9, 1, has_rows=False)], 3)
    second = kept_of([rollout(77, 1)], 3)
    second.restore(json.loads(json.dumps(first.state())))
    assert list(second) == list(first)
    more = [rollout(i, 4) for i in range(num_more)]
    assert second.add(more) == first.add(more)
    assert [uids(second.draw(step, 10)) for step in range(9)] == [uids(first.draw(step, 10)) for step in range(9)]
