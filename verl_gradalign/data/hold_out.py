# SPDX-License-Identifier: Apache-2.0
"""A trusted set, and an audit set, held out of parquet files in verl's schema: what `verl-gradalign hold-out` does.

The output folder gets trusted.parquet, audit.parquet (if asked for), train.parquet with what is left, and
manifest.json. Rows are moved as they are, all columns and the schema kept. A problem is what `identity` says: however
often it stands in the files, no row of a held-out problem is left in train; of its copies the first is held out. Each
data_source gives its share. What is drawn depends on the seed and the problems alone, not on the order of the rows, and
the trusted set not on the size of the audit set. The folder appears at the end, complete, or not at all.

    manifest = hold_out(HoldOutPlan(("train.parquet",), trusted=64, audit=128), Path("data/mine"))
"""

import json
import platform
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import verl_gradalign
from verl_gradalign.data.identity import problem_identity
from verl_gradalign.data.self_grading import RewardFunction, forms_asked_for, grading_fault, load_reward_function
from verl_gradalign.data.values import is_empty
from verl_gradalign.files import atomic_folder, hash_file

# What becomes of a row. A copy: of a held-out problem, of which one row is enough.
TRAIN, TRUSTED, AUDIT, COPY, BAD, UNGRADED = range(6)
SPLITS = {TRUSTED: "trusted", AUDIT: "audit", TRAIN: "train"}
LEFT_OUT = {COPY: "copies_of_held_out_problems", BAD: "bad_rows_skipped", UNGRADED: "ungraded_rows_skipped"}
SEVERAL_TRUTHS = "problems_of_several_truths_left_in_train"
UNKNOWN_SOURCE = "unknown"
BYTES_READ_TOGETHER, MAX_ROWS_READ_TOGETHER = 64 << 20, 1 << 16
NUM_REASONS_KEPT = 5
SKIP = "or leave such rows out with --skip-bad-rows"


Flags = np.ndarray[Any, np.dtype[np.bool_]]
Files = Mapping[str, pq.ParquetFile]
"""By the names that were given."""


@dataclass(frozen=True)
class HoldOutPlan:
    """What to hold out of which files."""

    files: tuple[str, ...]  # parquet files with equal schemas
    trusted: int  # problems of the trusted set
    audit: int = 0  # problems of the audit set, which is neither trained on nor a direction
    seed: int = 0
    prompt_key: str = "prompt"  # verl's data.prompt_key
    media_keys: tuple[str, ...] = ("images", "videos", "audios")  # verl's data.image_key, video_key and audio_key
    reward: str | None = None  # what training grades with; if given, it has to grade every row that is held out
    skip_bad_rows: bool = False  # leave out, instead of refusing, rows without prompt or truth, or not graded

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files=() names no parquet file; name the train file to hold problems out of")
        for name, num, least in (("trusted", self.trusted, 1), ("audit", self.audit, 0)):
            if num < least:
                raise ValueError(f"--{name} {num} must be at least {least}; ask for some dozens of problems")


@dataclass
class Problems:
    """The problems of the files, numbered in the order of their identities."""

    of_row: np.ndarray[Any, np.dtype[np.int64]]
    """Each row's problem; -1 where the row cannot be used."""
    first_row: np.ndarray[Any, np.dtype[np.int64]]
    """Each problem's first row."""
    source: np.ndarray[Any, np.dtype[np.int64]]
    """Its data source, as a place in `source_names`."""
    has_one_truth: Flags
    """Where copies differ in their truth one of them is wrong, so the problem is not to be trusted."""
    source_names: list[str]
    reasons: list[str]
    """Why rows cannot be used, the first few."""


def hold_out(plan: HoldOutPlan, output: Path) -> dict[str, Any]:
    """Write the plan's files into the folder `output` and return the manifest.

    Raises: ValueError, leaving no output behind, if `output` is there already and not empty, if the files cannot be
        read or do not hold as many problems, or for a row that cannot be used; the message names file and row.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already; remove it or choose another --output")
    reward = None if plan.reward is None else load_reward_function(plan.reward)
    files = {name: _open(Path(name).expanduser(), plan) for name in plan.files}
    schema, *others = (file.schema_arrow for file in files.values())
    if not all(other.equals(schema) for other in others):
        raise ValueError(f"{', '.join(plan.files)} differ in their columns; hold problems out of one file at a time")
    problems = _read_problems(plan, files, has_truths="reward_model" in schema.names)
    role_of_row = _roles_of_rows(problems, _choose_graded(plan, files, problems, reward))
    with atomic_folder(output) as folder:
        _write(files, schema, role_of_row, folder)
        manifest = {
            "plan": asdict(plan),
            "splits": _describe_splits(role_of_row, problems),
            "files": {name: hash_file(Path(name).expanduser()) for name in plan.files},
            "rows": len(role_of_row),
            "distinct": len(problems.first_row),
            **{name: int((role_of_row == role).sum()) for role, name in LEFT_OUT.items()},
            SEVERAL_TRUTHS: int((~problems.has_one_truth).sum()),
            "first_reasons": problems.reasons,
            "sha256": {path.name: hash_file(path) for path in sorted(folder.iterdir())},
            "versions": {
                "verl_gradalign": verl_gradalign.__version__,
                "python": platform.python_version(),
                "pyarrow": version("pyarrow"),
            },
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (folder / "manifest.json").write_text(text, encoding="utf-8")
    return dict(json.loads(text))


def _describe_splits(role_of_row: np.ndarray[Any, Any], problems: Problems) -> dict[str, Any]:
    described = {}
    for role, name in SPLITS.items():
        rows = problems.of_row[role_of_row == role]
        if len(rows):
            by_source = np.bincount(problems.source[rows], minlength=len(problems.source_names))
            named = {source: int(num) for source, num in zip(problems.source_names, by_source, strict=True) if num}
            described[name] = {"rows": len(rows), "problems": len(np.unique(rows)), "by_source": named}
    return described


def _open(path: Path, plan: HoldOutPlan) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        why = f"{path} is not a readable parquet file ({error})"
        raise ValueError(f"{why}; give a parquet file, as verl's data.train_files names it") from error
    names = file.schema_arrow.names
    if plan.prompt_key not in names:
        why = f"{path} has no column {plan.prompt_key!r} (columns: {', '.join(names)})"
        raise ValueError(f"{why}; name the column of prompts with --prompt-key")
    if not file.metadata.num_rows:
        raise ValueError(f"{path} has no rows; give a file that holds problems")
    return file


class Batch(NamedTuple):
    """Rows that are read together: of which file, the number of the first among all files' rows, and the rows."""

    file: str
    start: int
    rows: pa.RecordBatch

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as Python values. Raises: ValueError naming the file for text that is not UTF-8."""
        try:
            return list(self.rows.to_pylist())
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.file} has text that is not UTF-8 ({error}); write its text as UTF-8") from error


def _batches(files: Files, columns: Sequence[str] | None = None) -> Iterator[Batch]:
    """Yield the rows of the files in order, some 64 MiB at a time. Raises: ValueError naming the file."""
    start = 0
    for name, file in files.items():
        data, present = file.metadata, file.schema_arrow.names
        row_bytes = sum(data.row_group(n).total_byte_size for n in range(data.num_row_groups)) // data.num_rows
        size = max(1, min(MAX_ROWS_READ_TOGETHER, BYTES_READ_TOGETHER // (row_bytes + 1)))
        wanted = None if columns is None else [name for name in columns if name in present]
        try:
            for rows in file.iter_batches(size, columns=wanted):
                yield Batch(name, start, rows)
                start += len(rows)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{name} is not a readable parquet file ({error}); write it again") from error


def _read_problems(plan: HoldOutPlan, files: Files, has_truths: bool) -> Problems:
    """Read every row's problem, data source and truth. Raises: ValueError naming file and row of a bad one."""
    columns = (plan.prompt_key, *plan.media_keys, "data_source", "reward_model")
    identities, truths, sources, is_good = array("Q"), array("Q"), array("q"), array("b")
    numbers: dict[str, int] = {}
    reasons: list[str] = []
    for row in (row for batch in _batches(files, columns) for row in batch.to_dicts()):
        truth = (row.get("reward_model") or {}).get("ground_truth")
        fault, identity = None, ""
        try:
            identity = problem_identity(row[plan.prompt_key], [row.get(key) for key in plan.media_keys])
        except ValueError as error:
            fault = f"has {error} in its column {plan.prompt_key!r}"
        if has_truths and (is_empty(truth) or (isinstance(truth, str) and not truth.strip())):
            fault = fault or "has an empty reward_model.ground_truth"
        if fault:
            message = f"{_place(len(identities), files)} {fault}; fill it in, {SKIP}"
            if not plan.skip_bad_rows:
                raise ValueError(message)
            reasons = [*reasons, message][:NUM_REASONS_KEPT]
        identities.append(_hash(identity))
        truths.append(_hash(repr(truth)))
        source = str(row["data_source"]) if row.get("data_source") is not None else UNKNOWN_SOURCE
        sources.append(numbers.setdefault(source, len(numbers)))
        is_good.append(fault is None)
    by_row = (np.asarray(identities), np.asarray(truths), np.asarray(sources), np.asarray(is_good, dtype=bool))
    return _number_problems(*by_row, list(numbers), reasons)


def _number_problems(
    identity_of_row: np.ndarray[Any, Any],
    truth_of_row: np.ndarray[Any, Any],
    source_of_row: np.ndarray[Any, Any],
    is_good: np.ndarray[Any, Any],
    source_names: list[str],
    reasons: list[str],
) -> Problems:
    good = np.flatnonzero(is_good)
    if not len(good):
        raise ValueError(f"none of the {len(is_good)} rows can be used: {reasons[0]}")
    _, first, problem = np.unique(identity_of_row[good], return_index=True, return_inverse=True)
    first_row = good[first]
    of_row = np.full(len(is_good), -1, dtype=np.int64)
    of_row[good] = problem
    differs = truth_of_row[good] != truth_of_row[first_row][problem]
    has_one_truth = np.bincount(problem, weights=differs, minlength=len(first)) == 0
    return Problems(of_row, first_row, source_of_row[first_row], has_one_truth, source_names, reasons)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _place(row: int, files: Files) -> str:
    """Where a row of the files together stands."""
    for name, file in files.items():
        if row < file.metadata.num_rows:
            return f"{name}, row {row + 1}"
        row -= file.metadata.num_rows
    raise IndexError(row)


def _choose_graded(
    plan: HoldOutPlan, files: Files, problems: Problems, reward: RewardFunction | None
) -> np.ndarray[Any, Any]:
    """Return each problem's role, all of the held-out ones graded by the reward function, if there is one.

    Raises: ValueError naming file and row of one that is not, unless such rows are left out; then others are drawn.
    """
    is_ungraded = np.zeros(len(problems.first_row), dtype=bool)
    graded: set[int] = set()
    while True:
        roles = choose_problems(plan, problems, problems.has_one_truth & ~is_ungraded)
        roles[is_ungraded] = UNGRADED
        new = [int(p) for p in np.flatnonzero(np.isin(roles, (TRUSTED, AUDIT))) if int(p) not in graded]
        if reward is None or not new:
            return roles
        rows = {int(problems.first_row[p]): p for p in new}
        graded.update(new)
        for number, row in _rows_at(files, sorted(rows), plan.prompt_key):
            fault = grading_fault(row, reward, forms_asked_for(row[plan.prompt_key]))
            if fault is None:
                continue
            message = f"{_place(number, files)} {fault.message}; mend the answer, {SKIP}"
            if not plan.skip_bad_rows:
                raise ValueError(message)
            is_ungraded[rows[number]] = True
            problems.reasons = [*problems.reasons, message][:NUM_REASONS_KEPT]


def _rows_at(files: Files, numbers: list[int], prompt_key: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield what a reward function reads of some rows, each with its number."""
    for batch in _batches(files, (prompt_key, "data_source", "reward_model", "extra_info")):
        inside = [number for number in numbers if 0 <= number - batch.start < len(batch.rows)]
        taken = batch.rows.take(pa.array([number - batch.start for number in inside], pa.int64()))
        yield from zip(inside, Batch(batch.file, batch.start, taken).to_dicts(), strict=True)


def choose_problems(plan: HoldOutPlan, problems: Problems, may_be_held_out: Flags) -> np.ndarray[Any, Any]:
    """Return each problem's role: TRAIN, TRUSTED or AUDIT.

    Of each data source at least one problem stays in train. Raises: ValueError if there are too few.
    """
    roles = np.full(len(problems.first_row), TRAIN)
    order = np.random.default_rng(plan.seed).permutation(len(roles))
    names = problems.source_names
    sizes = {name: int((problems.source == number).sum()) for number, name in enumerate(names)}
    order = order[may_be_held_out[order]]
    free = {name: order[problems.source[order] == number] for number, name in enumerate(names)}
    left = dict(sizes)
    for role, num in ((TRUSTED, plan.trusted), (AUDIT, plan.audit)):
        most = {name: max(0, min(len(free[name]), left[name] - 1)) for name in names}
        if num > sum(most.values()):
            why = f"--{SPLITS[role]} {num} asks for more than the {sum(most.values())} problems that may be held out"
            raise ValueError(f"{why} (of each data source one stays in train); ask for at most {sum(most.values())}")
        for name, count in share_out(num, sizes, most).items():
            roles[free[name][:count]] = role
            free[name] = free[name][count:]
            left[name] -= count
    return roles


def share_out(num: int, sizes: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """Return how many of `num` each name gets: in proportion to the sizes, at least one if `num` allows.

    None gets more than its `most`, whose sum must not be below `num`.
    """
    open_names = sorted(name for name in sizes if most[name])
    given = dict.fromkeys(open_names, 1 if num >= len(open_names) else 0)
    total = sum(sizes[name] for name in open_names)
    for _ in range(num - sum(given.values())):
        below = [name for name in open_names if given[name] < most[name]]
        neediest = max(below, key=lambda name: num * sizes[name] / total - given[name])
        given[neediest] += 1
    return given


def _roles_of_rows(problems: Problems, role_of_problem: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what becomes of each row: of a held-out problem the first is held out, the others are copies."""
    roles = role_of_problem[problems.of_row]
    is_held_out = np.isin(roles, (TRUSTED, AUDIT))
    is_held_out[problems.first_row] = False
    roles[is_held_out] = COPY
    roles[problems.of_row < 0] = BAD
    return roles


def _write(files: Files, schema: pa.Schema, role_of_row: np.ndarray[Any, Any], folder: Path) -> None:
    """Write each split's rows in their order, with the schema of the files; train as it is read, to save memory."""
    held_out: dict[int, list[pa.RecordBatch]] = {TRUSTED: [], AUDIT: []}
    with pq.ParquetWriter(folder / "train.parquet", schema) as train:
        for batch in _batches(files):
            roles = role_of_row[batch.start : batch.start + len(batch.rows)]
            for role, batches in held_out.items():
                if (roles == role).any():
                    batches.append(batch.rows.filter(pa.array(roles == role)))
            if (roles == TRAIN).any():
                train.write_batch(batch.rows.filter(pa.array(roles == TRAIN)))
    for role, batches in held_out.items():
        if batches:
            with pq.ParquetWriter(folder / f"{SPLITS[role]}.parquet", schema) as writer:
                writer.write_table(pa.Table.from_batches(batches))
