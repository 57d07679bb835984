# SPDX-License-Identifier: Apache-2.0
"""Prompt rows for verl's agent loop, chosen by their place in the train files or in a trusted set.

Rows are read when they are asked for, in the trainer's process: nothing is prefetched past a decision.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from verl_gradalign.selection.groups import Problem

PROBLEM_ID = "gradalign_problem_id"
MAX_LABEL_CHARS = 200
UNKNOWN_SOURCE = "unknown"


class PromptTable:
    """The problems of a verl data set, by their row in the concatenated files.

    That row identifies a problem whatever stands in extra_info.index, which may be missing or repeated; filtered rows
    (over-long prompts) are absent.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.problem_ids = np.asarray(rows_in_files(dataset.dataframe), dtype=np.int64)
        self._labels: dict[str, list[str]] = {}
        self._place_of = {int(problem_id): place for place, problem_id in enumerate(self.problem_ids)}

    def __len__(self) -> int:
        return len(self.problem_ids)

    @property
    def num_rows(self) -> int:
        """Rows of the files, as far as they are known: one more than the largest problem id."""
        return int(self.problem_ids.max()) + 1 if len(self) else 0

    def text(self, problem_id: int) -> tuple[str, str]:
        """Return a problem's prompt, all messages, and the ground truth of its reward, if it has one."""
        row = self._dataset[self._place_of[problem_id]]
        return prompt_text(row["raw_prompt"]), ground_truth(row)

    def read_labels(self, columns: Sequence[str]) -> None:
        """Read the columns of extra_info that `label` is asked for.

        Raises: ValueError if no problem has such a key.
        """
        frame = self._dataset.dataframe
        infos = frame["extra_info"] if columns and "extra_info" in frame.column_names else []
        for column in columns:
            values = [info.get(column) for info in infos]
            if all(value is None for value in values):
                known = sorted({key for info in list(infos)[:100] for key in info})
                raise ValueError(
                    f"gradalign.log.columns={list(columns)}: no problem of data.train_files has {column!r} in its "
                    f"extra_info. Remedy: use one of {', '.join(known) or '(there are none)'}."
                )
            self._labels[column] = [str(value)[:MAX_LABEL_CHARS] for value in values]

    def values(self, column: str) -> list[str]:
        """Return every problem's data_source, or value of a column that was read."""
        if column != "data_source":
            return self._labels[column]
        frame = self._dataset.dataframe
        return [str(v) for v in frame[column]] if column in frame.column_names else [UNKNOWN_SOURCE] * len(self)

    def label(self, column: str, problem_id: int) -> str:
        """Return the problem's value of a column that was read, as text."""
        return self._labels[column][self._place_of[problem_id]]

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


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return all messages of a prompt."""
    return prompt if isinstance(prompt, str) else "\n\n".join(str(message.get("content")) for message in prompt)


def ground_truth(row: Mapping[str, Any]) -> str:
    """Return what a row's reward is computed with, as text; empty if it has none."""
    return str((row.get("reward_model") or {}).get("ground_truth", ""))


def rows_in_files(dataframe: Any) -> list[int]:
    """Return the position of each row of a filtered `datasets.Dataset` in the concatenated files."""
    indices = dataframe._indices  # how datasets remembers a filter or a selection; None: all rows, in order
    return list(range(len(dataframe))) if indices is None else indices.column(0).to_pylist()


def problems_of(batch: TensorDict, trusted_set: str | None = None) -> list[Problem]:
    """Return the problems of a prompt batch, in order."""
    sources = batch["data_source"] if "data_source" in batch.keys() else [UNKNOWN_SOURCE] * len(batch)
    return [
        Problem(uid=str(uid), problem_id=int(problem_id), data_source=str(source), trusted_set=trusted_set)
        for uid, problem_id, source in zip(batch["uid"], batch[PROBLEM_ID], sources, strict=True)
    ]
