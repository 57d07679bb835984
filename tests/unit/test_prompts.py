# SPDX-License-Identifier: Apache-2.0
"""Prompt rows chosen by their place in the files."""

import datasets
import pytest
import torch

from verl_gradalign.integration.prompts import PROBLEM_ID, PromptTable, problems_of


class Rows:
    """As verl's data set: rows of a filtered table, with what its __getitem__ adds."""

    def __init__(self, dataframe):
        self.dataframe = dataframe

    def __getitem__(self, place):
        row = dict(self.dataframe[place])
        return {**row, "raw_prompt": [{"role": "user", "content": row["text"]}], "dummy_tensor": torch.zeros(1)}


def table(num=8, keep=lambda row: row["number"] % 3 != 0):
    rows = [
        {"number": i, "text": f"problem {i}", "data_source": f"s{i % 2}", "extra_info": {"index": 7}}
        for i in range(num)
    ]
    return PromptTable(Rows(datasets.Dataset.from_list(rows).filter(keep)))


def test_a_problem_is_its_row_in_the_files_although_rows_are_filtered_and_indices_repeat():
    prompts = table()
    assert prompts.problem_ids.tolist() == [1, 2, 4, 5, 7] and prompts.num_rows == 8 and len(prompts) == 5
    batch = prompts.batch([7, 2, 7], step=3, n=12)
    assert [messages[0]["content"] for messages in batch["raw_prompt"]] == ["problem 7", "problem 2", "problem 7"]
    assert list(batch[PROBLEM_ID]) == [7, 2, 7] and list(batch["__rollout_n__"]) == [12] * 3
    assert [info["global_steps"] for info in batch["extra_info"]] == [3] * 3
    problems = problems_of(batch, trusted_set="amc")
    assert [(p.problem_id, p.data_source) for p in problems] == [(7, "s1"), (2, "s0"), (7, "s1")]
    assert {p.trusted_set for p in problems} == {"amc"}
    assert len({p.uid for p in problems}) == 3


def test_candidates_belong_to_no_trusted_set():
    assert problems_of(table().batch([1], step=1, n=8))[0].trusted_set is None


def test_a_whole_table_has_every_row():
    assert table(keep=lambda row: True).problem_ids.tolist() == list(range(8))


def test_labels_are_the_problems_own_and_an_unknown_one_is_refused_with_what_there_is():
    prompts = table()
    assert prompts.values("data_source") == ["s1", "s0", "s0", "s1", "s1"]
    prompts.read_labels(["index"])
    assert prompts.label("index", 7) == "7" and prompts.values("index") == ["7"] * 5
    with pytest.raises(ValueError, match=r"gradalign.log.columns=.*'level'.*Remedy: use one of index"):
        prompts.read_labels(["level"])
