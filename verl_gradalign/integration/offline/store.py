# SPDX-License-Identifier: Apache-2.0
"""What an offline scoring has found so far, in a folder: rollouts as Parquet, what was measured of them as JSON.

    store = ScoringStore("scores/state")
    store.write_rollouts(rows, seconds=12.5)
    store.write_measured(Measured(...))

A file is complete or absent, so a scoring that was killed at any moment resumes from the files that are there. A
rollout file holds whole groups, whichever finished first; groups that failed are not stored, so they are tried again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.files import replace_file
from verl_gradalign.log.parts import replace_table
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.selection.scores import score_of
from verl_gradalign.types import ProblemScores

ROLLOUTS = pa.schema(
    [
        ("trusted_set", pa.string()),  # null: a problem of the pool
        ("problem_id", pa.int64()),  # row in the pool's files, or in the trusted set's
        ("data_source", pa.string()),
        ("session", pa.int32()),
        ("output", pa.int32()),  # of the session; a response's reward is that of its last output
        ("prompt", pa.list_(pa.int64())),
        ("response", pa.list_(pa.int64())),
        ("response_mask", pa.list_(pa.int64())),
        ("rewards", pa.list_(pa.float32())),  # of each response token
    ]
)
OF_POOL = pc.field("trusted_set").is_null()
"""Which rows are of the pool, for `ScoringStore.rollouts`; the others are of the trusted sets."""

SECONDS_KEY = b"seconds"
TENSORS = ("dot_P", "norm_P", "num_tokens_P", "response_derivative_PR", "half_dot_P2")

Member = tuple[str | None, int]
"""A problem of a scoring: its trusted set (None: the pool) and its row."""

Unit = tuple[str, ...]
"""Names of the rollout files that are measured in one call, in order."""


@dataclass(frozen=True)
class Measured:
    """What one scoring call measured of the groups of some rollout files."""

    files: Unit
    trusted: tuple[int, ...]
    """How many groups of each trusted set the direction was made of."""
    groups: tuple[Group, ...]
    """Candidates, in the order of the files."""
    scores: ProblemScores | None
    """Of the live groups, in order; None: the score does not look at gradients, or there is no live group."""
    half_cosine: float = float("nan")
    """Between the halves of the direction, where it was made in this call."""
    metrics: Mapping[str, float] = field(default_factory=dict)


class ScoringStore:
    """The folder. Only the run that scores writes to it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def require_same_identity(self, identity: Mapping[str, Any]) -> None:
        """Note what a new scoring is of; of one that was begun, raise ValueError that names what is different now."""
        path = self.folder / "plan.json"
        if not path.exists():
            replace_file(path, json.dumps(identity, indent=1))
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"{key} was {before.get(key)!r}, is {identity.get(key)!r}"
            for key in sorted({*before, *identity})
            if before.get(key) != identity.get(key)
        ]
        if differences:
            raise ValueError(
                f"--output {self.folder.parent}: holds another scoring: {'; '.join(differences)}. Remedy: use another "
                "--output, or go back to the earlier values."
            )

    def write_rollouts(self, rows: pa.Table, seconds: float) -> None:
        """Write whole groups (columns as in ROLLOUTS) as one more file, and how long they took."""
        number = 1 + max((_number(path.name) for path in self._files()), default=-1)
        rows = rows.replace_schema_metadata({SECONDS_KEY: str(seconds)})
        replace_table(rows, self.folder / f"rollouts-{number:06d}.parquet")

    def rollouts(self, where: pc.Expression, files: Unit | None = None) -> pa.Table:
        """Return the rows of these rollout files (None: of all) for which `where` holds, oldest first."""
        paths = self._files() if files is None else [self.folder / name for name in files]
        return pa.concat_tables(pq.read_table(path, filters=where).replace_schema_metadata() for path in paths)

    def rollout_seconds(self) -> float:
        """Return how long all rollouts took."""
        return sum(float(pq.read_schema(path).metadata[SECONDS_KEY]) for path in self._files())

    def members(self, files: Unit | None = None) -> set[Member]:
        """Return the problems that these rollout files (None: all) hold."""
        paths = self._files() if files is None else [self.folder / name for name in files]
        tables = [pq.read_table(path, columns=["trusted_set", "problem_id"]) for path in paths]
        return {member for table in tables for member in zip(*(c.to_pylist() for c in table.columns), strict=True)}

    def num_trusted(self, config: GradAlignConfig) -> tuple[int, ...]:
        """Return how many groups of each trusted set that the score compares with have been rolled out."""
        sets = config.validation.trusted_sets() if score_of(config.score).needs_direction else ()
        members = self.members()
        return tuple(sum(name == wanted.name for name, _ in members) for wanted in sets)

    def write_failed(self, problems: Sequence[Problem]) -> None:
        """Note the problems that could not be rolled out. Written when all others have been: the rollout is over."""
        replace_file(self.folder / "failed.json", json.dumps([asdict(problem) for problem in problems]))

    def failed(self) -> list[Problem] | None:
        """Return the problems that could not be rolled out, None while the rollout is not over."""
        path = self.folder / "failed.json"
        if not path.exists():
            return None
        return [Problem(**values) for values in json.loads(path.read_text(encoding="utf-8"))]

    def units(self, config: GradAlignConfig) -> dict[Unit, Measured | None]:
        """Return what is measured in one call each, and what was measured of it; None: it is still to be measured.

        A unit is a rollout file, or all of them where a problem's score depends on the others that are measured with
        it. Files with trusted groups alone are left out. What was measured along another direction does not count.
        """
        is_whole = score_of(config.score).direction in ("pool", "learnability")
        is_whole |= config.direction.metric == "candidates"
        names = [p.name for p in self._files() if any(name is None for name, _ in self.members((p.name,)))]
        found = [_read_measured(path) for path in self.folder.glob("measured-*.json")]
        num_trusted = self.num_trusted(config)
        by_unit = {measured.files: measured for measured in found if measured.trusted == num_trusted}
        units = [tuple(names)] if is_whole else [(name,) for name in names]
        return {unit: by_unit.get(unit) for unit in units}

    def write_measured(self, measured: Measured) -> None:
        """Write what was measured of the groups of some rollout files."""
        # float64 is the same number when read from JSON again.
        text = json.dumps(asdict(measured), default=torch.Tensor.tolist)
        replace_file(self.folder / f"measured-{_number(measured.files[0]):06d}.json", text)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("rollouts-*.parquet"))


def uid_of(trusted_set: str | None, problem_id: int) -> str:
    """Return what stored trajectories' keys begin with: the same in a resumed scoring, so that its results are too."""
    return f"pool:{problem_id}" if trusted_set is None else f"trusted:{trusted_set}:{problem_id}".replace("_", "-")


def joined_scores(parts: Sequence[Measured]) -> ProblemScores | None:
    """Return the scores of all live groups as one, in order; None if nothing was measured."""
    scores = [part.scores for part in parts if part.scores is not None]
    if not scores:
        return None
    columns: dict[str, Any] = {name: _joined([getattr(s, name) for s in scores]) for name in TENSORS}
    return replace(scores[0], uid=tuple(uid for s in scores for uid in s.uid), diagnostics={}, **columns)


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the problems of all parts, nan beyond the columns of one; None if a part is."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    if known[0].ndim == 2:
        width = max(part.shape[1] for part in known)
        known = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=torch.nan) for part in known]
    return torch.cat(known)


def _number(name: str) -> int:
    return int(Path(name).stem.rsplit("-", 1)[1])


def _read_measured(path: Path) -> Measured:
    values = json.loads(path.read_text(encoding="utf-8"))
    for group in values["groups"]:
        group |= {key: tuple(value) for key, value in group.items() if isinstance(value, list)}
        group["problem"] = Problem(**group["problem"])
    values["groups"] = tuple(Group(**group) for group in values["groups"])
    values |= {key: tuple(values[key]) for key in ("files", "trusted")}
    scores = values["scores"]
    return Measured(**{**values, "scores": None if scores is None else _read_scores(scores)})


def _read_scores(values: dict[str, Any]) -> ProblemScores:
    num_problems, derivatives = len(values["uid"]), values["response_derivative_PR"]
    # Shaped, as a list of no problems does not say how many columns it has.
    widths = {"response_derivative_PR": (len(derivatives[0]) if derivatives else 0,), "half_dot_P2": (2,)}
    for name in TENSORS:
        if values[name] is not None:
            dtype = torch.int64 if name == "num_tokens_P" else torch.float64
            values[name] = torch.tensor(values[name], dtype=dtype).reshape(num_problems, *widths.get(name, ()))
    values.pop("num_rows", None)  # of an earlier version
    return ProblemScores(**{**values, "uid": tuple(values["uid"])})
