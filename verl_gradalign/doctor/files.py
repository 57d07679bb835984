# SPDX-License-Identifier: Apache-2.0
"""Data files as verl reads them: all files of a key together, column by column, with the row that is at fault.

    frame = read_frame("train files", "data.train_files", files, verl_config, findings)
    if frame is not None:
        examine_columns(frame, verl_config, findings)

Columns are looked at as Arrow holds them, so that millions of rows take seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from verl.utils.dataset.rl_dataset import get_dataset_class

from verl_gradalign.doctor.named import AGENT_FILE, known_agent_loops
from verl_gradalign.findings import Findings
from verl_gradalign.integration.prompt_texts import prompt_texts
from verl_gradalign.integration.prompts import PROBLEM_ID

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
MESSAGES = "[{'role': 'user', 'content': '...'}]"
MEDIA = (("image_key", "images"), ("video_key", "videos"), ("audio_key", "audios"))
REPEATS_WORTH_A_WARNING = 0.01
"""Share of the rows that repeat another."""


@dataclass(frozen=True)
class Frame:
    """The rows of a key's files, one file after another."""

    area: str
    key: str
    table: Any
    """datasets.Dataset of all rows."""
    files: tuple[tuple[str, int], ...]
    """Name and number of rows of each."""
    taken: np.ndarray
    """int64, positions of the rows that verl takes of them (data.train_max_samples)."""

    def __len__(self) -> int:
        return len(self.taken)

    @property
    def columns(self) -> list[str]:
        return list(self.table.column_names)

    def row(self, position: int) -> dict[str, Any]:
        values: dict[str, Any] = self.table[int(position)]
        return values

    def place(self, position: int) -> str:
        """Return where a row stands: key, file and its number in the file, from 1 on."""
        for name, num in self.files:
            if position < num:
                return f"{self.key}={name}, row {position + 1}"
            position -= num
        return f"{self.key}, row {position + 1}"

    def chunks(self, column: str) -> Iterator[pa.Array]:
        """Yield the Arrow arrays of a column, in order."""
        yield from self.table.data.column(column).chunks

    def is_taken(self) -> np.ndarray:
        """Return bool, whether each row of the files is taken."""
        mask = np.zeros(len(self.table), dtype=bool)
        mask[self.taken] = True
        return mask

    def report(self, is_bad: np.ndarray, what: str, remedy: str, findings: Findings, level: str = "error") -> None:
        """Add a finding that names the first of the taken rows that are bad, if one is."""
        bad = np.flatnonzero(is_bad & self.is_taken())
        if len(bad):
            others = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
            findings.add(self.area, level, f"{self.place(int(bad[0]))}: {what}{others}", remedy)


def has_own_class(verl_config: DictConfig) -> bool:
    """Return whether the data are read by a class of the user's."""
    return bool(OmegaConf.select(verl_config, "data.custom_cls.path"))


def read_frame(
    area: str, key: str, files: Any, verl_config: DictConfig, findings: Findings, max_samples: int | None = None
) -> Frame | None:
    """Return the rows of files, None with a finding if verl could not read them, or they are on another machine."""
    names = [str(name) for name in ([files] if isinstance(files, str) else files or ())]
    if not names:
        findings.add(area, "error", f"{key}={files}: no file is named", f"set {key}=<file.parquet>")
        return None
    if remote := [name for name in names if "://" in name]:
        findings.add(area, "note", f"{key}={remote[0]} is not on this machine; its rows are not looked at")
        return None
    tables = [_table(area, key, name, findings) for name in names]
    known = [table for table in tables if table is not None]
    if len(known) < len(tables):
        return None
    if sum(map(len, known)) == 0:
        remedy = "give a file with problems in verl's schema"
        findings.add(area, "error", f"{key}={', '.join(names)}: no rows", remedy)
        return None
    try:
        together = datasets.concatenate_datasets(known)
    except Exception as error:
        text = f"{key}: {_difference(names, known) or ' '.join(str(error).split())[:300]}, so verl cannot join them"
        findings.add(area, "error", text, "write the column with one type in all files of the key")
        return None
    sizes = tuple((name, len(table)) for name, table in zip(names, known, strict=True))
    return Frame(area, key, together, sizes, _taken(len(together), max_samples, verl_config))


def _table(area: str, key: str, name: str, findings: Findings) -> Any:
    """Return the rows of one file, or None with a finding."""
    path = Path(name).expanduser()
    kind = KINDS.get(path.suffix)
    if kind is None or not path.is_file():
        what = "no such file" if kind else "neither parquet, json nor jsonl"
        remedy = "give the path of an existing file" if kind else "give files in verl's schema, in one of these formats"
        findings.add(area, "error", f"{key}={name}: {what}", remedy)
        return None
    if _is_empty_file(path, kind):
        findings.add(area, "error", f"{key}={name}: no rows", "leave it out, or write it with problems")
        return None
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:300]
        remedy = f"write it again as {kind}, one type in each column"
        if isinstance(error, PermissionError) or isinstance(error.__cause__, PermissionError):
            remedy = f"set HF_HOME to a folder that can be written (now {datasets.config.HF_CACHE_HOME})"
        findings.add(area, "error", f"{key}={name}: cannot be read ({why})", remedy)
        return None


def _is_empty_file(path: Path, kind: str) -> bool:
    """Return whether a file has no rows, which `datasets` cannot read."""
    if kind == "json":
        return path.stat().st_size == 0
    try:
        return int(pq.read_metadata(path).num_rows) == 0
    except (OSError, pa.ArrowException):  # said when it is read
        return False


def _difference(names: Sequence[str], tables: Sequence[Any]) -> str:
    """Return which column has two types, and in which files; empty if none is found."""
    seen: dict[str, tuple[str, str]] = {}
    for name, table in zip(names, tables, strict=True):
        for column, kind in _types("", dict(table.features)):
            first = seen.setdefault(column, (name, kind))
            if kind != first[1] and "null" not in (kind, first[1]):
                return f"column {column} is {first[1]} in {first[0]} and {kind} in {name}"
    return ""


def _types(prefix: str, features: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name, dotted, and the type of every column and every key within it."""
    for name, feature in features.items():
        if isinstance(feature, dict):
            yield from _types(f"{prefix}{name}.", feature)
        else:
            yield f"{prefix}{name}", str(getattr(feature, "dtype", None) or feature)


def _taken(num_rows: int, max_samples: int | None, verl_config: DictConfig) -> np.ndarray:
    """Return the rows that verl takes, as its data set does: the first ones, or as many at random."""
    if not max_samples or not 0 < max_samples < num_rows:
        return np.arange(num_rows)
    if not verl_config.data.get("shuffle"):
        return np.arange(max_samples)
    return np.sort(np.random.default_rng(verl_config.data.get("seed")).choice(num_rows, max_samples, replace=False))


def examine_columns(frame: Frame, verl_config: DictConfig, findings: Findings) -> None:
    """Add findings on what verl and the trainer read of every row: types, and values that are missing."""
    data = verl_config.data
    if PROBLEM_ID in frame.columns:
        text = f"{frame.key}: the column {PROBLEM_ID} is the trainer's own"
        findings.add(frame.area, "error", text, "rename the column")
    prompt_key = data.get("prompt_key", "prompt")
    if prompt_key not in frame.columns:
        known = ", ".join(frame.columns)
        text = f"{frame.key}: no column {prompt_key!r} (data.prompt_key) among {known}"
        findings.add(frame.area, "error", text, "add the column, or set data.prompt_key to the one with the prompts")
    elif not has_own_class(verl_config):
        _prompts(frame, prompt_key, findings)
    _media(frame, verl_config, findings)
    if "agent_name" in frame.columns:
        _agent_names(frame, verl_config, findings)
    if "extra_info" in frame.columns:
        kind = frame.table.data.column("extra_info").type
        if not (pa.types.is_struct(kind) or pa.types.is_null(kind)):
            text = f"{frame.key}: extra_info is {kind}, and verl looks keys up in it"
            findings.add(frame.area, "error", text, "write it as a struct (a dictionary in every row), or leave it out")
    if reads_ground_truth(verl_config):
        _for_rewards(frame, verl_config, findings)


def _media(frame: Frame, verl_config: DictConfig, findings: Findings) -> None:
    """Whether there are pictures, videos or sounds for a model that takes none."""
    folder = Path(str(verl_config.actor_rollout_ref.model.path))
    if not folder.is_dir() or any(folder.glob("*processor_config.json")):
        return
    for key, default in MEDIA:
        column = verl_config.data.get(key) or default
        if column not in frame.columns:
            continue
        kind = frame.table.data.column(column).type
        if not pa.types.is_list(kind):
            continue
        lengths = [pc.fill_null(pc.list_value_length(chunk), 0) for chunk in frame.chunks(column)]
        has_some = _joined(pc.greater(length, 0) for length in lengths)
        what = f"{column} is not empty, and the model at {folder} has no processor for it"
        frame.report(has_some, what, "remove the column, or train a model that takes it", findings)


def _agent_names(frame: Frame, verl_config: DictConfig, findings: Findings) -> None:
    """Whether the agent loops that rows ask for are there."""
    with findings.refusals(frame.area):
        known = known_agent_loops(verl_config)
        unknown = sorted({str(name) for name in frame.table.unique("agent_name")} - known)
        if unknown:
            remedy = f"use one of {', '.join(sorted(known))}, or name the file of yours in {AGENT_FILE}"
            findings.add(frame.area, "error", f"{frame.key}: agent_name {unknown[0]!r} is no agent loop", remedy)


def reads_ground_truth(verl_config: DictConfig) -> bool:
    """Return whether verl's reward loop reads data_source and reward_model.ground_truth of every row.

    It does for every function, whether that uses them or not; a reward model without a function, and a reward manager
    of the user's, may do without.
    """
    reward = verl_config.reward
    is_by_model = reward.reward_model.enable and not OmegaConf.select(reward, "custom_reward_function.path")
    return not is_by_model and reward.reward_manager.source == "register"


def _for_rewards(frame: Frame, verl_config: DictConfig, findings: Findings) -> None:
    """Whether reward_model.ground_truth and data_source are there."""
    own = bool(OmegaConf.select(verl_config, "reward.custom_reward_function.path"))
    if "data_source" not in frame.columns:
        text = f"{frame.key}: no column data_source, which verl gives to every reward function"
        findings.add(frame.area, "error", text, "add it: the name of the data set")
    remedy = "add reward_model={'style': 'rule', 'ground_truth': <the answer>} to every row; an empty one will do "
    remedy += "for a reward function that needs none"
    if "reward_model" not in frame.columns:
        text = f"{frame.key}: no column reward_model; verl reads reward_model.ground_truth whatever the function"
        findings.add(frame.area, "error", text, remedy)
        return
    kind = frame.table.data.column("reward_model").type
    if not pa.types.is_struct(kind) or kind.get_field_index("ground_truth") < 0:
        text = f"{frame.key}: reward_model is {kind}; verl reads reward_model.ground_truth"
        findings.add(frame.area, "error", text, remedy)
        return
    chunks = list(frame.chunks("reward_model"))
    is_null = _joined(chunk.is_null() for chunk in chunks)
    frame.report(is_null, "reward_model is null; verl reads reward_model.ground_truth", remedy, findings)
    is_missing = _joined(_is_empty(pc.struct_field(chunk, "ground_truth")) for chunk in chunks) & ~is_null
    num = int((is_missing & frame.is_taken()).sum())
    if num:
        text = f"{num} of {len(frame)} problems have no reward_model.ground_truth"
        text += f", the first at {frame.place(int(np.flatnonzero(is_missing & frame.is_taken())[0]))}"
        remedy = "add the answers, or use a reward function that needs none"
        findings.add(frame.area, "warning" if own else "error", text, remedy)


def _is_empty(values: pa.Array) -> pa.Array:
    is_null = values.is_null()
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    if pa.types.is_floating(values.type):  # as pandas writes what is missing
        return pc.or_(is_null, pc.fill_null(pc.is_nan(values), True))
    return pc.or_(is_null, pc.fill_null(pc.equal(values, ""), True)) if is_text else is_null


def _joined(arrays: Iterator[pa.Array]) -> np.ndarray:
    parts = [array.to_numpy(zero_copy_only=False) for array in arrays]
    return np.concatenate(parts).astype(bool) if parts else np.zeros(0, dtype=bool)


def _prompts(frame: Frame, column: str, findings: Findings) -> None:
    """Whether every prompt is a list of messages with role and content."""
    kind = frame.table.data.column(column).type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    message: Any = kind.value_type if is_list else kind
    names = {message.field(i).name for i in range(message.num_fields)} if pa.types.is_struct(message) else set()
    if not is_list or not {"role", "content"} <= names:
        text = f"{frame.key}: {column} is {kind}; verl wants a list of messages with role and content"
        findings.add(frame.area, "error", text, f"write each prompt as {MESSAGES}")
        return
    chunks = list(frame.chunks(column))
    remedy = f"write the prompt as {MESSAGES}, or remove the row"
    is_null = _joined(chunk.is_null() for chunk in chunks)
    frame.report(is_null, f"{column} is null", remedy, findings)
    is_empty = _joined(pc.fill_null(pc.equal(pc.list_value_length(chunk), 0), False) for chunk in chunks)
    frame.report(is_empty, f"{column} has no message", remedy, findings)
    frame.report(_lacks_words(chunks), f"{column} has a message without role or content", remedy, findings)


def _lacks_words(chunks: Sequence[pa.Array]) -> np.ndarray:
    """Return bool, whether a message of each row lacks its role or its content."""
    parts = []
    for chunk in chunks:
        messages, row_of = chunk.flatten(), pc.list_parent_indices(chunk).to_numpy(zero_copy_only=False)
        is_bad = messages.is_null()
        for name in ("role", "content"):
            is_bad = pc.or_(is_bad, pc.struct_field(messages, name).is_null())
        bad_rows = row_of[is_bad.to_numpy(zero_copy_only=False).astype(bool)]
        parts.append(np.isin(np.arange(len(chunk)), bad_rows))
    return np.concatenate(parts)


def examine_repeats(frame: Frame, verl_config: DictConfig, findings: Findings, remedy: str) -> int:
    """Return the number of distinct problems; add a finding where rows repeat one another."""
    data = verl_config.data
    column = data.get("prompt_key", "prompt")
    # Pictures of the same question are other problems.
    if any(data.get(key, default) in frame.columns for key, default in MEDIA):
        return len(frame)
    hashes = np.fromiter(map(hash, prompt_texts(frame.table, column)), dtype=np.int64, count=len(frame.table))
    _, counts = np.unique(hashes[frame.taken], return_counts=True)
    repeats = len(frame) - len(counts)
    if repeats:
        most = f"one of them {counts.max():,} times"
        text = f"{frame.key}: {len(frame):,} rows hold {len(counts):,} distinct problems, {most}"
        is_many = repeats > REPEATS_WORTH_A_WARNING * len(frame)
        findings.add(frame.area, "warning" if is_many else "note", text, remedy if is_many else "")
    return len(counts)


def frame_of_own_class(
    area: str, key: str, files: Any, verl_config: DictConfig, tokenizer: Any, findings: Findings, max_samples: int
) -> Frame | None:
    """Return the rows of data.custom_cls, made as verl makes it; None with a finding if that fails."""
    names = [str(name) for name in ([files] if isinstance(files, str) else files or ())]
    remedy = "derive the class from verl.utils.dataset.rl_dataset.RLHFDataset, or mend it"
    with findings.refusals("data", remedy):
        own = get_dataset_class(verl_config.data)
        made: Any = own(
            data_files=names, tokenizer=tokenizer, processor=None, config=verl_config.data, max_samples=max_samples
        )
        table = getattr(made, "dataframe", None)
        if not isinstance(table, datasets.Dataset):
            raise ValueError(
                f"data.custom_cls.name={own.__name__}: its dataframe is {type(table).__name__}; the trainer tells "
                f"problems apart by a datasets.Dataset. Remedy: {remedy}."
            )
        if not len(made):
            raise ValueError(f"{key}={', '.join(names)}: {own.__name__} holds no problem. Remedy: give it some.")
        made[0]
        flat = table.flatten_indices()
        return Frame(area, key, flat, ((", ".join(names), len(flat)),), np.arange(len(flat)))
    return None
