# SPDX-License-Identifier: Apache-2.0
"""What an offline scoring has found so far, in a folder: rollouts as Parquet, what was measured of them beside them.

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
from verl_gradalign.files import replace_file, replacing
from verl_gradalign.log.parts import replace_table
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.selection.scores import score_of
from verl_gradalign.selection.state_file import differences
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
        elif different := differences(json.loads(path.read_text(encoding="utf-8")), identity):
            raise ValueError(
                f"--output {self.folder.parent}: holds another scoring: {'; '.join(different)}. Remedy: use another "
                "--output, or go back to the earlier values."
            )

    def write_rollouts(self, rows: pa.Table, seconds: float) -> None:
        """Write whole groups (columns as in ROLLOUTS) as one more file, and how long they took."""
        number = 1 + max((_number(path.name) for path in self._paths()), default=-1)
        rows = rows.replace_schema_metadata({SECONDS_KEY: str(seconds)})
        replace_table(rows, self.folder / f"rollouts-{number:06d}.parquet")

    def rollouts(
        self, where: pc.Expression | None = None, files: Unit | None = None, columns: Sequence[str] = ROLLOUTS.names
    ) -> pa.Table:
        """Return the rows of these rollout files (None: of all) for which `where` holds, oldest first."""
        tables = (pq.read_table(path, columns=list(columns), filters=where) for path in self._paths(files))
        return pa.concat_tables(
            [ROLLOUTS.empty_table().select(columns), *(t.replace_schema_metadata() for t in tables)]
        )

    def rollout_seconds(self) -> float:
        """Return how long all rollouts took."""
        return sum(float(pq.read_schema(path).metadata[SECONDS_KEY]) for path in self._paths())

    def members(self, files: Unit | None = None) -> set[Member]:
        """Return the problems that these rollout files (None: all) hold."""
        table = self.rollouts(files=files, columns=("trusted_set", "problem_id"))
        return set(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def num_of_pool(self, files: Unit) -> int:
        """Return how many of the members of these rollout files are problems of the pool."""
        return sum(name is None for name, _ in self.members(files))

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
        is_whole = score_of(config.score).is_of_candidates
        is_whole |= config.direction.metric == "candidates"
        names = [path.name for path in self._paths() if self.num_of_pool((path.name,))]
        found = [_read_measured(path) for path in self.folder.glob("measured-*.pt")]
        num_trusted = self.num_trusted(config)
        by_unit = {measured.files: measured for measured in found if measured.trusted == num_trusted}
        units = [tuple(names)] if is_whole else [(name,) for name in names]
        return {unit: by_unit.get(unit) for unit in units}

    def measured(self, config: GradAlignConfig) -> list[Measured] | None:
        """Return what was measured of all units, None while anything is still to be rolled out or measured."""
        if self.failed() is None:
            return None
        parts = self.units(config).values()
        known = [part for part in parts if part is not None]
        return known if len(known) == len(parts) else None

    def write_measured(self, measured: Measured) -> None:
        """Write what was measured of the groups of some rollout files."""
        path = self.folder / f"measured-{_number(measured.files[0]):06d}.pt"
        with replacing(path) as unfinished:
            torch.save(measured, unfinished)

    def _paths(self, files: Unit | None = None) -> list[Path]:
        if files is None:
            return sorted(self.folder.glob("rollouts-*.parquet"))
        return [self.folder / name for name in files]


def uid_of(trusted_set: str | None, problem_id: int) -> str:
    """Return what stored trajectories' keys begin with: the same in a resumed scoring, so that its results are too."""
    return f"pool:{problem_id}" if trusted_set is None else f"trusted:{trusted_set}:{problem_id}".replace("_", "-")


def keys_of(rows: pa.Table) -> list[str]:
    """Return the trajectory key of each row."""
    names = rows.select(["trusted_set", "problem_id", "session", "output"]).to_pydict().values()
    return [f"{uid_of(name, i)}_{session}_{output}" for name, i, session, output in zip(*names, strict=True)]


def joined_scores(parts: Sequence[Measured]) -> ProblemScores | None:
    """Return the scores of all live groups as one, in order; None if nothing was measured."""
    scores = [part.scores for part in parts if part.scores is not None]
    if not scores:
        return None
    names = ("dot_P", "norm_P", "num_tokens_P", "response_derivative_PR", "half_dot_P2")
    columns: dict[str, Any] = {name: _joined([getattr(s, name) for s in scores]) for name in names}
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
    # The folder may come from elsewhere: nothing but these classes is unpickled.
    with torch.serialization.safe_globals([Measured, Group, Problem, ProblemScores]):
        measured: Measured = torch.load(path)
    return measured
