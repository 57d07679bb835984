# SPDX-License-Identifier: Apache-2.0
"""The synthetic tasks: right answers, wrong answers, disjoint files, repeatable draws."""

import random
from collections import Counter

import pyarrow.parquet as pq
import pytest

from verl_gradalign.data.rewards import compute_score
from verl_gradalign.data.schema import SCHEMA, draw_corrupted
from verl_gradalign.data.tasks import (
    FAMILIES,
    GUESS,
    RIGHT_STYLE,
    draw_problems,
    draw_wrong_answer,
    is_for_warm_up,
    write_splits,
    write_task_files,
)


def solve(prompt: str) -> str:
    """Return the answer to a prompt, found without the module under test."""
    words = prompt.split()
    if words[0] == "rev":
        return "".join(reversed(words[1]))
    if words[0] == "sort":
        return "".join(sorted(words[1]))
    if words[0] == "max":
        return max(words[1:], key=int)
    if words[0] == "rot":
        return words[1][1:] + words[1][0]
    return str(eval(prompt))


def read_rows(path):
    return pq.read_table(path).to_pylist()


def test_every_family_states_the_right_answer():
    problems = draw_problems(700, random.Random(0), families=FAMILIES)
    solvable = [problem for problem in problems if problem.family != GUESS]
    assert [problem.answer for problem in solvable] == [solve(problem.prompt) for problem in solvable]
    assert Counter(problem.family for problem in problems) == dict.fromkeys(FAMILIES, 100)


def test_guesses_are_even_and_always_the_same():
    guesses = draw_problems(1000, random.Random(0), families=[GUESS])
    assert Counter(guess.answer for guess in guesses)["1"] == pytest.approx(500, abs=80)  # 5 standard deviations
    again = draw_problems(1000, random.Random(0), families=[GUESS])
    assert guesses == again


def test_splits_have_the_families_that_are_named_and_sources_by_family(tmp_path):
    named = {"test": ["rotation"] * 20, "pool": ["rotation"] * 5 + ["guess"] * 15}
    paths = write_splits(tmp_path, named, corrupted_share=0.5)
    pool = read_rows(paths["pool"])
    assert Counter(row["data_source"] for row in pool) == {"gradalign/tasks/rotation": 5, "gradalign/tasks/guess": 15}
    assert sum(row["extra_info"]["corrupted"] for row in pool) == 10
    assert not any(row["extra_info"]["corrupted"] for row in read_rows(paths["test"]))


def test_wrong_answers_are_wrong_and_nearly_as_long_as_right_ones():
    rng = random.Random(0)
    for problem in draw_problems(1400, rng, families=FAMILIES):
        wrong = draw_wrong_answer(problem, rng)
        assert wrong != problem.answer
        assert 1 <= len(wrong) <= 4 and abs(len(wrong) - len(problem.answer)) <= 1


def test_warm_up_and_reinforcement_learning_never_share_a_prompt():
    warm_up = {problem.prompt for problem in draw_problems(5000, random.Random(0), for_warm_up=True)}
    learning = {problem.prompt for problem in draw_problems(3000, random.Random(1))}
    assert not warm_up & learning
    assert all(map(is_for_warm_up, warm_up)) and not any(map(is_for_warm_up, learning))


def test_prompts_that_run_out_are_an_error():
    with pytest.raises(ValueError, match="ask for fewer problems"):
        draw_problems(100_000, random.Random(0))


def test_files_are_disjoint_and_only_the_pool_is_corrupted(tmp_path):
    paths = write_task_files(tmp_path, num_pool=2500, num_trusted=64, num_test=256, corrupted_share=0.5)
    rows = {split: read_rows(path) for split, path in paths.items()}
    assert {split: len(of_split) for split, of_split in rows.items()} == {"pool": 2500, "trusted": 64, "test": 256}
    assert {split: sum(row["extra_info"]["corrupted"] for row in of_split) for split, of_split in rows.items()} == {
        "pool": 1250,
        "trusted": 0,
        "test": 0,
    }
    prompts = [row["prompt"][0]["content"] for of_split in rows.values() for row in of_split]
    assert len(set(prompts)) == len(prompts)
    assert not any(map(is_for_warm_up, prompts))


def test_rows_follow_the_schema_and_the_reward_function_accepts_their_answers(tmp_path):
    path = write_task_files(tmp_path, num_pool=50, num_trusted=10, num_test=10)["trusted"]
    assert pq.read_schema(path).equals(SCHEMA)
    for index, row in enumerate(read_rows(path)):
        assert row["extra_info"] | {"index": index, "split": "trusted", "corrupted": False} == row["extra_info"]
        answer = row["reward_model"]["ground_truth"]
        assert answer == solve(row["prompt"][0]["content"])
        assert compute_score(row["data_source"], RIGHT_STYLE + answer, answer, row["extra_info"])["score"] == 1.0


def test_files_depend_on_the_seed_alone_and_test_problems_not_on_the_pool(tmp_path):
    first = write_task_files(tmp_path / "a", num_pool=50)
    again = write_task_files(tmp_path / "b", num_pool=50)
    other_pool = write_task_files(tmp_path / "c", num_pool=80, corrupted_share=0.0)
    other_seed = write_task_files(tmp_path / "d", num_pool=50, seed=1)
    assert all(read_rows(first[split]) == read_rows(again[split]) for split in first)
    assert all(read_rows(first[split]) == read_rows(other_pool[split]) for split in ("trusted", "test"))
    assert all(read_rows(first[split]) != read_rows(other_seed[split]) for split in first)


def test_corrupted_share_is_met_exactly():
    assert sum(draw_corrupted(101, 0.25, random.Random(0))) == 25
    assert draw_corrupted(3, 0.0, random.Random(0)) == [False] * 3
    assert draw_corrupted(3, 1.0, random.Random(0)) == [True] * 3


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_outside_0_and_1_is_rejected(share):
    with pytest.raises(ValueError, match="choose a share of the pool"):
        draw_corrupted(10, share, random.Random(0))


def test_a_count_below_one_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="num_trusted=0"):
        write_task_files(tmp_path, num_trusted=0)
