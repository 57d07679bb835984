# SPDX-License-Identifier: Apache-2.0
"""Prompt rows chosen by their place in the files, and which problems files hold before a run."""

import json
import logging

import datasets
import pytest
import torch
from omegaconf import OmegaConf

from verl_gradalign.data.identity import problem_identity
from verl_gradalign.integration.prompts import (
    PROBLEM_ID,
    PromptTable,
    ground_truth,
    joined,
    problems_of,
    read_identities,
)

KEY = "gradalign.validation.files"
ASKED = [{"role": "user", "content": "<image>How wide is it?"}]


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


def test_batches_of_a_step_are_sent_as_one_where_they_have_the_same_columns():
    candidates, trusted = table().batch([1, 2], step=3, n=8), table().batch([7], step=3, n=4)
    (whole,) = joined([candidates, trusted])
    assert len(whole) == 3 and whole["global_steps"] == 3
    assert list(whole["__rollout_n__"]) == [8, 8, 4] and list(whole[PROBLEM_ID]) == [1, 2, 7]
    assert list(whole["uid"]) == [*candidates["uid"], *trusted["uid"]]
    assert [messages[0]["content"] for messages in whole["raw_prompt"]] == ["problem 1", "problem 2", "problem 7"]
    labelled = trusted.clone().update({"level": torch.ones(1)})
    assert [len(batch) for batch in joined([candidates, labelled])] == [2, 1]
    assert [len(batch) for batch in joined([candidates])] == [2]


def test_a_problem_without_extra_info_has_empty_labels():
    rows = [{"number": i, "extra_info": None if i == 1 else {"family": "f"}} for i in range(3)]
    prompts = PromptTable(Rows(datasets.Dataset.from_list(rows)))
    prompts.read_labels(["family"])
    assert prompts.values("family") == ["f", "", "f"]


def test_a_truth_that_is_null_is_no_word():
    assert ground_truth({"reward_model": {"ground_truth": None}}) == ground_truth({}) == ""
    assert ground_truth({"reward_model": {"ground_truth": 7}}) == "7"


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def picture(data, path=None):
    return {"prompt": ASKED, "images": [{"bytes": data, "path": path}]}


def identities(*files, **data):
    return read_identities(KEY, files, OmegaConf.create(data))


def test_problems_are_the_same_only_if_their_images_are(tmp_path):
    train = write(tmp_path / "train.parquet", [picture(b"1"), picture(b"2"), {"prompt": ASKED, "images": None}])
    trusted = write(tmp_path / "trusted.parquet", [picture(b"2", "other_name.png"), picture(b"3")])
    of_train, of_trusted = identities(train), identities(trusted)
    assert len(set(of_train)) == 3
    assert [identity in of_train for identity in of_trusted] == [True, False]
    text_alone = write(tmp_path / "text.parquet", [{"prompt": ASKED}])
    assert identities(text_alone) == of_train[2:]


@pytest.mark.parametrize(("column", "key"), [("images", "image_key"), ("videos", "video_key"), ("shots", "image_key")])
def test_the_columns_are_verls_and_paths_count_where_there_are_no_bytes(tmp_path, column, key):
    rows = [{"prompt": ASKED, column: [name]} for name in ("a.png", "b.png", "a.png")]
    of_rows = identities(write(tmp_path / "train.parquet", rows), **{key: column})
    assert of_rows[0] == of_rows[2] != of_rows[1]
    other = identities(
        write(tmp_path / "other.parquet", [{"prompt": ASKED, column: [{"path": "a.png"}]}]), **{key: column}
    )
    assert other == of_rows[:1]


def test_pictures_that_datasets_knows_as_such_are_compared_without_being_decoded(tmp_path):
    features = datasets.Features(
        {"prompt": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
         "images": datasets.Sequence(datasets.Image())}
    )  # fmt: skip
    rows = datasets.Dataset.from_list([picture(b"no picture"), picture(b"none either")], features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    assert len(set(identities(str(tmp_path / "train.parquet")))) == 2


def test_pictures_in_the_parts_of_a_message_count(tmp_path):
    asked = [[{"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "How wide?"}]}]
             for name in ("a.png", "b.png")]  # fmt: skip
    assert problem_identity(asked[0]) != problem_identity(asked[1])
    assert problem_identity(asked[0]).splitlines()[0] == "how wide?"


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("prompt", [None, [], [{"role": "user", "content": None}]])
def test_a_row_without_prompt_is_refused_with_key_file_row_and_remedy(tmp_path, suffix, prompt):
    path = write(tmp_path / f"train.{suffix}", [{"prompt": ASKED}] * 5 + [{"prompt": prompt}])
    with pytest.raises(ValueError) as refused:
        identities(path)
    message = str(refused.value)
    assert message.startswith(f"{KEY}={path}: row 6 has ") and "in its column 'prompt'" in message
    assert message.endswith("Remedy: fill it in or remove the row.")


@pytest.mark.parametrize("name", ["folder", "owner/name", "notes.txt", "other.parquet"])
def test_what_only_a_data_set_class_of_ones_own_can_read_is_left_to_it_in_one_line(tmp_path, caplog, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("1 + 1?\n", encoding="utf-8")
    write(tmp_path / "other.parquet", [{"question": "1 + 1?"}])
    file = name if name == "owner/name" else str(tmp_path / name)
    with pytest.raises(ValueError, match=f"{KEY}="):
        identities(file)
    with caplog.at_level(logging.INFO):
        assert identities(file, custom_cls={"path": "mine.py", "name": "Mine"}) is None
    assert len(caplog.records) == 1 and f"{KEY}={file}: " in caplog.text
    assert "left to data.custom_cls.path=mine.py, and not compared with other files" in caplog.text


def test_a_file_in_verls_schema_is_compared_whatever_class_reads_it(tmp_path):
    path = write(tmp_path / "train.parquet", [{"prompt": ASKED}])
    assert identities(path, custom_cls={"path": "mine.py", "name": "Mine"}) == identities(path)
