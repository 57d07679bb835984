# SPDX-License-Identifier: Apache-2.0
"""Finished rollouts of two problems, with TransferQueue replaced by one table."""

import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_gradalign.integration import reading
from verl_gradalign.selection.groups import Problem

PROBLEMS = [Problem("a", 0, "tasks"), Problem("b", 1, "tasks")]
KEYS = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
BATCH = KVBatchMeta(keys=KEYS, tags=[{"seq_len": 5, "response_len": 2}] * 4, partition_id="train")


def nested(rows):
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


def shelved(monkeypatch):
    """Group a has rewards 1 and 0, group b 1 and 1; returns the rows, and what is put back."""
    table = {
        "rm_scores": nested([[0.0, 1.0], [0.0, 0.0, 0.0], [1.0], [0.0, 1.0]]),
        "response_mask": nested([[1, 1], [1, 1, 1], [1], [1, 1]]),
        "input_ids": nested([[5, 6, 7], [5, 6, 7, 8], [5, 6], [5, 6, 7]]),
    }
    shelf = Shelf({name: dict(zip(KEYS, column.unbind(), strict=True)) for name, column in table.items()})
    monkeypatch.setattr(reading.tq, "kv_batch_get", shelf.get)
    monkeypatch.setattr(reading.tq, "kv_batch_put", shelf.put)
    return shelf


class Shelf:
    """Rows by column and key. Like TransferQueue it leaves a column out that one of the rows lacks."""

    def __init__(self, columns):
        self.columns, self.stored, self.num_read = columns, [], 0

    def get(self, keys, partition_id, select_fields):
        self.num_read += 1
        found = {name: self.columns[name] for name in select_fields if set(keys) <= set(self.columns.get(name, ()))}
        parts = {name: [column[key] for key in keys] for name, column in found.items()}
        table = {name: torch.nested.as_nested_tensor(part, layout=torch.jagged) for name, part in parts.items()}
        return TensorDict(table, batch_size=len(keys))

    def put(self, **call):
        self.stored.append(call)


def verl_config(adv_estimator):
    return OmegaConf.create(
        {
            "algorithm": {"adv_estimator": adv_estimator, "gamma": 1.0, "lam": 1.0},
            "actor_rollout_ref": {
                "rollout": {"n": 2, "calculate_log_probs": True},
                "actor": {"loss_agg_mode": "token-mean"},
            },
            "data": {"max_response_length": 8},
        }
    )
