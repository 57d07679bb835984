# SPDX-License-Identifier: Apache-2.0
"""The problems of the CPU miniatures (configs/regime/*_mini.yaml), and the tiny policies that they start from.

Each has the structure of a published regime: what is wrong with the pool, and what the trusted set and the test are of.

    files = write_miniature("unreliable_mini", "data/seed-0", seed=0)
    model = prepare_policy("outputs/policy")
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from verl_gradalign.data.tasks import AUDIT, FAMILIES, GUESS, ROTATION, SHARING_FAMILIES, write_splits
from verl_gradalign.files import atomic_folder

NUM_POOL = 2000
NUM_SMALL_POOL = 256
NUM_LARGE_POOL = 6000
NUM_GUESSES = 3000  # nearly all that there are
NUM_TRUSTED = 64
NUM_TEST = 800
NUM_AUDIT = 200
WARM_UP_STEPS = 1200
TWO_STYLES, HALF_LEARNED = "two_styles", "half_learned"
# Demonstrations of each family. The sooner a family is learned, the fewer it gets: all are half learned at one time.
DEMONSTRATED = {"subtraction": 48, "addition": 42, "maximum": 10, "reversal": 6, "sorting": 12, ROTATION: 4, GUESS: 6}


@dataclass(frozen=True)
class WarmUp:
    """How a policy is made: arguments of `warmup.warm_up`."""

    families: Sequence[str] = FAMILIES
    is_clean: bool = False
    stop_after: int | None = None


POLICIES = {
    TWO_STYLES: WarmUp(),
    # Of clean answers alone, and stopped at a high learning rate: what is half learned so goes on to be learned from
    # few right responses, as it does not once the learning rate has come down.
    HALF_LEARNED: WarmUp(
        [family for family, num in DEMONSTRATED.items() for _ in range(num)], is_clean=True, stop_after=230
    ),
}
SKILLS = ("addition", "subtraction")
"""What is mostly wanted of the half learned policy."""
REVERSAL = "reversal"


@dataclass(frozen=True)
class Miniature:
    """Shares of the families in each split, which add up to 1, and how much there is to train on."""

    pool: Mapping[str, float]
    trusted: Mapping[str, float]
    test: Mapping[str, float]
    corrupted_share: float = 0.0
    num_pool: int = NUM_POOL
    policy: str = TWO_STYLES
    """What is trained: a name of POLICIES."""
    wanted: tuple[str, ...] = ()
    """Families that accuracy is over and an oracle trains on. (): those that the trusted set is of."""
    group_size: int = 8
    """Responses to a problem where runs are compared on one budget: the fewer, the noisier are gradients."""
    num_responses: int = 10_240
    """What a run generates where runs are compared on one budget and none is given, trusted ones included."""
    num_tuning_responses: int = 5_120
    """What a run generates that a learning rate is tried in."""
    learning_rates: tuple[float, ...] = (2e-4, 4e-4, 8e-4)
    """What is tried where the learning rate is tuned; the middle one is that of the regime's file."""
    threshold: float | None = None
    """Accuracy that runs on one budget are to reach. None: what random choice has towards the end."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The families that are wanted."""
        return self.wanted or tuple(self.trusted)

    @property
    def label(self) -> str:
        """What share of the selection is watched: of corrupted problems, or of those of the wanted families."""
        return "corrupted" if self.corrupted_share else "target"

    def share(self, shares: Mapping[str, float]) -> float:
        """Return the watched share, of a mapping from "corrupted" and families to shares."""
        if self.corrupted_share:
            return shares["corrupted"]
        return sum(share for name, share in shares.items() if name in self.targets)

    def is_useful(self, family: str, is_corrupted: bool) -> bool:
        """Return whether a problem of the pool is one that an oracle would train on."""
        return family in self.targets and not is_corrupted


SLOW = (1e-4, 2e-4, 4e-4)


def _even(families: tuple[str, ...], total: float = 1.0) -> dict[str, float]:
    return dict.fromkeys(families, total / len(families))


DISTRACTORS = tuple(family for family in FAMILIES if family not in (*SKILLS, GUESS))
_HABIT = Miniature(pool=_even(SHARING_FAMILIES), trusted=_even(SHARING_FAMILIES), test=_even(SHARING_FAMILIES))
_SKILL = Miniature(
    pool=_even(SKILLS),
    trusted=_even(SKILLS),
    test=_even(SKILLS),
    policy=HALF_LEARNED,
    learning_rates=SLOW,
    threshold=0.66,
)
MINIATURES = {
    # Of the published regimes, for ten updates each.
    "unreliable_mini": replace(_HABIT, corrupted_share=0.5),
    "imbalance_mini": Miniature(
        pool={**_even(SHARING_FAMILIES, 0.88), ROTATION: 0.12},
        trusted={ROTATION: 1.0},
        test={ROTATION: 0.5, **_even(SHARING_FAMILIES, 0.5)},
    ),
    "low_utility_mini": Miniature(
        pool={**_even(SHARING_FAMILIES, 0.15), ROTATION: 0.35, GUESS: 0.5},
        trusted=_even(SHARING_FAMILIES),
        test=_even(SHARING_FAMILIES),
    ),
    # For comparisons on one budget.
    "clean_mini": _SKILL,
    "coin_flips_mini": replace(_HABIT, corrupted_share=0.75, num_pool=NUM_SMALL_POOL, group_size=4, threshold=0.65),
    "inverted_mini": replace(_SKILL, corrupted_share=0.45, num_pool=2 * NUM_SMALL_POOL),
    "rare_mini": replace(
        _SKILL, pool={**_even(SKILLS, 0.12), **_even(DISTRACTORS, 0.72), GUESS: 0.16}, num_pool=NUM_LARGE_POOL
    ),
    "useless_mini": replace(_SKILL, pool={**_even(SKILLS, 0.15), GUESS: 0.85}, num_pool=round(NUM_GUESSES / 0.85)),
    # The trusted set is slightly off: its gradient has a cosine of one half with that of what is wanted.
    "off_target_mini": replace(
        _SKILL,
        pool={REVERSAL: 0.12, **_even((*SKILLS, "sorting", "maximum"), 0.72), GUESS: 0.16},
        trusted={ROTATION: 1.0},
        test={REVERSAL: 1.0},
        wanted=(REVERSAL,),
        num_pool=NUM_LARGE_POOL,
        threshold=0.6,
    ),
}


def _named(shares: Mapping[str, float], num: int) -> list[str]:
    """Return `num` family names in these shares, rounded so that none is lost."""
    counts = np.diff(np.round(np.cumsum([0.0, *shares.values()]) * num).astype(int))
    return [str(family) for family in np.repeat(list(shares), counts)]


def write_miniature(name: str, folder: str | Path, seed: int) -> dict[str, Path]:
    """Write test, trusted, pool and audit.parquet of a miniature, and return their paths by split.

    The audit set is of the trusted set's families, and no prompt of it stands elsewhere.

    Raises: ValueError for an unknown name.
    """
    if name not in MINIATURES:
        raise ValueError(f"regime={name!r} is no miniature; choose one of {', '.join(MINIATURES)}")
    of = MINIATURES[name]
    shares = {"test": (of.test, NUM_TEST), "trusted": (of.trusted, NUM_TRUSTED), "pool": (of.pool, of.num_pool)}
    shares[AUDIT] = (of.trusted, NUM_AUDIT)
    splits = {split: _named(*share_and_num) for split, share_and_num in shares.items()}
    return write_splits(folder, splits, of.corrupted_share, seed)


def policy_folder(folder: str | Path, name: str) -> Path:
    """Return where `prepare_policy` puts the policy of that name."""
    folder = Path(folder)
    return folder if name == TWO_STYLES else folder.with_name(f"{folder.name}-{name}")


def prepare_policy(
    folder: str | Path,
    num_steps: int = WARM_UP_STEPS,
    progress: Callable[[dict[str, float]], None] | None = None,
    name: str = TWO_STYLES,
) -> Path:
    """Return the folder of the warmed-up policy of that name, making it first unless it is there.

    It is `folder` for the usual one, and stands beside it for another, so that comparisons may share one --policy.
    `num_steps`: that its learning rate is laid out for.
    """
    folder, how = policy_folder(folder, name), POLICIES[name]
    if not (folder / "config.json").exists():
        from verl_gradalign.toy.model import build_untrained_policy
        from verl_gradalign.toy.warmup import warm_up

        with atomic_folder(folder) as unfinished, tempfile.TemporaryDirectory() as untrained:
            model = build_untrained_policy(untrained)
            warm_up(model, unfinished, num_steps, 0, progress, how.families, how.is_clean, how.stop_after)
    return folder
