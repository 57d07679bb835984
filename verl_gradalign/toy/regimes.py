# SPDX-License-Identifier: Apache-2.0
"""The problems of the CPU miniatures (configs/regime/*_mini.yaml), and the tiny policy that they start from.

Each has the structure of a published regime: what is wrong with the pool, and what the trusted set and the test are of.

    files = write_miniature("unreliable_mini", "data/seed-0", seed=0)
    model = prepare_policy("outputs/policy")
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl_gradalign.data.tasks import FAMILIES, GUESS, ROTATION, SHARING_FAMILIES, write_splits
from verl_gradalign.files import atomic_folder

NUM_POOL = 2000
NUM_TRUSTED = 64
NUM_TEST = 800
WARM_UP_STEPS = 1200


@dataclass(frozen=True)
class Miniature:
    """Shares of the families in each split; they add up to 1."""

    pool: Mapping[str, float]
    trusted: Mapping[str, float]
    test: Mapping[str, float]
    corrupted_share: float = 0.0

    @property
    def label(self) -> str:
        """What share of the selection is watched: of corrupted problems, or of those that the trusted set is of."""
        return "corrupted" if self.corrupted_share else "target"

    def share(self, shares: Mapping[str, float]) -> float:
        """Return the watched share, of a mapping from "corrupted" and families to shares."""
        if self.corrupted_share:
            return shares["corrupted"]
        return sum(share for name, share in shares.items() if name in self.trusted)


def _even(families: tuple[str, ...], total: float = 1.0) -> dict[str, float]:
    return dict.fromkeys(families, total / len(families))


MINIATURES = {
    "unreliable_mini": Miniature(
        pool=_even(SHARING_FAMILIES),
        trusted=_even(SHARING_FAMILIES),
        test=_even(SHARING_FAMILIES),
        corrupted_share=0.5,
    ),
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
}


def _named(shares: Mapping[str, float], num: int) -> list[str]:
    """Return `num` family names in these shares, rounded so that none is lost."""
    counts = np.diff(np.round(np.cumsum([0.0, *shares.values()]) * num).astype(int))
    return [str(family) for family in np.repeat(list(shares), counts)]


def write_miniature(name: str, folder: str | Path, seed: int) -> dict[str, Path]:
    """Write test.parquet, trusted.parquet and pool.parquet of a miniature, and return their paths by split.

    Raises: ValueError for an unknown name.
    """
    if name not in MINIATURES:
        raise ValueError(f"regime={name!r} is no miniature; choose one of {', '.join(MINIATURES)}")
    of = MINIATURES[name]
    shares = {"test": (of.test, NUM_TEST), "trusted": (of.trusted, NUM_TRUSTED), "pool": (of.pool, NUM_POOL)}
    splits = {split: _named(*share_and_num) for split, share_and_num in shares.items()}
    return write_splits(folder, splits, of.corrupted_share, seed)


def prepare_policy(
    folder: str | Path, num_steps: int = WARM_UP_STEPS, progress: Callable[[dict[str, float]], None] | None = None
) -> Path:
    """Return the folder of the warmed-up policy, making it first unless it is there."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        from verl_gradalign.toy.model import build_untrained_policy
        from verl_gradalign.toy.warmup import warm_up

        with atomic_folder(folder) as unfinished, tempfile.TemporaryDirectory() as untrained:
            warm_up(build_untrained_policy(untrained), unfinished, num_steps, progress=progress, families=FAMILIES)
    return folder
