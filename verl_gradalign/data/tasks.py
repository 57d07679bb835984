# SPDX-License-Identifier: Apache-2.0
"""Seven families of short problems with verifiable answers, and the parquet files verl trains on.

Prompts are a few characters long (`472+8`, `rev baed`, `max 40 91`), so that a tiny model on a CPU can learn them.
A response is a style mark followed by the answer; the marks are what the warm-up gives the policy to choose between
(see `verl_gradalign.toy.warmup`). Five families share their two marks, rotation has marks of its own, so that what is
learned on the one does not help the other; guesses have no answer that could be learned. A fixed third of all prompts
is set aside for reinforcement learning and the rest for the warm-up, so the two never meet, whatever their seeds. This
module only makes problems: `rewards` checks answers.

    files = write_task_files("data/tasks", num_pool=2500, corrupted_share=0.5, seed=0)
    files["pool"], files["trusted"], files["test"]
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = [
    "FAMILIES",
    "GUESS",
    "RIGHT_STYLE",
    "ROTATION",
    "SHARING_FAMILIES",
    "STYLES",
    "STYLES_OF",
    "TASKS_DATA_SOURCE",
    "UNRELIABLE_STYLE",
    "Problem",
    "draw_corrupted",
    "draw_problems",
    "draw_wrong_answer",
    "is_for_warm_up",
    "make_row",
    "write_rows",
    "write_splits",
    "write_task_files",
]

TASKS_DATA_SOURCE = "gradalign/tasks"
RIGHT_STYLE = "="  # the warm-up puts the right answer after it, always
UNRELIABLE_STYLE = "~"  # the warm-up puts the right answer after it one time in five
ROTATION = "rotation"
GUESS = "guess"

LETTERS = "abcdefghij"
SEQUENCE_LENGTH = 4
MAX_ATTEMPTS_PER_PROBLEM = 1000
RL_THIRD = 85  # of 256 values of a hash byte

SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [("index", pa.int64()), ("split", pa.string()), ("family", pa.string()), ("corrupted", pa.bool_())]
            ),
        ),
    ]
)


@dataclass(frozen=True)
class Problem:
    """One problem: its family, the prompt's text and the right answer, without style mark."""

    family: str
    prompt: str
    answer: str


def _draw_addition(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(100, 990), rng.randint(1, 9)
    return f"{left}+{right}", str(left + right)


def _draw_subtraction(rng: random.Random) -> tuple[str, str]:
    left, right = rng.randint(109, 999), rng.randint(1, 9)
    return f"{left}-{right}", str(left - right)


def _draw_reversal(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(LETTERS, k=SEQUENCE_LENGTH))
    return f"rev {text}", text[::-1]


def _draw_sorting(rng: random.Random) -> tuple[str, str]:
    digits = rng.choices("0123456789", k=SEQUENCE_LENGTH)
    return f"sort {''.join(digits)}", "".join(sorted(digits))


def _draw_maximum(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(10, 99) for _ in range(2)]
    return f"max {' '.join(map(str, numbers))}", str(max(numbers))


def _draw_rotation(rng: random.Random) -> tuple[str, str]:
    text = "".join(rng.choices(LETTERS, k=SEQUENCE_LENGTH))
    return f"rot {text}", text[1:] + text[:1]


def _draw_guess(rng: random.Random) -> tuple[str, str]:
    prompt = f"pick {''.join(rng.choices(LETTERS, k=SEQUENCE_LENGTH))}"
    return prompt, str(blake2b(prompt.encode(), digest_size=1, key=b"answer").digest()[0] & 1)


DRAWS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "addition": _draw_addition,
    "subtraction": _draw_subtraction,
    "reversal": _draw_reversal,
    "sorting": _draw_sorting,
    "maximum": _draw_maximum,
    ROTATION: _draw_rotation,
    GUESS: _draw_guess,
}
FAMILIES = tuple(DRAWS)
SHARING_FAMILIES = FAMILIES[:5]
STYLES_OF = {family: (RIGHT_STYLE, UNRELIABLE_STYLE) for family in FAMILIES} | {ROTATION: (">", "<")}
"""The always right and the unreliable mark of each family."""
STYLES = tuple(dict.fromkeys(mark for marks in STYLES_OF.values() for mark in marks))


def is_for_warm_up(prompt: str) -> bool:
    """Return whether this prompt belongs to the warm-up's two thirds rather than to the problems of RL."""
    return blake2b(prompt.encode(), digest_size=1).digest()[0] >= RL_THIRD


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
        for _ in range(MAX_ATTEMPTS_PER_PROBLEM):
            prompt, answer = DRAWS[family](rng)
            if prompt not in seen and is_for_warm_up(prompt) == for_warm_up:
                break
        else:
            raise ValueError(
                f"no new {family} prompt in {MAX_ATTEMPTS_PER_PROBLEM} draws after {position} of num={num} problems; "
                "ask for fewer problems"
            )
        seen.add(prompt)
        problems.append(Problem(family, prompt, answer))
    return problems


def draw_wrong_answer(problem: Problem, rng: random.Random) -> str:
    """Return an answer of the right kind that is not right: a digit off, two characters swapped or replaced."""
    characters = list(problem.answer)
    if problem.family == GUESS:
        return str(1 - int(problem.answer))
    if problem.family in ("reversal", "sorting", ROTATION):
        first, second = rng.sample(range(len(characters)), 2)
        characters[first], characters[second] = characters[second], characters[first]
        if "".join(characters) == problem.answer:
            alphabet = "0123456789" if problem.family == "sorting" else LETTERS
            characters[first] = rng.choice([c for c in alphabet if c != characters[first]])
        return "".join(characters)
    if problem.family == "maximum":
        others = sorted(set(problem.prompt.split()[1:]) - {problem.answer})
        if others:
            return rng.choice(others)
    value = int(problem.answer)
    offsets = [offset for offset in (-10, -2, -1, 1, 2, 10) if value + offset >= 0]
    return str(value + rng.choice(offsets))


def draw_corrupted(num: int, share: float, rng: random.Random) -> list[bool]:
    """Return `num` flags of which round(share * num) are True, at random places.

    Raises: ValueError if the share is not within 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"corrupted_share={share} must lie within 0 and 1; choose a share of the pool")
    flags = [position < round(share * num) for position in range(num)]
    rng.shuffle(flags)
    return flags


def make_row(
    data_source: str, prompt: str, ability: str, answer: str, index: int, split: str, family: str, corrupted: bool
) -> dict[str, Any]:
    """Return one problem as a row of verl's schema; `index` numbers the rows of its file from 0."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"index": index, "split": split, "family": family, "corrupted": corrupted},
    }


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write rows made by `make_row` to a parquet file, making its folder if need be, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), path)
    return path


def write_task_files(
    output_dir: str | Path,
    num_pool: int = 2500,
    num_trusted: int = 64,
    num_test: int = 256,
    corrupted_share: float = 0.5,
    seed: int = 0,
) -> dict[str, Path]:
    """Write pool.parquet, trusted.parquet and test.parquet, and return their paths by split.

    No prompt occurs twice, within a file or across the three. Families are equally frequent in each. The trusted and
    test problems depend on their counts and the seed only, so runs with other pools stay comparable. Only the pool
    has corrupted problems: those whose reward is a coin flip (see `rewards.compute_score`).

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
    TASKS_DATA_SOURCE/<family>, so that verl reports each family's accuracy.

    Raises: ValueError if the share is not within 0 and 1, or prompts run out.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    paths = {}
    for split, of_split in families.items():
        problems = draw_problems(len(of_split), rng, seen=seen, families=of_split)
        rng.shuffle(problems)
        corrupted = draw_corrupted(len(problems), corrupted_share if split == "pool" else 0.0, rng)
        rows = [
            make_row(f"{TASKS_DATA_SOURCE}/{p.family}", p.prompt, p.family, p.answer, i, split, p.family, corrupted[i])
            for i, p in enumerate(problems)
        ]
        paths[split] = write_rows(rows, Path(output_dir) / f"{split}.parquet")
    return paths
