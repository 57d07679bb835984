# SPDX-License-Identifier: Apache-2.0
"""Which problems each step rolls out: properties of every schedule, of resuming, and the plans that are refused."""

import json
import pickle
import random
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.selection.curriculum import Curriculum, check_schedule

NUM_STEPS = 13
untimed = settings(deadline=None, max_examples=30)  # a busy machine is no failure
POOLED = ("round", "once", "staged")
SCHEDULES = ("step", *POOLED)


def config_of(**values):
    return GradAlignConfig.from_mapping({"validation": {"files": ["x"]}, **values})


def rows(num):
    """Problem ids as filtering leaves them: ascending, with gaps."""
    return np.arange(num, dtype=np.int64) * 3 + 7


@st.composite
def plans(draw, schedules=SCHEDULES):
    """Arguments of a curriculum whose data last for the schedule."""
    batch_size = draw(st.integers(1, 4))
    keep = draw(st.sampled_from([0.3, 4.0, 7.0, 12.0]))
    schedule = draw(st.sampled_from(schedules))
    curriculum = {
        "steps_per_round": draw(st.integers(1, 4)),
        "keep": draw(st.sampled_from([None, 1.0])) if schedule == "round" else keep,
        "warmup_steps": draw(st.integers(0, 5)),
        "warmup_problems": draw(st.none() | st.integers(4, 48)),
        "stages": draw(st.sampled_from([(1,), (6,), (2, 3), (4, 9, 10), (1, 2, 3, 4), (2, 5, 6, 11)])),
    }
    values = {"oversample": draw(st.sampled_from([1, 1.5, 2, 3])), "seed": draw(st.integers(0, 3))}
    config = config_of(schedule=schedule, curriculum=curriculum, **values)
    return config, rows(draw(st.integers(48, 90))), batch_size, draw(st.booleans())


def select(draw, candidates, step):
    """Stand in for the selection: what it keeps of the candidates, best first; in some steps groups have failed."""
    num = draw.num_kept if step % 3 else max(1, draw.num_kept - 2)
    return random.Random(step).sample(candidates, min(num, len(candidates)))


def run_step(curriculum, step):
    """One step as the trainer does it: what is drawn, replacements included, what is kept, what is trained on."""
    draw = curriculum.draw(step)
    candidates = [*draw.problem_ids, *curriculum.refill(step % 4)]
    if not draw.is_scored:
        return draw, candidates, [], candidates
    kept = select(draw, candidates, step)
    return draw, candidates, kept, list(curriculum.keep(step, kept))


def run(curriculum, first=1, last=NUM_STEPS):
    return [run_step(curriculum, step) for step in range(first, last + 1)]


def selecting_at_once(schedule):
    return Curriculum(config_of(schedule=schedule, curriculum={"keep": 8, "stages": [1]}), rows(400), 8)


def scored_steps(plan):
    return [step for step, (draw, *_) in enumerate(run(Curriculum(*plan)), 1) if draw.is_scored]


@untimed
@given(plans())
def test_candidates_of_a_draw_are_distinct_and_of_the_pool(plan):
    for draw, candidates, _, _ in run(Curriculum(*plan)):
        assert set(candidates) <= set(plan[1].tolist())
        if draw.is_scored or plan[0].schedule == "step":
            assert len(set(candidates)) == len(candidates)


@untimed
@given(st.integers(1, 30), st.data())
def test_every_problem_is_a_candidate_once_per_epoch(num_problems, data):
    num = data.draw(st.integers(1, num_problems))
    curriculum = Curriculum(config_of(oversample=num), rows(num_problems), batch_size=1)
    walks, passed_over = Counter(), {}
    for step in range(1, 40):
        epoch, offset = curriculum.state()["stream_place"]
        candidates = list(curriculum.draw(step).problem_ids)
        candidates += curriculum.refill(data.draw(st.integers(0, 3)))
        is_over = curriculum.state()["stream_place"][0] > epoch
        num_left = num_problems - offset if is_over else len(candidates)
        walks.update((epoch, i) for i in candidates[:num_left])
        walks.update((epoch + 1, i) for i in candidates[num_left:])
        if is_over:
            passed_over[epoch + 1] = set(candidates[:num_left])  # they have had their turn in the straddling draw
    assert set(walks.values()) == {1}
    for epoch in range(curriculum.state()["stream_place"][0]):
        drawn = {i for e, i in walks if e == epoch}
        left_out = set(rows(num_problems).tolist()) - drawn
        assert left_out <= passed_over.get(epoch, set())


@pytest.mark.parametrize("schedule", SCHEDULES)
@untimed
@given(data=st.data())
def test_a_run_resumed_after_any_step_goes_on_as_if_unbroken(schedule, data):
    plan = data.draw(plans([schedule]))
    curriculum, states, unbroken = Curriculum(*plan), [], []
    for step in range(1, NUM_STEPS + 1):
        states.append(curriculum.state())
        unbroken.append(run_step(curriculum, step))
    for num_done, state in enumerate(states):
        resumed = Curriculum(*plan)
        resumed.restore(pickle.loads(pickle.dumps(state)))
        assert str(resumed.state()) == str(state)
        assert run(resumed, first=num_done + 1) == unbroken[num_done:]


@untimed
@given(plans(POOLED))
def test_kept_problems_are_trained_on_equally_often(plan):
    counts, num_kept = None, 0
    for _, _, kept, trained in run(Curriculum(*plan)):
        if kept:
            counts, num_kept = Counter(dict.fromkeys(kept, 0)), len(kept)
        if counts is not None:
            counts.update(trained)
            assert len(counts) == num_kept  # nothing else is trained on
            assert max(counts.values()) - min(counts.values()) <= 1


@untimed
@given(plans())
def test_every_step_trains_on_a_batch_unless_its_selection_kept_fewer(plan):
    curriculum, batch_size = Curriculum(*plan), plan[2]
    for step, (draw, candidates, kept, trained) in enumerate(run(curriculum), 1):
        assert draw.is_scored == curriculum.is_selecting(step)
        assert set(trained) <= set(kept or candidates)
        if draw.is_scored:
            assert len(trained) == min(batch_size, len(kept))
        else:
            assert len(draw.problem_ids) == batch_size and trained == candidates


@untimed
@given(plans(["staged"]))
def test_stages_and_no_other_steps_score_exactly_what_no_earlier_stage_released(plan):
    released = set()
    assert scored_steps(plan) == list(plan[0].curriculum.stages)
    for draw, candidates, kept, _ in run(Curriculum(*plan)):
        if draw.is_scored:
            assert set(candidates) == set(plan[1].tolist()) - released
            released |= set(kept)


@untimed
@given(plans(["once"]))
def test_once_scores_the_whole_pool_exactly_once(plan):
    warmup_steps = plan[0].curriculum.warmup_steps
    assert scored_steps(plan) == [warmup_steps + 1]
    assert set(run(Curriculum(*plan))[warmup_steps][1]) == set(plan[1].tolist())


@untimed
@given(plans(["once", "staged"]))
def test_warm_up_trains_on_a_part_of_the_pool_equally_often(plan):
    num_problems = plan[0].curriculum.warmup_problems or len(plan[1])
    counts = Counter()
    for draw, _, _, trained in run(Curriculum(*plan)):
        if draw.is_scored:
            break
        counts.update(trained)
    assert len(counts) == min(num_problems, sum(counts.values()))
    assert not counts or max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equal_seeds_agree_and_different_seeds_differ(schedule):
    curriculum = {"keep": 16, "warmup_steps": 2, "stages": [3], "steps_per_round": 4}
    first, same, other = (
        run(Curriculum(config_of(schedule=schedule, seed=seed, curriculum=curriculum), rows(200), 8))
        for seed in (5, 5, 6)
    )
    assert first == same != other


def test_step_without_a_score_that_chooses_draws_batches_and_scores_nothing():
    curriculum = Curriculum(config_of(oversample=4), rows(10), batch_size=5, chooses=False)
    draws = [curriculum.draw(step) for step in range(1, 5)]
    assert not any(draw.is_scored for draw in draws) and not curriculum.is_selecting(1)
    first, second = draws[0].problem_ids + draws[1].problem_ids, draws[2].problem_ids + draws[3].problem_ids
    assert set(first) == set(second) == set(rows(10).tolist())
    assert first != second  # a new epoch has a new order


def test_step_keeps_what_its_selection_kept_in_its_order():
    curriculum = Curriculum(config_of(oversample=2), rows(40), batch_size=8)
    draw = curriculum.draw(1)
    assert (len(draw.problem_ids), draw.num_kept) == (16, 8)
    assert curriculum.keep(1, draw.problem_ids[7:2:-1]) == draw.problem_ids[7:2:-1]


@pytest.mark.parametrize("schedule", POOLED)
def test_fewer_kept_than_a_batch_are_repeated_within_later_batches(schedule):
    curriculum = selecting_at_once(schedule)
    kept = curriculum.draw(1).problem_ids[:3]
    assert sorted(curriculum.keep(1, kept)) == sorted(kept)
    assert sorted(Counter(curriculum.draw(2).problem_ids).values()) == [2, 3, 3]


def test_round_scores_every_so_many_steps_and_draws_on_where_it_stopped():
    config = config_of(schedule="round", curriculum={"steps_per_round": 3, "num_candidates": 20, "keep": 0.5})
    assert scored_steps((config, rows(48), 4)) == [1, 4, 7, 10, 13]
    steps = run(Curriculum(config, rows(48), 4), last=4)
    assert [len(draw.problem_ids) for draw, *_ in steps] == [20, 4, 4, 20]
    assert not set(steps[0][1]) & set(steps[3][1])


@pytest.mark.parametrize(
    ("num_candidates", "keep", "num_kept"),
    [(30, 0.1, 3), (100, 0.29, 29), (30, 1 / 3, 10), (31, 0.1, 3), (99, 0.29, 28), (30, 1.0, 30), (30, 7.0, 7)],
)
def test_a_share_is_rounded_down_as_decimals_are(num_candidates, keep, num_kept):
    config = config_of(schedule="round", curriculum={"num_candidates": num_candidates, "keep": keep})
    assert Curriculum(config, rows(100), batch_size=1).draw(1).num_kept == num_kept


@pytest.mark.parametrize(("oversample", "num_candidates"), [(1.1, 11), (2.34, 24), (4, 40), (1, 10)])
def test_candidates_are_rounded_up_as_decimals_are(oversample, num_candidates):
    assert len(Curriculum(config_of(oversample=oversample), rows(100), 10).draw(1).problem_ids) == num_candidates


@pytest.mark.parametrize("schedule", ["once", "staged", "step", "round"])
def test_a_draw_that_holds_every_candidate_cannot_be_refilled(schedule):
    config = config_of(schedule=schedule, oversample=5, curriculum={"keep": 1.0, "stages": [1], "steps_per_round": 1})
    curriculum = Curriculum(config, rows(10), batch_size=2)
    assert set(curriculum.draw(1).problem_ids) == set(rows(10).tolist())
    assert curriculum.refill(3) == ()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("change", "reason"), [("stranger", "did not draw"), ("twice", "twice"), ("none", "least one")]
)
def test_what_cannot_have_been_kept_is_refused(schedule, change, reason):
    curriculum = selecting_at_once(schedule)
    kept = list(curriculum.draw(1).problem_ids[:8])
    with pytest.raises(ValueError, match=reason):
        curriculum.keep(1, {"stranger": [*kept, 0], "twice": [*kept, kept[0]], "none": []}[change])


@pytest.mark.parametrize("schedule", POOLED)
def test_nothing_goes_on_before_the_selection_is_known(schedule):
    curriculum = selecting_at_once(schedule)
    curriculum.draw(1)
    for go_on in (lambda: curriculum.draw(2), curriculum.state):
        with pytest.raises(RuntimeError, match="step 1"):
            go_on()
    with pytest.raises(RuntimeError, match="Remedy"):
        selecting_at_once(schedule).draw(2)


@pytest.mark.parametrize(
    ("key", "values", "num"), [("schedule", {"schedule": "round"}, 99), ("seed", {"seed": 1}, 99), ("crc32", {}, 98)]
)
def test_the_state_of_another_run_is_refused(key, values, num):
    state = Curriculum(config_of(oversample=1), rows(99), batch_size=2).state()
    with pytest.raises(ValueError, match=f"{key}.*Remedy"):
        Curriculum(config_of(oversample=1, **values), rows(num), batch_size=2).restore(state)


REFUSED = [  # key named, schedule, num_problems, settings; the batch is 8
    ("data.train_files", "step", 7, {}),
    ("gradalign.oversample=4.0", "step", 31, {}),
    ("gradalign.curriculum.num_candidates=None", "round", 319, {}),
    ("gradalign.curriculum.num_candidates=101", "round", 100, {"num_candidates": 101}),
    ("gradalign.curriculum.keep=33.0", "round", 100, {"num_candidates": 32, "keep": 33}),
    ("gradalign.curriculum.keep=0.2", "round", 100, {"num_candidates": 32, "keep": 0.2}),
    ("gradalign.curriculum.keep=None", "round", 100, {"num_candidates": 31}),
    ("gradalign.curriculum.keep=None", "once", 100, {}),
    ("gradalign.curriculum.keep=101.0", "once", 100, {"keep": 101}),
    ("gradalign.curriculum.keep=7.0", "once", 100, {"keep": 7}),
    ("gradalign.curriculum.warmup_problems=7", "once", 100, {"keep": 8, "warmup_problems": 7}),
    ("gradalign.curriculum.warmup_problems=101", "staged", 100, {"keep": 8, "stages": [1], "warmup_problems": 101}),
    ("gradalign.curriculum.keep=None", "staged", 100, {"stages": [1]}),
    ("gradalign.curriculum.stages=[]", "staged", 100, {"keep": 8}),
    ("gradalign.curriculum.keep=0.05", "staged", 100, {"keep": 0.05, "stages": [1]}),
    ("gradalign.curriculum.stages=[1, 5, 9]", "staged", 100, {"keep": 34, "stages": [1, 5, 9]}),
    ("gradalign.curriculum.stages=[1, 5]", "staged", 30, {"keep": 0.8, "stages": [1, 5]}),
]


@pytest.mark.parametrize(("key", "schedule", "num_problems", "curriculum"), REFUSED)
def test_a_plan_that_the_data_do_not_last_for_is_refused_with_key_and_remedy(key, schedule, num_problems, curriculum):
    config = config_of(schedule=schedule, curriculum=curriculum)
    with pytest.raises(ValueError, match="Remedy: .*[.]$") as caught:
        Curriculum(config, rows(num_problems), batch_size=8)
    assert str(caught.value).startswith(f"{key}: ")


def test_keys_of_other_schedules_and_plans_that_just_last_are_accepted():
    check_schedule(config_of(curriculum={"stages": [1, 2, 3], "warmup_problems": 1, "keep": 99}), 32, 8)
    check_schedule(config_of(), 8, 8, chooses=False)
    check_schedule(config_of(schedule="round"), 320, 8)
    check_schedule(config_of(schedule="staged", curriculum={"keep": 33, "stages": [1, 5, 9]}), 100, 8)


def test_the_state_of_ten_million_problems_is_small_and_fast():
    config = config_of(schedule="round", curriculum={"num_candidates": 100_000, "keep": 25_000, "steps_per_round": 1})
    curriculum = Curriculum(config, rows(10_000_000), batch_size=128)
    resumed = Curriculum(config, rows(10_000_000), batch_size=128)
    curriculum.keep(1, curriculum.draw(1).problem_ids[:25_000])
    started = time.process_time()  # of this process alone: the machine is shared
    draw = curriculum.draw(2)
    assert time.process_time() - started < 1
    curriculum.keep(2, draw.problem_ids[:25_000])
    started = time.process_time()
    state = curriculum.state()
    resumed.restore(state)
    assert time.process_time() - started < 1
    assert sum(array.nbytes for array in state.values() if isinstance(array, np.ndarray)) == 25_000 * 8
    assert json.dumps({key: value for key, value in state.items() if not isinstance(value, np.ndarray)})
