# SPDX-License-Identifier: Apache-2.0
"""Which problems of which source go into train, trusted and test, so that no problem is in two of them.

A pool is all usable problems of one split of a source, each once: two problems are the same if their questions are,
after `normalise_question`. A request is `NAME[@SPLIT][:COUNT]`: `gsm8k`, `dapo:17000`, `math@test:200`. A count draws
at random, by the seed; `webinstruct:first-40000` takes the first ones of the file instead. Test problems are chosen
first, then trusted ones, then train ones from what is left, so that neither depends on how many train problems are
asked for. Every problem that is chosen is graded first, by what the caller gives for it: one whose own answer is not
right is refused, or left out and replaced by the next.

    requests = {"test": [parse_request("gsm8k", "test")], "train": [parse_request("gsm8k:500", "train")]}
    pools = {("gsm8k", split): load_pool(SOURCES["gsm8k"], split, "path/to/gsm8k") for split in ("train", "test")}
    choose_problems(requests, pools, seed=0, drop_overlap=False)["train"].problems
"""

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from verl_gradalign.data.chats import Turn
from verl_gradalign.data.countdown import draw_countdown_problems
from verl_gradalign.data.math_answers import squeeze_spaces
from verl_gradalign.data.rows import Row, files_of, read_file, read_hub
from verl_gradalign.data.sources import SOURCES, ReadProblem, Source, year_of
from verl_gradalign.data.values import REPAIRS
from verl_gradalign.files import hash_file

SPLITS = ("test", "trusted", "train")  # in the order in which they choose
REQUEST = re.compile(r"(?P<name>[^@:]+)(?:@(?P<split>[^@:]+))?(?::(?P<first>first-)?(?P<count>\d+))?")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NUM_REASONS_KEPT = 5

# What the manifest counts. Of a pool's rows: repeated questions, those of them whose answer differs from the one kept,
# rows of other years, rows that cannot be read. Of its problems: those whose answer the reward function does not grade.
NOT_IN_POOL = (
    "duplicates_removed",
    "duplicates_with_another_answer",
    "rows_of_other_years",
    "bad_rows_skipped",
    "ungraded_problems_skipped",
)
DUPLICATE, CONFLICTING, OTHER_YEAR, BAD_ROW, UNGRADED = NOT_IN_POOL
# Of a pool's problems: in the split already, from an earlier request; in another split, from the same source; in
# another split, from another source.
NOT_IN_SPLIT = (DUPLICATE, "held_out_for_another_split", "overlaps_removed")
_, HELD_OUT, OVERLAP = NOT_IN_SPLIT


@dataclass(frozen=True, slots=True)
class SourceProblem:
    """One problem of a source: question and right answer, and where it stands, for messages."""

    source: str
    question: str
    truth: str
    key: str
    place: str
    context: tuple[Turn, ...] = ()  # the turns before the question

    @property
    def as_read(self) -> ReadProblem:
        """What `Source.row` makes a row of."""
        return ReadProblem(self.question, self.truth, self.context)


FindFault = Callable[[SourceProblem], str | None]
"""Says what is wrong with the grading of a problem; None if nothing is."""


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
    left_out: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(NOT_IN_POOL, 0)))
    first_reasons: list[str] = field(default_factory=list)
    repairs: Counter[str] = field(default_factory=Counter)  # rows by what was repaired in them
    skips_bad_rows: bool = False
    graded: dict[str, bool] = field(default_factory=dict)  # by key, of the problems that were tried

    def skip(self, reason: str, error: ValueError) -> None:
        """Count what cannot be used and keep the first reasons. Raises: the error, unless such rows are skipped."""
        if not self.skips_bad_rows:
            raise ValueError(f"{error}, or leave such rows out with --skip-bad-rows") from error
        self.left_out[reason] += 1
        self.first_reasons = [*self.first_reasons, str(error)][:NUM_REASONS_KEPT]

    def is_graded(self, problem: SourceProblem, find_fault: FindFault) -> bool:
        """Return whether a problem of the pool is graded, trying and counting it once, whatever splits ask for it."""
        if problem.key not in self.graded:
            fault = find_fault(problem)
            if fault is not None:
                self.skip(UNGRADED, ValueError(f"{problem.place} {fault}; mend the answer"))
            self.graded[problem.key] = fault is None
        return self.graded[problem.key]

    def describe(self) -> dict[str, Any]:
        """Return the pool's entry in the manifest; the hash is of the questions and answers, in order."""
        texts = "".join(f"{as_one_text(p.context, p.question)}\0{p.truth}\0" for p in self.problems)
        return {
            "source": self.source.name,
            "split": self.split,
            "from": self.origin,
            "files": self.files,
            "rows": self.num_rows,
            "distinct": len(self.problems),
            **self.left_out,
            "repaired": {name: self.repairs[name] for name in REPAIRS if self.repairs[name]},
            "first_reasons": self.first_reasons,
            "problems_sha256": sha256(texts.encode()).hexdigest(),
        }


def normalise_question(text: str) -> str:
    """Return the text by which questions are compared.

    Letter case, Unicode variants, white space around signs, dollar signs and LaTeX's sizes and thin spaces do not
    count, nor does a closing full stop.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])|\\[!,;:()\[\]]|\$", " ", text)
    return squeeze_spaces(text).rstrip(".")


def as_one_text(context: Sequence[Turn], question: str) -> str:
    """Return the text of a question that is asked after other turns; the question itself without any."""
    return "\n".join([*(f"{turn.role}: {turn.content}" for turn in context), question])


def load_pool(
    source: Source, split: str, origin: str | None = None, skip_bad_rows: bool = False, num: int = 0, seed: int = 0
) -> Pool:
    """Return the pool of a split, read from a file, a folder or a hub id; without `origin`, from the source's hub id.

    Of a source without either, `num` problems are generated. With `skip_bad_rows`, rows that cannot be asked or graded
    are counted and left out.
    Raises: ValueError naming file and row for anything unusable, or if no problem is left.
    """
    pool = Pool(source, split, origin or source.hub_id or f"generated with seed {seed}")
    pool.is_drawn, pool.skips_bad_rows = not (origin or source.hub_id), skip_bad_rows
    # Filled row by row, and questions normalised once: the hub's DAPO-Math-17k holds every problem 100 times.
    kept: dict[str, SourceProblem] = {}
    keys: dict[str, str] = {}
    for row in _generate(source, num, seed) if pool.is_drawn else _read_rows(pool):
        pool.num_rows += 1
        try:
            if source.year and year_of(row) not in (None, source.year):
                pool.left_out[OTHER_YEAR] += 1
                continue
            read = source.read(row)
        except ValueError as error:
            pool.skip(BAD_ROW, error)
            continue
        pool.repairs.update(row.repairs)
        text = as_one_text(read.context, read.question)
        key = keys.get(text) or keys.setdefault(text, normalise_question(text))
        problem = SourceProblem(source.name, read.question, read.truth, key, row.place, read.context)
        first = kept.setdefault(key, problem)
        if first is not problem:
            pool.left_out[DUPLICATE] += 1
            pool.left_out[CONFLICTING] += first.truth != read.truth
    pool.problems = list(kept.values())
    if not pool.problems:
        reason = f"none of its {pool.num_rows} rows is usable" if pool.num_rows else "it has no rows"
        of_year = f" of {source.year}" if pool.left_out[OTHER_YEAR] else ""
        raise ValueError(f"{pool.origin} holds no problems{of_year} for {source.name}: {reason}; give other files")
    return pool


def _generate(source: Source, num: int, seed: int) -> Iterable[Row]:
    problems = enumerate(draw_countdown_problems(num, seed), start=1)
    return (Row(f"generated {source.name}, row {n}", {"nums": p.numbers, "target": p.target}) for n, p in problems)


def _read_rows(pool: Pool) -> Iterable[Row]:
    """Return the rows of the pool's origin, and note in the pool which files they are read from."""
    origin, source = pool.origin, pool.source
    if Path(origin).exists():
        files = files_of(Path(origin), pool.split)
        pool.files = {str(file): hash_file(file) for file in files}
        return (row for file in files for row in read_file(file))
    if not HUB_ID.fullmatch(origin):
        raise ValueError(f"{origin} for {source.name} is no file, folder or hub id (owner/name); correct the path")
    rows, fingerprint = read_hub(origin, source.hub_config if origin == source.hub_id else None, pool.split)
    pool.files = {origin: fingerprint}
    return rows


@dataclass(frozen=True)
class Request:
    """One value of --train, --trusted or --test, as written and taken apart; without `count` all rows are meant."""

    text: str
    name: str
    source_split: str
    count: int | None = None
    takes_first: bool = False

    @property
    def pool(self) -> tuple[str, str]:
        """The source and the split of it that the request draws from."""
        return self.name, self.source_split


@dataclass
class ChosenProblems:
    """One split: its problems in file order within each source, and what was left out, by reason and source."""

    problems: list[SourceProblem] = field(default_factory=list)
    left_out: dict[str, Counter[str]] = field(default_factory=lambda: {reason: Counter() for reason in NOT_IN_SPLIT})


def parse_request(text: str, split: str) -> Request:
    """Return the request taken apart; without @SPLIT, test requests draw from the source's test split, others from
    its train split.

    Raises: ValueError for an unknown source, a malformed request or a count of 0.
    """
    found = REQUEST.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"--{split} {text!r} is not NAME[@SPLIT][:COUNT]; write for example dapo:17000 or math@test")
    source = SOURCES.get(found["name"])
    if source is None:
        raise ValueError(f"--{split} {text!r} names no source; use one of {', '.join(SOURCES)}")
    count = int(found["count"]) if found["count"] else None
    if count == 0:
        raise ValueError(f"--{split} {text!r} asks for 0 problems; ask for at least 1 or leave the request out")
    default = source.test_split if split == "test" else source.train_split
    return Request(text, source.name, found["split"] or default, count, bool(found["first"]))


def choose_problems(
    requests: Mapping[str, Sequence[Request]],
    pools: Mapping[tuple[str, str], Pool],
    seed: int,
    drop_overlap: bool,
    find_fault: FindFault = lambda problem: None,
) -> dict[str, ChosenProblems]:
    """Return the problems of each split.

    A problem of two splits stays in the one that chooses first. If both requests name the same source, it is left out
    of the other and counted: that is how one source is divided. If they name different sources, their data overlap,
    which is refused unless `drop_overlap`; then it is left out and counted as well. The whole pool is inspected, not
    only the problems that the seed draws.
    Raises: ValueError naming both places of an overlap, the request that asks for more problems than are left, or the
        place of a problem that is not graded, unless its pool skips bad rows.
    """
    chosen = {split: ChosenProblems() for split in SPLITS}
    taken: dict[str, tuple[str, SourceProblem]] = {}
    for split in SPLITS:
        for request in requests.get(split, ()):
            free = []
            for problem in pools[request.pool].problems:
                if problem.key in taken:
                    reason = _reason_to_leave_out(problem, split, *taken[problem.key], drop_overlap)
                    chosen[split].left_out[reason][request.name] += 1
                else:
                    free.append(problem)
            problems = _draw(request, split, free, pools[request.pool], seed, find_fault)
            taken.update((problem.key, (split, problem)) for problem in problems)
            chosen[split].problems += problems
    return chosen


def _reason_to_leave_out(
    p: SourceProblem, split: str, other_split: str, other: SourceProblem, drop_overlap: bool
) -> str:
    """Return why a problem is left out of a split, being the `other` one, which another request took."""
    if other_split == split:
        return DUPLICATE
    if other.source == p.source:
        return HELD_OUT
    if drop_overlap:
        return OVERLAP
    raise ValueError(
        f"{p.place}, asked for by --{split} {p.source}, is also {other.place}, which is in {other_split} from "
        f"{other.source}; name other data, or leave such problems out of {split} with --drop-overlap"
    )


def _draw(
    request: Request, split: str, free: list[SourceProblem], pool: Pool, seed: int, find_fault: FindFault
) -> list[SourceProblem]:
    order = free
    if not (request.takes_first or pool.is_drawn or request.count in (None, len(free))):
        # One order per pool and seed: who draws later gets what follows, whatever the counts of other sources.
        keys, by_key = [problem.key for problem in pool.problems], {problem.key: problem for problem in free}
        random.Random(f"{seed} {pool.source.name} {pool.split}").shuffle(keys)
        order = [by_key[key] for key in keys if key in by_key]
    count = len(free) if request.count is None else request.count
    are_graded = (p.key for p in order if count > len(free) or pool.is_graded(p, find_fault))
    drawn = set(islice(are_graded, count))
    if not drawn or (request.count is not None and len(drawn) < count):
        wanted = "all rows" if request.count is None else f"{count} problems"
        remedy = f"ask for at most {len(drawn)}" if drawn else "leave the request out or ask for fewer elsewhere"
        raise ValueError(
            f"--{split} {request.text} asks for {wanted}, but of the {pool.num_rows} rows of {pool.origin} "
            f"({pool.split}) {len(drawn)} are left ({pool.left_out[DUPLICATE]} duplicates, "
            f"{pool.left_out[UNGRADED]} not graded, {len(pool.problems) - len(free)} in use elsewhere); {remedy}"
        )
    return [problem for problem in free if problem.key in drawn]
