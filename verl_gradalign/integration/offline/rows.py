# SPDX-License-Identifier: Apache-2.0
"""Rows of finished groups, out of TransferQueue into the form in which they are stored, and back.

rows = read_rows(batch, problems)
batch, problems = load_rows(rows)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_gradalign.selection.groups import Problem, keys_by_uid, session_of

__all__ = ["PARTITION", "load_rows", "read_rows"]

PARTITION = "train"


def read_rows(batch: KVBatchMeta, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Return the problems' rows of a finished batch as they are stored, problems in order.

    Raises: ValueError for rows that are not plain text.
    """
    by_uid = keys_by_uid(batch.keys)
    owners = {key: problem for problem in problems for key in by_uid.get(problem.uid, ())}
    if not owners:
        return []
    fields = ["prompts", "responses", "response_mask", "rm_scores", "position_ids"]
    data = tq.kv_batch_get(keys=list(owners), partition_id=batch.partition_id, select_fields=fields)
    columns = {name: list(data[name].unbind()) for name in fields}
    rows = []
    for place, (key, problem) in enumerate(owners.items()):
        prompt, response, mask, rewards, positions = (columns[name][place] for name in fields)
        if not torch.equal(positions.cpu(), torch.arange(len(prompt) + len(response))):
            raise ValueError(
                f"problem {problem.problem_id} of {problem.data_source}: its positions are not those of plain text, "
                "and images, videos and sounds are not stored. Remedy: score problems of text only."
            )
        rows.append(
            {
                "trusted_set": problem.trusted_set,
                "problem_id": problem.problem_id,
                "data_source": problem.data_source,
                "session": session_of(key),
                "output": int(key.rsplit("_", 1)[1]),
                "prompt": prompt.tolist(),
                "response": response.tolist(),
                "response_mask": mask.tolist(),
                "rewards": rewards.tolist(),
            }
        )
    return rows


def load_rows(rows: Iterable[Mapping[str, Any]]) -> tuple[KVBatchMeta, list[Problem]]:
    """Put stored rows into TransferQueue as the agent loop does; return their keys, and the problems in order."""
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("prompts", "responses", "response_mask")}
    columns |= {name: [] for name in ("loss_mask", "input_ids", "position_ids", "rm_scores")}
    keys, tags, problems = [], [], {}
    for row in rows:
        name, problem_id = row["trusted_set"], row["problem_id"]
        # Not random, so that nothing that depends on it changes when a scoring is gone on with.
        uid = f"pool:{problem_id}" if name is None else f"trusted:{name}:{problem_id}".replace("_", "-")
        problems[uid] = Problem(uid, problem_id, row["data_source"], name)
        prompt, response = (torch.tensor(row[key], dtype=torch.int64) for key in ("prompt", "response"))
        mask = torch.tensor(row["response_mask"], dtype=torch.int64)
        input_ids = torch.cat([prompt, response])
        values = (prompt, response, mask, mask, input_ids, torch.arange(len(input_ids)), torch.tensor(row["rewards"]))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
        keys.append(f"{uid}_{row['session']}_{row['output']}")
        tags.append({"prompt_len": len(prompt), "response_len": len(response), "seq_len": len(input_ids)})
    fields = {name: torch.nested.as_nested_tensor(parts, layout=torch.jagged) for name, parts in columns.items()}
    tq.kv_batch_put(keys=keys, partition_id=PARTITION, fields=TensorDict(fields, len(keys)), tags=tags)
    return KVBatchMeta(keys=keys, tags=tags, partition_id=PARTITION), list(problems.values())
