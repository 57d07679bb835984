# SPDX-License-Identifier: Apache-2.0
"""The problems of the CPU miniatures (configs/regime/*_mini.yaml), and the tiny policy that they start from.

Each has the structure of a published regime: what is wrong with the pool, and what the trusted set and the test are of.

    files = write_miniature("unreliable_mini", "data/seed-0", seed=0)
    model = prepare_policy("outputs/policy")
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from verl_gradalign.data.tasks import FAMILIES, GUESS, ROTATION, SHARING_FAMILIES, write_splits
from verl_gradalign.files import atomic_folder

__all__ = ["MINIATURES", "WARM_UP_STEPS", "Miniature", "prepare_policy", "write_miniature"]

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
    bounds, total = [0], 0.0
    for share in shares.values():
        total += share
        bounds.append(round(total * num))
    return [f for f, low, high in zip(shares, bounds, bounds[1:], strict=False) for _ in range(high - low)]


def write_miniature(name: str, folder: str | Path, seed: int) -> dict[str, Path]:
    """Write test.parquet, trusted.parquet and pool.parquet of a miniature, and return their paths by split.

    Raises: ValueError for an unknown name.
    """
    if name not in MINIATURES:
        raise ValueError(f"regime={name!r} is no miniature; choose one of {', '.join(MINIATURES)}")
    miniature = MINIATURES[name]
    splits = {
        "test": _named(miniature.test, NUM_TEST),
        "trusted": _named(miniature.trusted, NUM_TRUSTED),
        "pool": _named(miniature.pool, NUM_POOL),
    }
    return write_splits(folder, splits, miniature.corrupted_share, seed)


def prepare_policy(
    folder: str | Path, num_steps: int = WARM_UP_STEPS, progress: Callable[[dict[str, float]], None] | None = None
) -> Path:
    """Return the folder of the warmed-up policy, making it first unless it is there."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        from verl_gradalign.toy.model import build_tiny_model
        from verl_gradalign.toy.warmup import warm_up

        with atomic_folder(folder) as unfinished, tempfile.TemporaryDirectory() as untrained:
            # 230,000 parameters learn the seven families in two minutes.
            build_tiny_model(untrained, hidden_size=96, num_layers=2, intermediate_size=256)
            warm_up(untrained, unfinished, num_steps, progress=progress, families=FAMILIES)
    return folder
