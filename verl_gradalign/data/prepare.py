# SPDX-License-Identifier: Apache-2.0
"""From data sets as they are published to the files that verl trains and tests on: what `verl-gradalign prepare` does.

The output folder gets train.parquet, trusted.parquet and test.parquet (the last two if asked for; all tests in one
file, distinguished by data_source) and manifest.json: what was asked for, what was found, kept and left out, and
SHA-256 hashes. Equal arguments and inputs give equal files. The folder appears at the end, complete, or not at all.
What is repaired in rows is counted by name; what cannot be repaired, or is not graded by the reward function as
`self_grading` demands, is refused, or left out and counted.

    plan = PreparationPlan(train=("gsm8k",), trusted=("gsm8k:64",), test=("gsm8k",), origins={"gsm8k": "path/to/gsm8k"})
    manifest = prepare(plan, Path("data/gsm8k"))
"""

import json
import platform
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import verl_gradalign
from verl_gradalign.data.rewards import compute_score
from verl_gradalign.data.rows import read_file
from verl_gradalign.data.schema import PREPARED_SCHEMA, draw_corrupted, write_rows
from verl_gradalign.data.self_grading import RewardFunction, grading_fault, load_reward_function
from verl_gradalign.data.sources import SOURCES
from verl_gradalign.data.splits import (
    SPLITS,
    ChosenProblems,
    FindFault,
    Request,
    SourceProblem,
    choose_problems,
    load_pool,
    parse_request,
)
from verl_gradalign.files import atomic_folder, hash_file


@dataclass(frozen=True)
class PreparationPlan:
    """What to prepare; the requests are explained in `splits`."""

    train: tuple[str, ...]  # requests for training problems; at least one
    trusted: tuple[str, ...] = ()  # requests for the trusted set, whose gradient is the direction
    test: tuple[str, ...] = ()  # requests for test problems
    corrupted_share: float = 0.0  # share of the train problems whose reward is a coin flip, within 0 and 1
    seed: int = 0  # of every draw: which problems, their order in train, which are corrupted, generated problems
    # File, folder or hub id by source ("dapo") or by source and split ("gsm8k@test"); others come from their hub id.
    origins: Mapping[str, str] = field(default_factory=dict)
    drop_overlap: bool = False  # leave out, instead of refusing, problems that two sources bring into two splits
    skip_bad_rows: bool = False  # leave out, instead of refusing, rows that cannot be asked or graded
    reward: str = "pkg://verl_gradalign.data.rewards:compute_score"  # what training will grade with

    def __post_init__(self) -> None:
        if not self.train:
            raise ValueError("train=() asks for no training problems; name at least one source, e.g. --train gsm8k")
        if not 0.0 <= self.corrupted_share <= 1.0:
            raise ValueError(f"corrupted_share={self.corrupted_share} must lie within 0 and 1; choose a share of train")
        for name in self.origins:
            source, _, _ = name.partition("@")
            if source not in SOURCES:
                raise ValueError(f"--from {name}=... names no source; use one of {', '.join(SOURCES)}")

    def requests(self) -> dict[str, list[Request]]:
        """Return the requests of each split, taken apart.

        Raises: ValueError for a malformed request, a generated source without count, or two requests of one split that
            draw from the same rows.
        """
        requests = {split: [parse_request(text, split) for text in getattr(self, split)] for split in SPLITS}
        for split, of_split in requests.items():
            for r in of_split:
                if [other.pool for other in of_split].count(r.pool) > 1:
                    raise ValueError(f"--{split} names {r.name} twice; ask for it once, with the sum of the counts")
                if r.count is None and SOURCES[r.name].hub_id is None and not self.origin_of(r):
                    raise ValueError(f"--{split} {r.text} is generated and needs a count; write {r.name}:500")
        return requests

    def origin_of(self, request: Request) -> str | None:
        """Return where the plan says that the request's rows are; None: on the hub, or generated."""
        return self.origins.get(f"{request.name}@{request.source_split}") or self.origins.get(request.name)


def prepare(plan: PreparationPlan, output: Path) -> dict[str, Any]:
    """Write the plan's files into the folder `output` and return the manifest.

    Raises: ValueError, leaving no output behind, if `output` is there already and not empty, or for anything in the
        plan or its inputs that cannot be used; the message names file and row where there is one, and the remedy.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there already; remove it or choose another --output")
    requests, reward = plan.requests(), load_reward_function(plan.reward)
    asked = [request for of_split in requests.values() for request in of_split]
    pools = {}
    for pool, r in {r.pool: r for r in asked}.items():
        num = sum(other.count or 0 for other in asked if other.pool == pool)
        source, origin = SOURCES[r.name], plan.origin_of(r)
        pools[pool] = load_pool(source, r.source_split, origin, plan.skip_bad_rows, num, plan.seed)
    chosen = choose_problems(requests, pools, plan.seed, plan.drop_overlap, fault_finder(reward))
    with atomic_folder(output) as folder:
        hashes, splits = {}, {}
        for split in reversed(SPLITS):
            rows = _make_rows(chosen[split], split, plan)
            by_source = dict(Counter(problem.source for problem in chosen[split].problems))
            num_corrupted = sum(row["extra_info"]["corrupted"] for row in rows)
            splits[split] = {"rows": len(rows), "by_source": by_source, "corrupted": num_corrupted}
            splits[split] |= chosen[split].left_out
            if rows:
                path = write_rows(rows, folder / f"{split}.parquet", PREPARED_SCHEMA)
                hashes[path.name] = hash_file(path)
        versions = {"verl_gradalign": verl_gradalign.__version__, "python": platform.python_version()}
        manifest = {
            "plan": asdict(plan),
            "splits": splits,
            "sources": [pool.describe() for pool in pools.values()],
            "sha256": hashes,
            "versions": versions | {name: version(name) for name in ("pyarrow", "datasets")},
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (folder / "manifest.json").write_text(text, encoding="utf-8")
    return dict(json.loads(text))


def _make_rows(chosen: ChosenProblems, split: str, plan: PreparationPlan) -> list[dict[str, Any]]:
    """Return a split's rows in verl's schema; train is shuffled and part of it marked as corrupted."""
    problems, share = list(chosen.problems), 0.0
    if split == "train":
        random.Random(f"order {plan.seed}").shuffle(problems)
        share = plan.corrupted_share
    corrupted = draw_corrupted(len(problems), share, random.Random(f"corrupted {plan.seed}"))
    return [
        SOURCES[p.source].row(p.as_read, index=i, split=split, corrupted=corrupted[i], source=p.place)
        for i, p in enumerate(problems)
    ]


def fault_finder(reward: RewardFunction) -> FindFault:
    """Return what says how the reward function fails on a problem; None: it does not."""

    def find(problem: SourceProblem) -> str | None:
        source = SOURCES[problem.source]
        row = source.row(problem.as_read, index=0, split="train", corrupted=False)
        fault = grading_fault(row, reward, [source.answer_form])
        return None if fault is None else fault.message

    return find


def write_gsm8k(jsonl_path: str | Path, output_path: str | Path, split: str, max_rows: int | None = None) -> Path:
    """Write GSM8K's lines {"question": ..., "answer": ...} as rows of verl's schema, and return the parquet's path.

    The prompt is the question followed by GSM8K's instruction; the ground truth is what follows "####", commas removed.
    `max_rows` keeps the first lines only; blank lines are passed over.
    Raises: ValueError naming file and line if a line is not such an object, its answer lacks "####", or the reward
        function does not grade it; if no line is left, or if max_rows is below 1.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows} must be at least 1; leave it out to keep every row")
    source = SOURCES["gsm8k"]
    rows: list[dict[str, Any]] = []
    for read in islice(read_file(Path(jsonl_path)), max_rows):
        rows.append(source.row(source.read(read), index=len(rows), split=split, corrupted=False))
        if fault := grading_fault(rows[-1], compute_score, [source.answer_form]):
            raise ValueError(f"{read.place} {fault.message}; mend the answer or remove the line")
    if not rows:
        raise ValueError(f"{jsonl_path} holds no problems; download GSM8K's {split}.jsonl again")
    return write_rows(rows, Path(output_path))


# The published regimes; test sets in one file.
REGIMES = {
    # Half of the problems pay a coin flip, whatever the response.
    "unreliable": PreparationPlan(("dapo:17000",), ("amc22",), ("amc23", "aime24", "aime25"), corrupted_share=0.5),
    # 11.8% of the pool are what the trusted set is about.
    "imbalance": PreparationPlan(
        ("countdown:4000", "webinstruct:20000", "dapo:10000"), ("countdown:200",), ("countdown:500",)
    ),
    # A large corpus of which little helps.
    "low_utility": PreparationPlan(("webinstruct:first-40000",), ("amc22",), ("amc23", "aime24", "aime25", "mmlu_pro")),
    "learnalign_gsm8k": PreparationPlan(("gsm8k",), ("gsm8k:64",), ("gsm8k",)),
}
