# SPDX-License-Identifier: Apache-2.0
"""Features of a pool's problems: their order, their priors, own functions, and the policy's states asked once."""

import itertools

import datasets
import numpy as np
import pytest

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.features import ProblemFeatures
from verl_gradalign.integration.prompts import PromptTable
from verl_gradalign.selection.features import NARROW, WIDE
from verl_gradalign.selection.own_features import OwnFeatures
from verl_gradalign.selection.state_file import load_state, save_state

NUM = 300
NUMBER = itertools.count()


class Rows:
    """As verl's data set: rows of a table, with what its __getitem__ adds."""

    def __init__(self, dataframe):
        self.dataframe = dataframe

    def __getitem__(self, place):
        row = dict(self.dataframe[place])
        return {**row, "raw_prompt": row["prompt"]}


def pool_of(num=NUM, num_sources=3):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"what is {i} + {7 * i}?" if i % 2 else f"reverse the word w{i}x"}],
            "data_source": f"s{i % num_sources}",
            "reward_model": {"ground_truth": str(i)},
            "extra_info": {"level": str(i % 2)},
        }
        for i in range(num)
    ]
    return PromptTable(Rows(datasets.Dataset.from_list(rows)))


class States:
    """Hidden states of a policy that a step moves."""

    def __init__(self, moved=0.0):
        self.asked, self.moved = [], moved

    def __call__(self, chats):
        self.asked.append(len(chats))
        texts = [chat[0]["content"] for chat in chats]
        states = [np.random.default_rng(list(text.encode())).standard_normal(48) for text in texts]
        return (np.stack(states) + self.moved).astype(np.float32)


def features_of(pool, *names, states=None, **forecast):
    config = GradAlignConfig.from_mapping(
        {"schedule": "forecast", "forecast": {"features": list(names), **forecast}, "log": {"columns": ["level"]}}
    )
    return ProblemFeatures(config, pool, states)


def own(tmp_path, code):
    path = tmp_path / f"mine_{next(NUMBER)}.py"
    path.write_text(f"import numpy as np\nimport torch\n\n{code}\n")
    return f"{path}:mine"


def returning(tmp_path, expression):
    return own(tmp_path, f"def mine(row):\n    i = int(row['reward_model']['ground_truth'])\n    return {expression}")


def test_the_order_is_constant_source_prompt_text_own_however_they_are_named(tmp_path):
    pool, shortlist = pool_of(), np.array([3, 200, 10])
    name = returning(tmp_path, "[i, i * i]")
    whole = features_of(pool, name, "text", "prompt", "source", states=States(), num_features=4).of(shortlist, 1)
    assert whole.values_SF.shape == (3, 1 + 3 + 2 + 4 + 4 + 2) and whole.values_SF.dtype == np.float64
    parts = [
        features_of(pool, part, states=States(), num_features=4).of(shortlist, 1)
        for part in ("source", "prompt", "text", name)
    ]
    assert all((part.values_SF[:, 0] == 1).all() for part in parts)
    expected = np.hstack([np.ones((3, 1)), *(part.values_SF[:, 1:] for part in parts)])
    np.testing.assert_array_equal(whole.values_SF, expected)
    narrow = [NARROW / np.sqrt(num) for num in (4, 4, 2) for _ in range(num)]
    np.testing.assert_allclose(whole.prior_F, [WIDE] * 6 + narrow)


def test_sources_are_data_source_and_the_columns_of_the_log():
    values = features_of(pool_of(), "source").of(np.array([0, 1, 5]), 1).values_SF
    assert values.tolist() == [[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 1], [1, 0, 0, 1, 0, 1]]


def test_without_any_feature_there_is_the_constant():
    features = features_of(pool_of()).of(np.array([4, 5]), 1)
    assert features.values_SF.tolist() == [[1], [1]] and features.prior_F.tolist() == [WIDE]


def test_a_pool_of_one_source_causes_no_trouble():
    config = GradAlignConfig.from_mapping({"schedule": "forecast", "forecast": {"features": ["source"]}})
    assert ProblemFeatures(config, pool_of(num_sources=1)).of(np.arange(4), 1).values_SF.shape == (4, 1)


def test_texts_of_one_kind_lie_together():
    pool = pool_of()
    numbers = features_of(pool, "text", num_features=1).of(np.arange(NUM), 1).values_SF[:, 1]
    sums, words = np.sign(numbers[1::2]), np.sign(numbers[0::2])
    assert (sums == sums[0]).mean() > 0.95 and (words == -sums[0]).mean() > 0.95


def test_the_policy_is_asked_once_for_each_problem_and_again_after_the_interval():
    states, shortlist = States(), np.arange(280)
    features = features_of(pool_of(), "prompt", states=states, feature_interval=10)
    first = features.of(shortlist, 1)
    features.of(shortlist, 5)
    assert states.asked == [280]
    features.of(np.arange(270, 290), 6)
    assert states.asked == [280, 10]
    states.moved = 1.0
    moved = features.of(shortlist, 11)
    assert states.asked == [280, 10, 280] and not np.allclose(moved.values_SF, first.values_SF)


def test_a_policy_is_never_asked_anew_without_an_interval():
    states = States()
    features = features_of(pool_of(), "prompt", states=states)
    features.of(np.arange(280), 1)
    features.of(np.arange(280), 10_000)
    assert states.asked == [280]


def test_a_resumed_run_has_the_same_features_although_the_policy_moved(tmp_path):
    pool, names = pool_of(), ("source", "prompt", "text", returning(tmp_path, "i % 7"))
    before = features_of(pool, *names, states=States(), feature_interval=50)
    first = before.of(np.arange(200), 1)
    save_state(tmp_path / "state.npz", {}, {"features": before.state()})
    after = features_of(pool, *names, states=States(moved=3.0), feature_interval=50)
    after.restore(load_state(tmp_path / "state.npz")["features"])
    again = after.of(np.arange(200), 2)
    np.testing.assert_array_equal(again.values_SF, first.values_SF)
    np.testing.assert_array_equal(again.prior_F, first.prior_F)


FORMS = {
    "a number": "i / 2",
    "a whole number": "i",
    "a truth value": "i % 2 == 0",
    "a list": "[i / 2, i % 3]",
    "a tuple": "(i / 2, i % 3)",
    "an array": "np.array([i / 2, i % 3])",
    "an array's number": "np.float32(i)",
    "a tensor": "torch.tensor([i / 2, i % 3], requires_grad=True)",
    "a tensor without axes": "torch.tensor(i / 2)",
    "a list of tensors": "[torch.tensor(i / 2), torch.tensor(1.0)]",
}


@pytest.mark.parametrize("expression", FORMS.values(), ids=FORMS)
def test_a_function_may_give_numbers_in_any_form(tmp_path, expression):
    found = OwnFeatures(returning(tmp_path, expression)).of(3, pool_of().row(3))
    expected = eval(expression, {"i": 3, "np": np, "torch": pytest.importorskip("torch")})  # noqa: S307
    expected = expected.detach().numpy() if hasattr(expected, "detach") else expected
    np.testing.assert_array_equal(found, np.atleast_1d(np.asarray(expected, dtype=np.float64)))


def test_a_function_is_called_with_the_row_of_the_problem(tmp_path):
    code = """def mine(row):
    assert row["prompt"] == row["raw_prompt"] and row["extra_info"]["level"] in "01"
    length = len(row["prompt"][0]["content"])
    return [int(row["data_source"][1:]), length, float(row["reward_model"]["ground_truth"])]"""
    found = OwnFeatures(own(tmp_path, code)).of(8, pool_of().row(8))
    assert found.tolist() == [2, len("reverse the word w8x"), 8]


REFUSED = {
    "text": ("'hard'", r"gave a str \('hard'\) of problem 0 .*no list of numbers"),
    "a list of text": ("['hard']", r"of problem 0 .*item 0 is 'hard'"),
    "nothing": ("None", r"gave a NoneType \(None\) of problem 0 "),
    "a hole": ("[1.0, None]", r"item 1 is None"),
    "no numbers": ("[]", r"gave shape \(0,\)"),
    "a table": ("[[1.0, 2.0]]", r"gave shape \(1, 2\)"),
    "a complex number": ("1j", r"complex"),
    "a dictionary": ("{'level': 1}", r"no list of numbers"),
    "nan": ("float('nan')", r"gave nan of problem 0 "),
    "an infinite number of the second": ("[1.0, 1 / (1 - i) if i != 1 else float('inf')]", r"gave inf of problem 1 "),
    "another number of the third": ("[1.0] * (1 + (i == 2))", r"gave 2 numbers of problem 2 .*and 1 of the first"),
    "an exception": ("1 / i", r"raised ZeroDivisionError: .*of problem 0 .*called with the row alone"),
}


@pytest.mark.parametrize(("expression", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_feature_is_refused_before_the_run(tmp_path, expression, said):
    name = returning(tmp_path, expression)
    with pytest.raises(ValueError, match=said) as refused:
        features_of(pool_of(), name)
    assert str(refused.value).startswith(f"gradalign.forecast.features={name!r}: ")
    assert "Remedy: " in str(refused.value)


def test_a_function_that_fails_later_names_the_problem(tmp_path):
    features = features_of(pool_of(), returning(tmp_path, "i if i < 50 else float('nan')"))
    with pytest.raises(ValueError, match=r"forecast.features=.*gave nan of problem \d+ .*Remedy: "):
        features.of(np.array([5, 60]), 1)


def test_a_function_that_is_not_there_is_refused(tmp_path):
    for name, said in (
        ("no_such_module:mine", "cannot be loaded"),
        (own(tmp_path, "mine = 7"), r"names a int \(7\), no function"),
        (own(tmp_path, "def other(row): return 1"), "name of a function in it"),
        (own(tmp_path, "def mine(row, more): return 1"), "raised TypeError"),
    ):
        with pytest.raises(ValueError, match=rf"gradalign.forecast.features=.*{said}"):
            features_of(pool_of(), name)


def test_a_column_that_no_problem_has_is_refused():
    config = GradAlignConfig.from_mapping({"schedule": "forecast", "log": {"columns": ["topic"]}})
    with pytest.raises(ValueError, match=r"gradalign.log.columns=\['topic'\].*Remedy: use one of level"):
        ProblemFeatures(config, pool_of(), States())
