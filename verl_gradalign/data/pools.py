# SPDX-License-Identifier: Apache-2.0
"""All usable problems of one split of a source, each once, and the count of what was left out.

Two problems are the same if their questions are, after `normalise_question`; the first one stays.

    pool = load_pool(SOURCES["gsm8k"], "train", "path/to/gsm8k")
    len(pool.problems), pool.num_duplicates
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from verl_gradalign.data.countdown import draw_countdown_problems
from verl_gradalign.data.math_answers import squeeze_spaces
from verl_gradalign.data.rows import Row, files_of, read_file, read_hub
from verl_gradalign.data.sources import Source, year_of
from verl_gradalign.files import hash_file

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NUM_REASONS_KEPT = 5


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """One problem of a source: question and right answer, and where it stands, for messages."""

    source: str
    question: str
    truth: str
    key: str
    place: str


@dataclass
class Pool:
    """The distinct problems of one split of a source in the order of its files, and what happened to the other rows."""

    source: Source
    split: str
    origin: str
    is_drawn: bool = False  # generated, so that its order is random already, and as long as what is asked for
    problems: list[SourceProblem] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)  # path to SHA-256, or hub id to fingerprint
    num_rows: int = 0
    num_duplicates: int = 0
    num_conflicting: int = 0  # duplicates whose answer differs from the one kept
    num_other_years: int = 0
    num_skipped: int = 0
    first_reasons: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        """Return the pool's entry in the manifest; the hash is of the questions and answers, in order."""
        digest = sha256()
        for problem in self.problems:
            digest.update(f"{problem.question}\0{problem.truth}\0".encode())
        return {
            "source": self.source.name,
            "split": self.split,
            "from": self.origin,
            "files": self.files,
            "rows": self.num_rows,
            "distinct": len(self.problems),
            "duplicates_removed": self.num_duplicates,
            "duplicates_with_another_answer": self.num_conflicting,
            "rows_of_other_years": self.num_other_years,
            "bad_rows_skipped": self.num_skipped,
            "first_reasons": self.first_reasons,
            "problems_sha256": digest.hexdigest(),
        }


def normalise_question(text: str) -> str:
    """Return the text by which questions are compared.

    Letter case, Unicode variants, white space around signs, dollar signs and LaTeX's sizes and thin spaces do not
    count, nor does a closing full stop.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])|\\[!,;:()\[\]]|\$", " ", text)
    return squeeze_spaces(text).rstrip(".")


def load_pool(source: Source, split: str, origin: str | None = None, skip_bad_rows: bool = False) -> Pool:
    """Return the pool of a split, read from a file, a folder or a hub id; without `origin`, from the source's hub id.

    With `skip_bad_rows`, rows that lack a column, a question or an answer are counted and left out.
    Raises: ValueError naming file and row for anything unusable, or if no problem is left.
    """
    pool = Pool(source, split, origin or source.hub_id or "")
    # Filled row by row, and questions normalised once: the hub's DAPO-Math-17k holds every problem 100 times.
    kept: dict[str, SourceProblem] = {}
    keys: dict[str, str] = {}
    for row in _rows(pool):
        pool.num_rows += 1
        try:
            if source.year and year_of(row) not in (None, source.year):
                pool.num_other_years += 1
                continue
            question, truth = source.read(row)
        except ValueError as error:
            if not skip_bad_rows:
                raise
            pool.num_skipped += 1
            pool.first_reasons = [*pool.first_reasons, str(error)][:NUM_REASONS_KEPT]
            continue
        key = keys.get(question) or keys.setdefault(question, normalise_question(question))
        problem = SourceProblem(source.name, question, truth, key, row.place)
        first = kept.setdefault(key, problem)
        if first is not problem:
            pool.num_duplicates += 1
            pool.num_conflicting += first.truth != truth
    pool.problems = list(kept.values())
    if not pool.problems:
        reason = f"none of its {pool.num_rows} rows is usable" if pool.num_rows else "it has no rows"
        of_year = f" of {source.year}" if pool.num_other_years else ""
        raise ValueError(f"{pool.origin} holds no problems{of_year} for {source.name}: {reason}; give other files")
    return pool


def draw_pool(source: Source, num: int, seed: int) -> Pool:
    """Return a pool of `num` generated problems."""
    pool = Pool(source, source.train_split, f"generated with seed {seed}", is_drawn=True, num_rows=num)
    for number, problem in enumerate(draw_countdown_problems(num, seed), start=1):
        key = normalise_question(problem.question)
        place = f"generated {source.name}, row {number}"
        pool.problems.append(SourceProblem(source.name, problem.question, problem.truth, key, place))
    return pool


def _rows(pool: Pool) -> Iterable[Row]:
    """Return the rows of the pool's origin, and note in the pool which files they are read from."""
    path = Path(pool.origin)
    if path.exists():
        files = files_of(path, pool.split)
        pool.files = {str(file): hash_file(file) for file in files}
        return (row for file in files for row in read_file(file))
    if not HUB_ID.fullmatch(pool.origin):
        raise ValueError(
            f"{pool.origin} for {pool.source.name} is no file, folder or hub id (owner/name); correct the path"
        )
    config = pool.source.hub_config if pool.origin == pool.source.hub_id else None
    rows, fingerprint = read_hub(pool.origin, config, pool.split)
    pool.files = {pool.origin: fingerprint}
    return rows
