# SPDX-License-Identifier: Apache-2.0
"""Prompt rows for verl's agent loop, chosen by their place in the train files or in a trusted set.

Rows are read when they are asked for, in the trainer's process: nothing is prefetched past a decision.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from verl_gradalign.integration.groups import Problem

PROBLEM_ID = "gradalign_problem_id"


class PromptTable:
    """The problems of a verl data set, by their row in the concatenated files.

    That row identifies a problem whatever stands in extra_info.index, which may be missing or repeated; filtered rows
    (over-long prompts) are absent.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.problem_ids = np.asarray(rows_in_files(dataset.dataframe), dtype=np.int64)
        self._place_of = {int(problem_id): place for place, problem_id in enumerate(self.problem_ids)}

    def __len__(self) -> int:
        return len(self.problem_ids)

    @property
    def num_rows(self) -> int:
        """Rows of the files, as far as they are known: one more than the largest problem id."""
        return int(self.problem_ids.max()) + 1 if len(self) else 0

    def batch(self, problem_ids: Sequence[int], step: int, n: int) -> TensorDict:
        """Return the prompt rows of the problems, each to be answered `n` times.

        Every prompt says how often: of prompts in flight that verl sends out again after a restart, it reads only the
        columns that all of them have. The step is put into extra_info, so that a reward that draws at random can
        repeat its draws in a resumed run.
        """
        rows = [self._dataset[self._place_of[problem_id]] for problem_id in problem_ids]
        for row in rows:
            row["extra_info"] = {**row["extra_info"], "global_steps": step}
        columns = collate_fn(rows)
        columns["uid"] = np.array([str(uuid.uuid4()) for _ in rows], dtype=object)
        columns[PROBLEM_ID] = np.asarray(problem_ids, dtype=np.int64)
        columns["__rollout_n__"] = np.array([int(n)] * len(rows), dtype=object)
        batch = tu.get_tensordict(columns)
        tu.assign_non_tensor_data(batch, "global_steps", step)
        return batch


def rows_in_files(dataframe: Any) -> list[int]:
    """Return the position of each row of a filtered `datasets.Dataset` in the concatenated files."""
    indices = dataframe._indices  # how datasets remembers a filter or a selection; None: all rows, in order
    return list(range(len(dataframe))) if indices is None else indices.column(0).to_pylist()


def problems_of(batch: TensorDict, trusted_set: str | None = None) -> list[Problem]:
    """Return the problems of a prompt batch, in order."""
    sources = batch["data_source"] if "data_source" in batch.keys() else ["unknown"] * len(batch)
    return [
        Problem(uid=str(uid), problem_id=int(problem_id), data_source=str(source), trusted_set=trusted_set)
        for uid, problem_id, source in zip(batch["uid"], batch[PROBLEM_ID], sources, strict=True)
    ]
