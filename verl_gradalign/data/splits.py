# SPDX-License-Identifier: Apache-2.0
"""Which problems of which source go into train, trusted and test, so that no problem is in two of them.

A request is `NAME[@SPLIT][:COUNT]`: `gsm8k`, `dapo:17000`, `math@test:200`. A count draws at random, by the seed;
`webinstruct:first-40000` takes the first ones of the file instead. Test problems are chosen first, then trusted ones,
then train ones from what is left, so that neither depends on how many train problems are asked for.

    chosen = choose_problems({"test": [parse_request("gsm8k", "test")], ...}, pools, seed=0, drop_overlap=False)
    chosen["train"].problems
"""

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from verl_gradalign.data.pools import Pool, SourceProblem
from verl_gradalign.data.sources import SOURCES

SPLITS = ("test", "trusted", "train")  # in the order in which they choose
REQUEST = re.compile(r"(?P<name>[^@:]+)(?:@(?P<split>[^@:]+))?(?::(?P<first>first-)?(?P<count>\d+))?")
# Why a problem of a pool is not in a split, as the manifest names it: it is in the split already, from an earlier
# request; in another split from the same source; in another split from another source.
REASONS = ("duplicates_removed", "held_out_for_another_split", "overlaps_removed")
DUPLICATE, HELD_OUT, OVERLAP = REASONS


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
    left_out: dict[str, Counter[str]] = field(default_factory=lambda: {reason: Counter() for reason in REASONS})


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
    requests: Mapping[str, Sequence[Request]], pools: Mapping[tuple[str, str], Pool], seed: int, drop_overlap: bool
) -> dict[str, ChosenProblems]:
    """Return the problems of each split.

    A problem of two splits stays in the one that chooses first. If both requests name the same source, it is left out
    of the other and counted: that is how one source is divided. If they name different sources, their data overlap,
    which is refused unless `drop_overlap`; then it is left out and counted as well. The whole pool is inspected, not
    only the problems that the seed draws.
    Raises: ValueError naming both places of an overlap, or the request that asks for more problems than are left.
    """
    chosen = {split: ChosenProblems() for split in SPLITS}
    taken: dict[str, tuple[str, SourceProblem]] = {}

    def reason_to_leave_out(problem: SourceProblem, split: str) -> str | None:
        if problem.key not in taken:
            return None
        other_split, other = taken[problem.key]
        if other_split == split:
            return DUPLICATE
        if other.source == problem.source:
            return HELD_OUT
        if drop_overlap:
            return OVERLAP
        raise ValueError(
            f"{problem.place}, asked for by --{split} {problem.source}, is also {other.place}, which is in "
            f"{other_split} from {other.source}; name other data, or leave such problems out of {split} with "
            "--drop-overlap"
        )

    for split in SPLITS:
        for request in requests.get(split, ()):
            free = []
            for problem in pools[request.pool].problems:
                if reason := reason_to_leave_out(problem, split):
                    chosen[split].left_out[reason][request.name] += 1
                else:
                    free.append(problem)
            problems = _draw(request, split, free, pools[request.pool], seed)
            taken.update((problem.key, (split, problem)) for problem in problems)
            chosen[split].problems += problems
    return chosen


def _draw(request: Request, split: str, free: list[SourceProblem], pool: Pool, seed: int) -> list[SourceProblem]:
    count = len(free) if request.count is None else request.count
    if count > len(free) or not free:
        wanted = "all rows" if request.count is None else f"{count} problems"
        raise ValueError(
            f"--{split} {request.text} asks for {wanted}, but of the {pool.num_rows} rows of {pool.origin} "
            f"({pool.split}) {len(free)} are left ({pool.num_duplicates} duplicates, "
            f"{len(pool.problems) - len(free)} in use elsewhere); "
            + (f"ask for at most {len(free)}" if free else "leave the request out or ask for fewer elsewhere")
        )
    if request.takes_first or pool.is_drawn or count == len(free):
        return free[:count]
    # One order per pool and seed: who draws later gets what follows, whatever the counts of other sources.
    order = [problem.key for problem in pool.problems]
    random.Random(f"{seed} {pool.source.name} {pool.split}").shuffle(order)
    free_keys = {problem.key for problem in free}
    drawn = set(islice((key for key in order if key in free_keys), count))
    return [problem for problem in free if problem.key in drawn]
