# SPDX-License-Identifier: Apache-2.0
"""What the batched rollout is given and what it puts, column by column."""

import numpy as np
import torch
from tensordict import NonTensorData
from verl.utils.tensordict_utils import get_tensordict, list_of_dict_to_tensordict

from verl_gradalign.cpu.batched_rollout import _columns, _rows


def test_rows_are_the_batchs_rows_whatever_kind_their_columns_are_of():
    prompts = [[{"role": "user", "content": text}] for text in ("a", "b", "a")]
    columns = {
        "raw_prompt": np.array(prompts, dtype=object),
        "uid": np.array(["x", "y", "z"], dtype=object),
        "__rollout_n__": np.array([8, 4, 8]),
        "extra_info": [{"index": i, "answers": [i, [i]]} for i in range(3)],
        "index": torch.arange(3),
    }
    batch = get_tensordict(columns, {"validate": True, "global_steps": 7})
    rows = _rows(batch)
    assert len(rows) == 3
    for place, row in enumerate(rows):
        assert set(row) == {*columns, "validate", "global_steps"}
        assert row["raw_prompt"] == prompts[place] and row["uid"] == "xyz"[place]
        assert row["extra_info"] == columns["extra_info"][place] and row["index"] == place
        assert int(row["__rollout_n__"]) == columns["__rollout_n__"][place]
        assert row["validate"] is True and row["global_steps"] == 7


def test_columns_are_verls_of_the_same_rows_and_equal_values_share_one_wrapper():
    info = {"index": 1, "nested": [1, {"a": None}]}
    same = {"extra_info": info, "n": 1, "is": True, "none": None}
    rows = [{"input_ids": torch.arange(2 + i), "reward": {"score": 1.0}, **same} for i in range(3)]
    rows[1] |= {"reward": {"score": 1}, "n": True, "extra_info": dict(info)}
    ours, theirs = _columns(rows), list_of_dict_to_tensordict(rows)
    assert set(ours.keys()) == set(theirs.keys()) and ours.batch_size == theirs.batch_size
    for name in ("extra_info", "reward", "n", "is", "none"):
        one, other = ours.get(name).tolist(), theirs.get(name).tolist()
        assert one == other and list(map(type, one)) == list(map(type, other)), name
    # 1.0 and 1, and 1 and True, are equal and not the same.
    assert [type(of["score"]) for of in ours.get("reward").tolist()] == [float, int, float]
    assert all(torch.equal(a, b) for a, b in zip(ours["input_ids"].unbind(), theirs["input_ids"].unbind(), strict=True))
    wrappers = ours.get("extra_info").tensordicts
    assert isinstance(wrappers[0], NonTensorData) and wrappers[0] is wrappers[2]
