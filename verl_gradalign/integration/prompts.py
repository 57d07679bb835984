# SPDX-License-Identifier: Apache-2.0
"""Prompt rows for verl's agent loop, chosen by their place in the train files or in a trusted set.

Rows are read when they are asked for, in the trainer's process: nothing is prefetched past a decision. Before the run,
files are read once to see which problems they hold (`read_identities`).
"""

import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from verl_gradalign.data.identity import MEDIA_KEYS, ROWS_READ_TOGETHER, problem_identity
from verl_gradalign.errors import refuse
from verl_gradalign.integration.prompt_texts import is_plain_text, prompt_texts
from verl_gradalign.selection.groups import Problem

logger = logging.getLogger(__name__)

PROBLEM_ID = "gradalign_problem_id"
STEP = "global_steps"
"""verl's name of the step in a prompt batch: one for all its rows."""
MAX_LABEL_CHARS = 200
UNKNOWN_SOURCE = "unknown"
# verl's columns of what a prompt shows besides text, each with the column's name where none is configured.
KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}


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

    def row(self, problem_id: int) -> dict[str, Any]:
        """Return a problem as verl's data set gives it: raw_prompt, data_source, extra_info, reward_model, ..."""
        row: dict[str, Any] = self._dataset[self._place_of[problem_id]]
        return row

    def text(self, problem_id: int) -> tuple[str, str]:
        """Return a problem's prompt, all messages, and the ground truth of its reward, if it has one."""
        row = self.row(problem_id)
        return prompt_text(row["raw_prompt"]), ground_truth(row)

    def read_labels(self, columns: Sequence[str]) -> None:
        """Read the columns of extra_info that `label` is asked for, unless they were read.

        Raises: ValueError if no problem has such a key.
        """
        frame = self._dataset.dataframe
        unread = [column for column in columns if column not in self._labels]
        infos = [info or {} for info in frame["extra_info"]] if unread and "extra_info" in frame.column_names else []
        for column in unread:
            values = [info.get(column) for info in infos]
            if all(value is None for value in values):
                known = sorted({key for info in infos[:100] for key in info})
                raise ValueError(
                    f"gradalign.log.columns={list(columns)}: no problem of data.train_files has {column!r} in its "
                    f"extra_info. Remedy: use one of {', '.join(known) or '(there are none)'}."
                )
            self._labels[column] = ["" if value is None else str(value)[:MAX_LABEL_CHARS] for value in values]

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
        rows = [self.row(problem_id) for problem_id in problem_ids]
        for row in rows:
            row["extra_info"] = {**row["extra_info"], "global_steps": step}
        columns = collate_fn(rows)
        columns["uid"] = np.array([str(uuid.uuid4()) for _ in rows], dtype=object)
        columns[PROBLEM_ID] = np.asarray(problem_ids, dtype=np.int64)
        columns["__rollout_n__"] = np.array([int(n)] * len(rows), dtype=object)
        batch = tu.get_tensordict(columns)
        tu.assign_non_tensor_data(batch, STEP, step)
        return batch


def prompt_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Return all messages of a prompt."""
    return prompt if isinstance(prompt, str) else "\n\n".join(str(message.get("content")) for message in prompt)


def ground_truth(row: Mapping[str, Any]) -> str:
    """Return what a row's reward is computed with, as text; empty if it has none."""
    truth = (row.get("reward_model") or {}).get("ground_truth")
    return "" if truth is None else str(truth)


def read_identities(key: str, files: Iterable[str], data: DictConfig) -> list[str] | None:
    """Return by what the problems of data files are compared (see `problem_identity`), in the order of their rows.

    None, with a line of log, if `data.custom_cls.path` names a data set class and a file is not one that verl's own
    class reads: a folder, a hub id, another format, other columns. What it holds, that class alone knows.
    Raises: ValueError naming the key, the file, the row where there is one, and the remedy.
    """
    identities: list[str] = []
    own_class = OmegaConf.select(data, "custom_cls.path")
    for name in map(str, files):
        try:
            identities.extend(_identities_of_file(key, name, data))
        except ValueError as error:
            if not own_class:
                raise
            reason = str(error).partition(" Remedy:")[0]
            logger.info("%s; left to data.custom_cls.path=%s, and not compared with other files", reason, own_class)
            return None
    return identities


def _identities_of_file(key: str, name: str, data: DictConfig) -> Iterator[str]:
    path, prompt_key = Path(name).expanduser(), data.get("prompt_key", "prompt")
    kind = KINDS.get(path.suffix)
    if kind is None:
        refuse(key, name, "neither parquet, json nor jsonl", "convert it to verl's schema in one of these formats")
    is_remote = "://" in name
    if not is_remote and not path.is_file():
        refuse(key, name, "no such file", "give the path of an existing file")
    try:
        rows = datasets.load_dataset(kind, data_files=name if is_remote else str(path), split="train")
    except Exception as error:
        raise ValueError(
            f"{key}={name}: cannot be read ({type(error).__name__}: {error}). "
            f"Remedy: write it again as {kind}, with at least one row."
        ) from error
    if prompt_key not in rows.column_names:
        why = f"has no column {prompt_key!r} (data.prompt_key)"
        refuse(key, name, why, "add the column or set data.prompt_key")
    media_keys = [data.get(media, column) for media, column in MEDIA_KEYS.items()]
    shown = [media for media in media_keys if media in rows.column_names]
    try:
        yield from _identities(rows, prompt_key, media_keys, shown)
    except ValueError as error:
        refuse(key, name, f"{error} in its column {prompt_key!r}", "fill it in or remove the row")


def _identities(
    rows: datasets.Dataset, prompt_key: str, media_keys: Sequence[str], shown: Sequence[str]
) -> Iterator[str]:
    """Yield each row's identity. Raises: ValueError that names the row, from 1 on."""
    if not shown and is_plain_text(rows, prompt_key):
        for number, text in enumerate(prompt_texts(rows, prompt_key), start=1):
            if not text:
                raise ValueError(f"row {number} has no prompt")
            yield text
        return
    # As Arrow has them: datasets would decode every picture.
    batches = rows.select_columns([prompt_key, *shown]).with_format("arrow").iter(ROWS_READ_TOGETHER)
    values = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(values, start=1):
        try:
            yield problem_identity(row[prompt_key], [row.get(media) for media in media_keys])
        except ValueError as error:
            raise ValueError(f"row {number} has {error}") from error


def rows_in_files(dataframe: Any) -> list[int]:
    """Return the position of each row of a filtered `datasets.Dataset` in the concatenated files."""
    indices = dataframe._indices  # how datasets remembers a filter or a selection; None: all rows, in order
    return list(range(len(dataframe))) if indices is None else indices.column(0).to_pylist()


def joined(batches: Sequence[TensorDict]) -> list[TensorDict]:
    """Return the prompt batches of one step as a single one where they have the same columns, else as they are.

    One is dealt to the agent loops evenly, and an engine that answers batch by batch answers all at once.
    """
    first, *others = batches
    if not others or any(_layout(other) != _layout(first) for other in others):
        return list(batches)
    step, rows = first[STEP], [batch.exclude(STEP) for batch in batches]
    whole = tu.concat_tensordict(rows)
    tu.assign_non_tensor_data(whole, STEP, step)
    return [whole]


def _layout(batch: TensorDict) -> dict[str, Any]:
    """Return the batch's columns, with what must be equal for tensors of two batches to be put together."""
    return {name: (v.dtype, v.shape[1:]) if isinstance(v, Tensor) else None for name, v in batch.items()}


def problems_of(batch: TensorDict, trusted_set: str | None = None) -> list[Problem]:
    """Return the problems of a prompt batch, in order."""
    sources = batch["data_source"] if "data_source" in batch.keys() else [UNKNOWN_SOURCE] * len(batch)
    return [
        Problem(uid=str(uid), problem_id=int(problem_id), data_source=str(source), trusted_set=trusted_set)
        for uid, problem_id, source in zip(batch["uid"], batch[PROBLEM_ID], sources, strict=True)
    ]
