# SPDX-License-Identifier: Apache-2.0
"""Against answers whose verdict is known by construction, and against math-verify and verl's own rules."""

import json

import pytest

from tests.benchmarks.answer_pairs import KINDS, NOT_PAID, gsm8k_pairs, made_up_pairs
from tests.benchmarks.graders import OURS, REASONS, grade, page, paid_by_others_alone
from verl_gradalign.data.rewards import RULES


@pytest.fixture(scope="module")
def verdicts():
    return grade(made_up_pairs(num_problems=1, seed=11, kinds=tuple(KINDS)[::3]))


@pytest.mark.parametrize("kind", KINDS)
def test_right_answers_are_paid_and_wrong_ones_are_not(kind):
    for pair in made_up_pairs(num_problems=6, seed=12, kinds=(kind,)):
        assert RULES[pair.rule](pair.response, pair.truth) is pair.is_right, pair


@pytest.mark.parametrize("kind", KINDS)
def test_every_truth_is_right_against_itself(kind):
    for pair in made_up_pairs(num_problems=6, seed=13, kinds=(kind,)):
        assert RULES["math"](rf"\boxed{{{pair.truth}}}", pair.truth), pair


@pytest.mark.parametrize("kind", NOT_PAID)
def test_what_has_another_reading_is_not_paid(kind):
    _, answer, truth = NOT_PAID[kind]
    assert not RULES["math"](rf"\boxed{{{answer}}}", truth)


def test_gsm8k_answers_are_paid_as_the_truth_says(tmp_path):
    path = tmp_path / "test.jsonl"
    solutions = ["2 + 3 = 5\n#### 5", "90 - 100 = -10\n#### -10", "4 * 250,000 = 1,000,000\n#### 1,000,000"]
    path.write_text("".join(json.dumps({"question": "?", "answer": text}) + "\n" for text in solutions))
    for pair in gsm8k_pairs(path, num_problems=3, seed=0):
        assert RULES[pair.rule](pair.response, pair.truth) is pair.is_right, pair


def test_no_right_answer_is_paid_by_another_rule_alone_without_a_reason(verdicts):
    assert set(paid_by_others_alone(verdicts)) <= set(REASONS)
    assert {name for _, paid in verdicts for name in paid} > {OURS, "math-verify", "verl math_dapo"}


def test_the_page_counts_every_pair_once(verdicts):
    row = next(line for line in page(verdicts, "Graders").splitlines() if line.startswith(f"| {OURS} |"))
    counts = [int(cell) for cell in row.split("|")[2:-1]]
    assert sum(counts) == len(verdicts) and counts[1:3] == [0, 0]
