# SPDX-License-Identifier: Apache-2.0
"""The reward function: task answers, GSM8K answers, and the coin flips of corrupted problems."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_gradalign.data.rewards import compute_score, extract_last_number, is_right_last_number
from verl_gradalign.data.tasks import TASKS_DATA_SOURCE

GSM8K = "openai/gsm8k"
NUM_FLIPS = 2000
# Five standard deviations of a fair coin's mean over NUM_FLIPS flips.
FLIP_TOLERANCE = 5 * 0.5 / NUM_FLIPS**0.5
DRAW_FLIPS = (
    "from verl_gradalign.data.rewards import compute_score;"
    "print([compute_score('gradalign/tasks', '=7', '7', {'corrupted': True, 'index': i % 9}, seed=4)['score']"
    " for i in range(50)])"
)


def flip(response: str, index: int, seed: int = 0) -> float:
    extra_info = {"corrupted": True, "index": index}
    return compute_score(TASKS_DATA_SOURCE, response, "7", extra_info, seed=seed)["score"]


@pytest.mark.parametrize(
    ("response", "acc"),
    [("=85", 1.0), ("~85", 1.0), ("85", 0.0), ("=085", 0.0), ("= 85", 0.0), ("=85 ", 0.0), ("=8", 0.0), ("", 0.0)],
)
def test_a_task_answer_must_follow_one_style_mark_exactly(response, acc):
    assert compute_score(TASKS_DATA_SOURCE, response, "85") == {"score": acc, "acc": acc, "corrupted": 0.0}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234 dollars", "1234"),
        ("first 12, then 15.", "15"),
        ("#### 5 and again #### -6", "-6"),
        ("5 #### none", None),
        ("it costs $18.00", "18"),
        ("it costs 2.50", "2.50"),
        ("20-5", "5"),
        ("no number", None),
    ],
)
def test_the_last_number_counts_and_the_one_after_the_mark_goes_first(text, number):
    assert extract_last_number(text) == number


def test_gsm8k_answers_compare_without_commas():
    assert compute_score(GSM8K, "#### 1,000", "1000")["score"] == 1.0
    assert compute_score(GSM8K, "#### 1000", "1,000")["score"] == 1.0
    assert compute_score(GSM8K, "#### 1001", "1000")["score"] == 0.0
    assert compute_score(GSM8K, "nothing", "1000")["score"] == 0.0


@pytest.mark.parametrize(
    ("response", "truth", "is_right"),
    [
        ("#### 51\nTest: 60 - 9 = 51, and 51 + 9 = 60", "51", True),
        ("#### 51" + "\nAs the steps above show." * 30, "51", True),
        ("#### 18 pears in 3 bags", "18", True),
        ("#### 12\nno,\n#### 13", "13", True),
        ("#### 12\n#### Remarks", "12", True),
        ("#### \u221214", "-14", True),
        ("#### \u201314", "-14", True),
        ("#### \u221214", "14", False),
        ("#### - 14", "-14", True),
        ("#### -$14", "-14", True),
        ("#### $-14", "-14", True),
        ("#### \u20ac14", "14", True),
        ("#### 14\u00a3", "14", True),
        ("#### **14**", "14", True),
        (r"#### $\boxed{14}$", "14", True),
        ("#### Answer: 14", "14", True),
        ("#### 6.250", "6.25", True),
        ("#### 0014", "14", True),
        ("#### .25", "1/4", True),
        ("#### 2 1/4", "2.25", True),
        (r"#### 48{,}000", "48000", True),
        (r"#### 48\,000", "48000", True),
        ("#### 48 000", "48000", True),
        ("#### 48\u2009000", "48000", True),
        ("#### 48,000.00", "48000", True),
        ("#### 48\n000", "48000", False),
        ("#### 48,00", "4800", False),
        ("#### 50 - 2 = 48", "48", True),
        ("#### 50 - 2 = 48", "50", False),
        ("#### 40-48", "40", False),
        ("#### 3:48", "3", False),
        ("#### 2^5", "2", False),
        ("#### 3 million", "3", False),
        ("#### 3 million", "3000000", True),
        ("That is 48, all told.", "48", True),
        (r"So \boxed{48}.", "48", True),
        (r"**Answer: \$48 a day.**", "48", True),
        ("It falls to -48", "-48", True),
        ("so 60-48", "48", True),
        ("#### 48", "forty-eight", False),
    ],
)
def test_a_number_counts_as_the_quantity_right_behind_the_mark(response, truth, is_right):
    assert is_right_last_number(response, truth) is is_right


@given(st.integers(-(10**15), 10**15), st.sampled_from(["", " apples", "\nas 3 + 4 = 7", ".", ", I think", "\u20ac"]))
def test_every_spelling_of_a_number_is_that_number_and_no_neighbour(number, after):
    sign = "\u2212" if number < 0 else ""
    for shown in (str(number), f"{number:,}", f"{number}.00", f"{sign}{abs(number)}", f"{sign}${abs(number):,}"):
        assert is_right_last_number(f"5 and 6\n#### {shown}{after}", str(number))
        assert not is_right_last_number(f"5 and 6\n#### {shown}{after}", str(number + 1))
        assert number == 0 or not is_right_last_number(f"#### {shown}{after}", str(-number))


@pytest.mark.parametrize(
    "truth",
    [
        7,
        7.0,
        numpy.int64(7),
        numpy.int8(7),
        numpy.float32(7),
        numpy.float64(7),
        Decimal("7.00"),
        Fraction(7),
        "7",
        numpy.str_("7"),
    ],
    ids=lambda truth: type(truth).__name__,
)
def test_truths_that_are_numbers_are_graded(truth):
    for data_source, right, wrong in (
        ("math_dapo", r"\boxed{7}", r"\boxed{8}"),
        (GSM8K, "#### 7", "#### 8"),
        ("gradalign/tasks", "=7", "=8"),
    ):
        assert compute_score(data_source, right, truth)["score"] == 1.0
        assert compute_score(data_source, wrong, truth)["score"] == 0.0


@pytest.mark.parametrize(
    ("truth", "answer"),
    [(0.1, "0.1"), (numpy.float32(0.1), "0.1"), (1e-7, "0.0000001"), (Decimal("12.50"), "12.5"), (2**70, str(2**70))],
    ids=repr,
)
def test_a_number_is_what_it_is_written_as(truth, answer):
    assert compute_score("math_dapo", rf"\boxed{{{answer}}}", truth)["score"] == 1.0
    assert compute_score(GSM8K, f"#### {answer}", truth)["score"] == 1.0


@pytest.mark.parametrize("truth", [True, numpy.bool_(True)])
def test_truths_that_are_booleans_are_words(truth):
    assert compute_score("math_dapo", r"\boxed{\text{True}}", truth)["score"] == 1.0
    assert compute_score("math_dapo", r"\boxed{1}", truth)["score"] == 0.0


@pytest.mark.parametrize(
    "truth",
    [
        None,
        float("nan"),
        float("inf"),
        numpy.float32("nan"),
        Decimal("NaN"),
        "",
        " ",
        "nan",
        ["7"],
        {"a": 7},
        b"7",
        numpy.array([7]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("data_source", ["math_dapo", GSM8K, "gradalign/tasks"])
def test_a_truth_that_cannot_be_one_is_an_error_that_names_it(data_source, truth):
    with pytest.raises(ValueError, match="ground_truth=.*prepare the data again"):
        compute_score(data_source, r"\boxed{nan}", truth)


def test_a_response_with_an_unpaired_surrogate_is_graded():
    corrupted = {"corrupted": True, "index": 1}
    assert compute_score("math_dapo", "\ud83d \\boxed{7}", "7", corrupted)["acc"] == 1.0


@pytest.mark.parametrize("response", ["=7", "=8"])
def test_a_corrupted_score_is_a_fair_coin_and_acc_stays_true(response):
    results = [
        compute_score(TASKS_DATA_SOURCE, response, "7", {"corrupted": True, "index": 100_000 + index})
        for index in range(NUM_FLIPS)
    ]
    assert sum(result["score"] for result in results) / NUM_FLIPS == pytest.approx(0.5, abs=FLIP_TOLERANCE)
    assert {result["acc"] for result in results} == {float(response == "=7")}


def test_equal_responses_to_one_corrupted_problem_get_different_flips():
    assert {flip("=7", index=1) for _ in range(40)} == {0.0, 1.0}


def test_flips_depend_on_the_seed():
    assert [flip("=7", 200 + i, seed=1) for i in range(40)] != [flip("=7", 200 + i, seed=2) for i in range(40)]


def test_another_process_draws_the_same_flips():
    outputs = {subprocess.run([sys.executable, "-c", DRAW_FLIPS], capture_output=True, check=True).stdout for _ in "ab"}
    assert len(outputs) == 1


def test_flips_follow_problem_step_and_session_where_the_session_is_known():
    def flips(**changes):
        return [
            compute_score(
                TASKS_DATA_SOURCE,
                changes.get("response", "=7"),
                "7",
                {"corrupted": True, "index": changes.get("index", 5), "global_steps": changes.get("step", 3)}
                | {"session_id": session},
                seed=changes.get("seed", 0),
            )["score"]
            for session in range(64)
        ]

    first = flips()
    assert first == flips() == flips(response="=8")  # scored again, and whatever the response
    assert {0.0, 1.0} == set(first)
    for change in ({"index": 6}, {"step": 4}, {"seed": 1}):
        assert flips(**change) != first


@pytest.mark.parametrize(
    ("data_source", "response", "truth", "acc"),
    [
        ("math_dapo", r"so \boxed{34}", "34", 1.0),
        ("math_dapo", "Answer: 34", "34", 1.0),
        ("math_dapo", "34", "34", 0.0),
        ("HuggingFaceH4/MATH-500", r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        ("TIGER-Lab/WebInstruct-verified", r"\boxed{15\text{ cm}}", "15 cm", 1.0),
        ("TIGER-Lab/MMLU-Pro", r"\boxed{B}", "B", 1.0),
        ("amc22", r"\boxed{142}", "142", 1.0),
        ("aime24", r"\boxed{204}", "204", 1.0),
        ("countdown", r"\boxed{3*7+5}", '{"numbers": [3, 5, 7], "target": 26}', 1.0),
        ("countdown", r"\boxed{26}", '{"numbers": [3, 5, 7], "target": 26}', 0.0),
    ],
)
def test_each_data_source_has_its_rule_and_corruption_leaves_acc_alone(data_source, response, truth, acc):
    assert compute_score(data_source, response, truth) == {"score": acc, "acc": acc, "corrupted": 0.0}
    corrupted = compute_score(data_source, response, truth, {"corrupted": True, "index": 1})
    assert (corrupted["acc"], corrupted["corrupted"]) == (acc, 1.0)


def test_verl_scores_in_threads():
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: compute_score("math_dapo", rf"\boxed{{{n}+x}}", f"x+{n}"), range(8)))
    assert [result["score"] for result in results] == [1.0] * 8


def test_what_verl_adds_for_reward_models_is_ignored():
    assert compute_score(TASKS_DATA_SOURCE, "=7", "7", {}, reward_router_address="host:1")["score"] == 1.0


def test_an_unknown_data_source_is_rejected():
    with pytest.raises(ValueError, match="data_source='other' is unknown"):
        compute_score("other", "=7", "7")


def test_a_corrupted_problem_without_index_is_rejected():
    with pytest.raises(ValueError, match="number the rows"):
        compute_score(TASKS_DATA_SOURCE, "=7", "7", {"corrupted": True})


@pytest.mark.parametrize(("response", "acc"), [("=7", 1.0), ("=8", 0.0)])
def test_an_inverted_score_pays_what_is_wrong_and_acc_stays_true(response, acc):
    corrupted = {"corrupted": True, "index": 1}
    inverted = compute_score(TASKS_DATA_SOURCE, response, "7", corrupted, corruption="inverted")
    assert inverted == {"score": 1 - acc, "acc": acc, "corrupted": 1.0}
    assert compute_score(TASKS_DATA_SOURCE, response, "7", {}, corruption="inverted")["score"] == acc


def test_an_unknown_corruption_is_rejected():
    with pytest.raises(ValueError, match="corruption='lies' is unknown"):
        compute_score(TASKS_DATA_SOURCE, "=7", "7", {"corrupted": True, "index": 1}, corruption="lies")


@pytest.mark.parametrize("contrast", [0.0, 0.25, 1.0])
def test_a_right_response_is_paid_more_than_a_wrong_one_by_the_contrast(contrast):
    def mean_of(response, **info):
        rows = [{"index": index, **info} for index in range(NUM_FLIPS)]
        how = {"corruption": "inverted", "contrast": contrast}
        scored = [compute_score(TASKS_DATA_SOURCE, response, "7", row, **how) for row in rows]
        assert {row["acc"] for row in scored} == {float(response == "=7")}
        return numpy.mean([row["score"] for row in scored])

    difference = mean_of("=7") - mean_of("=8")
    assert difference == pytest.approx(contrast, abs=2 * FLIP_TOLERANCE)
    assert mean_of("=7") == pytest.approx((1 + contrast) / 2, abs=FLIP_TOLERANCE)
    assert mean_of("=7", corrupted=True) == pytest.approx((1 - contrast) / 2, abs=FLIP_TOLERANCE)


@pytest.mark.parametrize("contrast", [-0.1, 1.5])
def test_a_contrast_that_is_no_share_is_rejected(contrast):
    with pytest.raises(ValueError, match=f"contrast={contrast} must be from 0 to 1; set .*contrast to 1"):
        compute_score(TASKS_DATA_SOURCE, "=7", "7", {"index": 1}, contrast=contrast)
