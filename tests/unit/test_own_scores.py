# SPDX-License-Identifier: Apache-2.0
"""A user's own score: what is taken of it, what is refused before the run, and what it cannot change."""

import dataclasses
import itertools
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.config import GradAlignConfig, ScoreOptions
from verl_gradalign.selection.chooser import Chooser
from verl_gradalign.selection.own_scores import first_of, held_to_form, made_up, one_number_each
from verl_gradalign.selection.reliability import half_of
from verl_gradalign.selection.scores import Score, score_of
from verl_gradalign.types import Measurements

OPTIONS = ScoreOptions()
MEASURED = made_up(True, True, True)
NUMBER = itertools.count()


def own(tmp_path, code: str, attribute: str = "mine"):
    """Return the name of a score in a new file: names of files that were loaded are remembered."""
    path = tmp_path / f"mine_{next(NUMBER)}.py"
    path.write_text(f"import numpy as np\nimport torch\nfrom verl_gradalign import Score\n{code}\n")
    return f"{path}:{attribute}"


def returning(tmp_path, expression: str) -> str:
    return own(tmp_path, f"def mine(m):\n    return {expression}")


TAKEN = {
    "a tensor": "m.cosine_P",
    "a tensor of whole numbers": "(100 * m.cosine_P).long()",
    "a tensor in half precision": "m.cosine_P.half()",
    "truth values": "m.cosine_P > 0.2",
    "a tensor with a graph": "m.cosine_P.clone().requires_grad_() * 2",
    "an array": "m.cosine_P.numpy()",
    "an array of whole numbers": "(100 * m.cosine_P).long().numpy()",
    "a list": "m.cosine_P.tolist()",
    "a list of tensors": "list(m.cosine_P)",
    "a list of arrays of no axes": "list(m.cosine_P.numpy())",
    "a tuple": "tuple(m.cosine_P.tolist())",
    "nan for some": "torch.where(m.problem_id_P > 1, m.cosine_P, torch.nan)",
}


@pytest.mark.parametrize("expression", TAKEN.values(), ids=TAKEN.keys())
def test_one_number_per_problem_is_taken_in_any_form(tmp_path, expression):
    score_P = score_of(returning(tmp_path, expression)).rank(MEASURED, OPTIONS)
    expected = [float(value) for value in eval(expression, {"m": MEASURED, "torch": torch})]  # noqa: S307
    assert score_P.dtype == torch.float64 and not score_P.requires_grad
    np.testing.assert_array_equal(score_P.numpy(), expected)


REFUSED = {
    "a tensor without axes": ("m.cosine_P.mean()", r"shape \(\) for 5 problems, not \(5,\)"),
    "a number": ("float(m.cosine_P.mean())", "returned a float"),
    "a column": ("m.cosine_P.unsqueeze(1)", r"shape \(5, 1\).*flatten"),
    "a row": ("m.cosine_P.unsqueeze(0)", r"shape \(1, 5\).*flatten"),
    "a column of lists": ("[[x] for x in m.cosine_P.tolist()]", r"shape \(5, 1\)"),
    "one number per response": ("m.advantage_PR", r"shape \(5, 4\)"),
    "one number per place": ("m.success_PR.mean(dim=0)", r"shape \(4,\)"),
    "one too few": ("m.cosine_P[1:]", r"shape \(4,\)"),
    "only the finite ones": ("[x for x in m.cosine_P.tolist() if x > 0.4]", r"shape \(\d,\)"),
    "complex numbers": ("torch.complex(m.cosine_P, m.norm_P)", "complex"),
    "complex numbers in a list": ("[1j] * 5", "complex"),
    "objects": ("[object()] * 5", "item 0 is <object"),
    "an array of objects": ("np.array([None, 1, 2, 3, 4], dtype=object)", "item 0 is None"),
    "text": ("'cosine'", r"a str \('cosine'\)"),
    "a list of text": ("['0.5'] * 5", "item 0 is '0.5'"),
    "a list with a hole": ("[0.1, None, 0.2, 0.3, 0.4]", "item 1 is None"),
    "uneven lists": ("[[1.0], [1.0, 2.0], [], [], []]", "no array of numbers"),
    "nothing": ("None", "returned a NoneType"),
    "a generator": ("(x for x in m.cosine_P.tolist())", "generator.*make a list of it"),
    "a dictionary": ("dict(enumerate(m.cosine_P.tolist()))", "returned a dict"),
    "a function": ("torch.mean", "returned a builtin_function_or_method"),
}


@pytest.mark.parametrize(("expression", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_anything_else_is_refused_before_the_run_with_the_key_and_what_to_return(tmp_path, expression, words):
    name = returning(tmp_path, expression)
    with pytest.raises(ValueError, match=words) as refusal:
        score_of(name)
    text = str(refusal.value)
    assert f"gradalign.score={name!r}" in text and "return one number for each problem" in text


@given(shape=st.lists(st.integers(0, 4), max_size=3).map(tuple), num_problems=st.integers(0, 4))
def test_no_shape_but_that_of_the_problems_is_broadcast(shape, num_problems):
    values = torch.arange(math.prod(shape)).double().view(shape)
    if shape == (num_problems,):
        assert torch.equal(one_number_each("mine", values, num_problems), values)
        return
    for form in (values, values.numpy()):
        with pytest.raises(ValueError, match=r"gradalign\.score='mine': returned shape"):
            one_number_each("mine", form, num_problems)


@settings(deadline=None)
@given(values=st.lists(st.one_of(st.floats(), st.booleans(), st.integers(-(2**40), 2**40)), min_size=1, max_size=5))
def test_numbers_arrive_as_they_are_also_those_that_are_not_finite(values):
    expected = np.array([float(value) for value in values])
    np.testing.assert_array_equal(one_number_each("mine", values, len(values)).numpy(), expected)


def test_a_score_that_fails_on_one_candidate_left_alone_is_refused_too(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(\) for 1 problems"):
        score_of(returning(tmp_path, "(m.advantage_PR.square() @ torch.ones(4, 1).double()).squeeze()"))


def test_a_score_is_not_called_without_problems(tmp_path):
    score = score_of(returning(tmp_path, "m.cosine_P / m.cosine_P.max()"))
    nobody = dataclasses.replace(MEASURED, problem_id_P=MEASURED.problem_id_P[:0])
    assert score.rank(nobody, OPTIONS).shape == (0,)


SIGNATURES = {
    "options without a Score": ("def mine(m, options):\n    return m.dot_P", "called with 1 argument"),
    "nothing": ("def mine():\n    return []", "called with 1 argument"),
    "a Score without options": (
        "mine = Score(lambda m: m.dot_P, 'trusted')",
        "called with 2 arguments",
    ),
    "a keyword only": ("def mine(*, m):\n    return m.dot_P", "called with 1 argument"),
    "a Score of a number": ("mine = Score(3)", "Score of no function"),
    "a number": ("mine = 3", "is a int"),
}


@pytest.mark.parametrize(("code", "words"), SIGNATURES.values(), ids=SIGNATURES.keys())
def test_a_function_of_other_arguments_is_refused_by_its_signature(tmp_path, code, words):
    with pytest.raises(ValueError, match=rf"gradalign\.score=.*{words}.*Remedy"):
        score_of(own(tmp_path, code))


def test_optional_arguments_and_what_has_no_signature_do_no_harm(tmp_path):
    assert score_of(own(tmp_path, "def mine(m, weight=2.0):\n    return weight * m.dot_P")).rank is not None
    code = "class Mine:\n    def __call__(self, m):\n        return m.dot_P\nmine = Mine()"
    assert score_of(own(tmp_path, code)).rank is not None


def test_what_a_score_raises_is_said_with_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"gradalign\.score=.*AttributeError: .*cosine'.*5 problems") as refusal:
        score_of(returning(tmp_path, "m.cosine"))
    assert isinstance(refusal.value.__cause__, AttributeError)
    name = own(tmp_path, "def mine(m):\n    assert m.num_candidates != 7\n    return m.dot_P")
    with pytest.raises(ValueError, match=rf"gradalign\.score={name!r}: raised AssertionError"):
        score_of(name).rank(dataclasses.replace(MEASURED, num_candidates=7), OPTIONS)


def test_a_table_that_lacks_the_made_up_problems_is_warned_of_alone(tmp_path, caplog):
    name = own(tmp_path, "table = {70: 1.0}\ndef mine(m):\n    return [table[i] for i in m.problem_id_P.tolist()]")
    with caplog.at_level(logging.WARNING):
        score = score_of(name)
    assert "KeyError" in caplog.text
    real = dataclasses.replace(first_of(MEASURED), problem_id_P=torch.tensor([70]))
    assert score.rank(real, OPTIONS).tolist() == [1.0]


def test_a_score_that_uses_what_it_does_not_ask_for_is_refused(tmp_path):
    for rank, asked in (("m.cosine_P", "direction='trusted'"), ("m.derivative_PR.nanmean(1)", "'trusted', True")):
        with pytest.raises(ValueError, match="uses what it does not ask for.*needs_response_derivatives=True"):
            score_of(own(tmp_path, f"mine = Score(lambda m, options: {rank}, {asked})"))
    assert score_of(own(tmp_path, "mine = Score(lambda m, options: m.success_rate_P)")).rank is not None


def test_a_direction_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Score\(direction='trustd'\): unknown.*'trusted'"):
        score_of(own(tmp_path, "mine = Score(lambda m, options: m.dot_P, 'trustd')"))


def test_a_score_without_a_ranking_draws_at_random(tmp_path):
    assert score_of(own(tmp_path, "mine = Score(None)")).rank is None


def test_what_a_score_changes_in_place_changes_nothing_else(tmp_path):
    code = "kept = []\ndef mine(m):\n    kept.append(m.dot_P)\n    return m.dot_P.mul_(m.success_PR.zero_()[:, 0] - 1)"
    before = {f.name: getattr(MEASURED, f.name) for f in dataclasses.fields(MEASURED)}
    copies = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    rank = score_of(own(tmp_path, code)).rank
    first_P, second_P = rank(MEASURED, OPTIONS), rank(MEASURED, OPTIONS)
    assert torch.equal(first_P, -MEASURED.dot_P) and torch.equal(first_P, second_P)
    for name, copy in copies.items():
        torch.testing.assert_close(before[name], copy, rtol=0, atol=0, equal_nan=True)


def test_what_a_score_returned_is_its_callers_own():
    kept = torch.arange(5).double()
    score_P = held_to_form("mine", lambda m, _: kept)(MEASURED, OPTIONS)
    kept.zero_()
    assert score_P.tolist() == [0, 1, 2, 3, 4]


def test_the_halves_of_the_measurements_are_scored_by_the_same_rules(tmp_path):
    score = score_of(returning(tmp_path, "m.cosine_P.tolist()"))
    half = half_of(MEASURED, 0)
    torch.testing.assert_close(score.rank(half, OPTIONS), half.cosine_P)


def test_a_configuration_with_such_a_score_fails_before_anything_else(tmp_path):
    config = GradAlignConfig(score=returning(tmp_path, "m.cosine_P.mean()"))
    with pytest.raises(ValueError, match="one number for each problem"):
        Chooser(config, num_problems=10)


def test_made_up_measurements_have_what_a_score_asks_for():
    assert isinstance(MEASURED, Measurements)
    assert MEASURED.cosine_P.isfinite().all() and MEASURED.contribution_PR.isfinite().all()
    bare = made_up(False, False, False)
    assert bare.dot_P.isnan().all() and bare.norm_P.isnan().all() and bare.success_rate_P.isfinite().all()
    assert Score(None).rank is None
