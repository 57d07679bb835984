# SPDX-License-Identifier: Apache-2.0
"""Seven families of short problems with verifiable answers, and the parquet files verl trains on.

Prompts are a few characters long (`472+8`, `rev baed`, `max 40 91`), so that a tiny model on a CPU can learn them. A
response is a style mark followed by the answer; the marks are what the warm-up gives the policy to choose between (see
`verl_gradalign.toy.warmup`). Five families share their two marks; rotation has separate ones, so that what is learned
on the one does not help the other; guesses have no answer that could be learned. A fixed third of all prompts is set
aside for reinforcement learning and the rest for the warm-up, so the two never meet, whatever their seeds.

    files = write_task_files("data/tasks", num_pool=2500, corrupted_share=0.5, seed=0)
    files["pool"], files["trusted"], files["test"]
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from verl_gradalign.data.schema import draw_corrupted, make_row, write_rows

TASKS_DATA_SOURCE = "gradalign/tasks"
AUDIT = "audit"
"""A split that is tested on beside the test, under one data source of its own."""
RIGHT_STYLE = "="  # the warm-up puts the right answer after it, always
UNRELIABLE_STYLE = "~"  # the warm-up puts the right answer after it one time in five
ROTATION = "rotation"
GUESS = "guess"
SHARING_FAMILIES = ("addition", "subtraction", "reversal", "sorting", "maximum")
FAMILIES = (*SHARING_FAMILIES, ROTATION, GUESS)
STYLES_OF = {family: (RIGHT_STYLE, UNRELIABLE_STYLE) for family in FAMILIES} | {ROTATION: (">", "<")}
"""The always right and the unreliable mark of each family."""
STYLES = tuple(dict.fromkeys(mark for marks in STYLES_OF.values() for mark in marks))

LETTERS = "abcdefghij"
DIGITS = "0123456789"
SEQUENCE_LENGTH = 4
MAX_ATTEMPTS_PER_PROBLEM = 1000
RL_THIRD = 85  # of 256 values of a hash byte


@dataclass(frozen=True)
class Problem:
    """One problem: its family, the prompt's text and the right answer, without style mark."""

    family: str
    prompt: str
    answer: str


def _draw_problem(family: str, rng: random.Random) -> Problem:
    match family:
        case "addition":
            left, right = rng.randint(100, 990), rng.randint(1, 9)
            return Problem(family, f"{left}+{right}", str(left + right))
        case "subtraction":
            left, right = rng.randint(109, 999), rng.randint(1, 9)
            return Problem(family, f"{left}-{right}", str(left - right))
        case "maximum":
            left, right = rng.randint(10, 99), rng.randint(10, 99)
            return Problem(family, f"max {left} {right}", str(max(left, right)))
    text = "".join(rng.choices(DIGITS if family == "sorting" else LETTERS, k=SEQUENCE_LENGTH))
    match family:
        case "sorting":
            return Problem(family, f"sort {text}", "".join(sorted(text)))
        case "reversal":
            return Problem(family, f"rev {text}", text[::-1])
        case "rotation":
            return Problem(family, f"rot {text}", text[1:] + text[:1])
    return Problem(family, f"pick {text}", str(_hash_byte(f"pick {text}", key=b"answer") & 1))


def is_for_warm_up(prompt: str) -> bool:
    """Return whether this prompt belongs to the warm-up's two thirds rather than to the problems of RL."""
    return _hash_byte(prompt) >= RL_THIRD


def _hash_byte(text: str, key: bytes = b"") -> int:
    return blake2b(text.encode(), digest_size=1, key=key).digest()[0]


def draw_problems(
    num: int,
    rng: random.Random,
    for_warm_up: bool = False,
    seen: set[str] | None = None,
    families: Sequence[str] = SHARING_FAMILIES,
) -> list[Problem]:
    """Return `num` problems with distinct prompts, families in turn, so that their counts differ by one at most.

    `seen` holds prompts not to be drawn again; the prompts drawn are added to it.
    Raises: ValueError if a family runs out of distinct prompts.
    """
    seen = set() if seen is None else seen
    problems = []
    for position in range(num):
        family = families[position % len(families)]
        draws = (_draw_problem(family, rng) for _ in range(MAX_ATTEMPTS_PER_PROBLEM))
        free = (p for p in draws if p.prompt not in seen and is_for_warm_up(p.prompt) == for_warm_up)
        problem = next(free, None)
        if problem is None:
            why = f"no new {family} prompt in {MAX_ATTEMPTS_PER_PROBLEM} draws after {position} of num={num} problems"
            raise ValueError(f"{why}; ask for fewer problems")
        seen.add(problem.prompt)
        problems.append(problem)
    return problems


def draw_wrong_answer(problem: Problem, rng: random.Random) -> str:
    """Return an answer of the right kind that is not right: a digit off, two characters swapped or replaced."""
    if problem.family == GUESS:
        return str(1 - int(problem.answer))
    if problem.family in ("reversal", "sorting", ROTATION):
        characters = list(problem.answer)
        first, second = rng.sample(range(len(characters)), 2)
        characters[first], characters[second] = characters[second], characters[first]
        if "".join(characters) == problem.answer:
            alphabet = DIGITS if problem.family == "sorting" else LETTERS
            characters[first] = rng.choice([c for c in alphabet if c != characters[first]])
        return "".join(characters)
    if problem.family == "maximum":
        others = sorted(set(problem.prompt.split()[1:]) - {problem.answer})
        if others:
            return rng.choice(others)
    values = [int(problem.answer) + offset for offset in (-10, -2, -1, 1, 2, 10)]
    return str(rng.choice([value for value in values if value >= 0]))


def write_task_files(
    output_dir: str | Path,
    num_pool: int = 2500,
    num_trusted: int = 64,
    num_test: int = 256,
    corrupted_share: float = 0.5,
    seed: int = 0,
) -> dict[str, Path]:
    """Write pool.parquet, trusted.parquet and test.parquet, and return their paths by split.

    The five sharing families are equally frequent in each. The trusted and test problems depend on their counts and
    the seed only, so runs with other pools stay comparable. The rest is as in `write_splits`.
    Raises: ValueError if a count is below 1, the share is not within 0 and 1, or prompts run out.
    """
    sizes = {"test": num_test, "trusted": num_trusted, "pool": num_pool}
    for split, num in sizes.items():
        if num < 1:
            raise ValueError(f"num_{split}={num} must be at least 1; ask for at least one problem")
    families = {split: [SHARING_FAMILIES[i % len(SHARING_FAMILIES)] for i in range(n)] for split, n in sizes.items()}
    return write_splits(output_dir, families, corrupted_share, seed)


def write_splits(
    output_dir: str | Path, families: Mapping[str, Sequence[str]], corrupted_share: float = 0.0, seed: int = 0
) -> dict[str, Path]:
    """Write <split>.parquet for each split, one problem of each family that is named for it, in seeded order.

    No prompt occurs twice, within a file or across them; a split depends on those before it and on the seed. Of the
    split "pool" a share is corrupted: their reward is a coin flip (see `rewards.compute_score`). `data_source` is
    TASKS_DATA_SOURCE/<family>, so that verl reports each family's accuracy; of the split "audit" it is that name.
    Raises: ValueError if the share is not within 0 and 1, or prompts run out.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    paths = {}
    for split, of_split in families.items():
        problems = draw_problems(len(of_split), rng, seen=seen, families=of_split)
        rng.shuffle(problems)
        corrupted = draw_corrupted(len(problems), corrupted_share if split == "pool" else 0.0, rng)
        rows = []
        for i, (p, is_corrupted) in enumerate(zip(problems, corrupted, strict=True)):
            info = {"index": i, "split": split, "family": p.family, "corrupted": is_corrupted}
            source = f"{TASKS_DATA_SOURCE}/{AUDIT if split == AUDIT else p.family}"
            rows.append(make_row(source, p.prompt, p.family, p.answer, (), **info))
        paths[split] = write_rows(rows, Path(output_dir) / f"{split}.parquet")
    return paths
