# SPDX-License-Identifier: Apache-2.0
"""What an offline scoring has found so far, in a folder: rollouts as Parquet, what was measured of them as JSON.

    store = ScoringStore("scores/state")
    store.write_rollouts(rows, seconds=12.5)
    store.write_measured(Measured(...))

A file is written beside its place and renamed, so it is complete or absent, and a scoring that was killed at any moment
resumes from the files that are there. A rollout file holds whole groups, whichever finished first; groups that failed
are not stored, so they are tried again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from verl_gradalign.files import replace_file
from verl_gradalign.log.parts import replace_table
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.types import ProblemScores

__all__ = ["ROLLOUTS", "Measured", "Member", "ScoringStore", "joined_scores"]

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
SECONDS_KEY = b"seconds"

Member = tuple[str | None, int]
"""A problem of a scoring: its trusted set (None: the pool) and its row."""


@dataclass(frozen=True)
class Measured:
    """What one scoring call measured of the groups of some rollout files."""

    files: tuple[str, ...]
    """Names of the rollout files, in order."""
    trusted: tuple[int, ...]
    """How many groups of each trusted set the direction was made of; a result of another direction does not count."""
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

    def rollout_files(self) -> list[Path]:
        """Return the rollout files, oldest first."""
        return sorted(self.folder.glob("rollouts-*.parquet"))

    def write_rollouts(self, rows: Sequence[Mapping[str, Any]], seconds: float) -> Path:
        """Write whole groups (columns as in ROLLOUTS) as one more file, and how long they took; return its path."""
        number = 1 + max((_number(path) for path in self.rollout_files()), default=-1)
        schema = ROLLOUTS.with_metadata({SECONDS_KEY: str(seconds).encode()})
        table = pa.Table.from_pylist(list(rows), schema=schema)
        return replace_table(table, self.folder / f"rollouts-{number:06d}.parquet")

    def read_rollouts(
        self, name: str, trusted: bool, problem_ids: Collection[int] | None = None
    ) -> list[dict[str, Any]]:
        """Return a rollout file's rows: those of the trusted sets, or those of the pool, of these problems or all."""
        is_wanted = pc.field("trusted_set").is_valid() == trusted
        if problem_ids is not None:
            is_wanted &= pc.field("problem_id").isin(list(problem_ids))
        # Chosen before they become Python objects, one for every token.
        rows: list[dict[str, Any]] = pq.read_table(self.folder / name).filter(is_wanted).to_pylist()
        return rows

    def units(self, is_whole: bool) -> list[tuple[str, ...]]:
        """Return the names of the rollout files that are measured in one call each: single ones, or all together.

        Files with trusted groups alone are left out.
        """
        names = [path.name for path in self.rollout_files() if self.num_candidates([path.name])]
        return [tuple(names)] if is_whole else [(name,) for name in names]

    def num_candidates(self, unit: Sequence[str]) -> int:
        """Return how many problems of the pool some rollout files hold."""
        return len({row for name in unit for row in self._members(name) if row[0] is None})

    def members(self) -> set[Member]:
        """Return the problems that have been rolled out."""
        return {member for path in self.rollout_files() for member in self._members(path.name)}

    def _members(self, name: str) -> set[Member]:
        table = pq.read_table(self.folder / name, columns=["trusted_set", "problem_id"])
        return set(zip(*(table[column].to_pylist() for column in table.column_names), strict=True))

    def rollout_seconds(self) -> float:
        """Return how long all rollouts took."""
        return sum(float(pq.read_schema(path).metadata[SECONDS_KEY]) for path in self.rollout_files())

    def write_failed(self, problems: Sequence[Problem]) -> None:
        """Note the problems that could not be rolled out. Written when all others have been: the rollout is over."""
        replace_file(self.folder / "failed.json", json.dumps([asdict(problem) for problem in problems]))

    def failed(self) -> list[Problem] | None:
        """Return the problems that could not be rolled out, None while the rollout is not over."""
        path = self.folder / "failed.json"
        if not path.exists():
            return None
        return [Problem(**values) for values in json.loads(path.read_text(encoding="utf-8"))]

    def write_measured(self, measured: Measured) -> None:
        """Write what was measured of the groups of some rollout files."""
        path = self.folder / f"measured-{_number(Path(measured.files[0])):06d}.json"
        scores = measured.scores
        text = json.dumps(
            {
                **{key: getattr(measured, key) for key in ("files", "trusted", "half_cosine", "metrics")},
                "groups": [asdict(group) for group in measured.groups],
                "scores": None if scores is None else _listed(scores),
            }
        )
        replace_file(path, text)

    def measured(self, trusted: Sequence[int]) -> list[Measured]:
        """Return what was measured along the direction of so many trusted groups, in the order of the files."""
        found = [_read_measured(path) for path in sorted(self.folder.glob("measured-*.json"))]
        return [measured for measured in found if measured.trusted == tuple(trusted)]

    def num_trusted(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return how many groups of each trusted set have been rolled out."""
        members = self.members()
        return tuple(sum(name == wanted for name, _ in members) for wanted in names)


def joined_scores(parts: Sequence[Measured]) -> ProblemScores | None:
    """Return the scores of all live groups as one, in order; None if nothing was measured."""
    scores = [part.scores for part in parts if part.scores is not None]
    if not scores:
        return None
    derivatives = [s.response_derivative_PR for s in scores if s.response_derivative_PR is not None]
    width = max((d.shape[1] for d in derivatives), default=0)
    wide = [torch.nn.functional.pad(d, (0, width - d.shape[1]), value=torch.nan) for d in derivatives]
    norms = [s.norm_P for s in scores if s.norm_P is not None]
    halves = [s.half_dot_P2 for s in scores if s.half_dot_P2 is not None]
    return ProblemScores(
        uid=tuple(uid for s in scores for uid in s.uid),
        dot_P=torch.cat([s.dot_P for s in scores]),
        norm_P=torch.cat(norms) if len(norms) == len(scores) else None,
        num_tokens_P=torch.cat([s.num_tokens_P for s in scores]),
        response_derivative_PR=torch.cat(wide) if len(wide) == len(scores) else None,
        direction_norm=scores[0].direction_norm,
        half_dot_P2=torch.cat(halves) if len(halves) == len(scores) else None,
    )


def _number(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


def _listed(scores: ProblemScores) -> dict[str, Any]:
    """Return scores as plain values: float64 is the same number when read from JSON again."""
    values = {key: getattr(scores, key) for key in ("uid", "direction_norm")}
    for key in ("dot_P", "norm_P", "num_tokens_P", "response_derivative_PR", "half_dot_P2"):
        tensor = getattr(scores, key)
        values[key] = None if tensor is None else tensor.tolist()
    return values | {"num_rows": len(scores.uid), "diagnostics": dict(scores.diagnostics)}


def _read_measured(path: Path) -> Measured:
    values = json.loads(path.read_text(encoding="utf-8"))
    return Measured(
        files=tuple(values["files"]),
        trusted=tuple(values["trusted"]),
        groups=tuple(_group(group) for group in values["groups"]),
        scores=None if values["scores"] is None else _scores(values["scores"]),
        half_cosine=values["half_cosine"],
        metrics=values["metrics"],
    )


def _group(values: dict[str, Any]) -> Group:
    problem = Problem(**values.pop("problem"))
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Group(problem=problem, **fields)


def _scores(values: dict[str, Any]) -> ProblemScores:
    num_rows = values.pop("num_rows")

    def tensor(key: str, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor | None:
        listed = values[key]
        return None if listed is None else torch.tensor(listed, dtype=dtype).reshape(num_rows, *shape)

    width = len(values["response_derivative_PR"][0]) if values["response_derivative_PR"] else 0
    dot_P, num_tokens_P = tensor("dot_P"), tensor("num_tokens_P", dtype=torch.int64)
    assert dot_P is not None and num_tokens_P is not None, "every scoring call gives these"
    return ProblemScores(
        uid=tuple(values["uid"]),
        dot_P=dot_P,
        norm_P=tensor("norm_P"),
        num_tokens_P=num_tokens_P,
        response_derivative_PR=tensor("response_derivative_PR", width),
        direction_norm=values["direction_norm"],
        half_dot_P2=tensor("half_dot_P2", 2),
        diagnostics=values["diagnostics"],
    )
