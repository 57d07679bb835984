# SPDX-License-Identifier: Apache-2.0
"""Sources that a forecast avoids, and what was measured of them: a broken grader must not starve one unseen.

for source in starved_sources(counts, shares):
    print(source.in_words())
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STARVED = 0.2
"""A source is starved whose share of the forecast picks is below this part of its share of the pool ..."""
MIN_EXPECTED = 10.0
"""... where by its share as many forecast picks or more would be its own."""


@dataclass
class SourceCounts:
    """What became of a source's picks."""

    num_forecast: int = 0
    """Picks by forecast, measured or not."""
    num_uniform: int = 0
    num_measured: int = 0
    """Uniform picks that something was measured of."""
    sum_uniform: float = 0.0
    """Of what was measured of them: the score, 0 for dead groups."""


@dataclass(frozen=True)
class StarvedSource:
    """One source that hardly is among the forecast picks."""

    name: str
    pool_share: float
    picked_share: float
    counts: SourceCounts
    mean_uniform: float
    """What was measured of the uniform picks of all sources together."""

    @property
    def mean(self) -> float:
        """What was measured of its uniform picks, on average; nan where nothing was."""
        return self.counts.sum_uniform / self.counts.num_measured if self.counts.num_measured else float("nan")

    @property
    def is_suspect(self) -> bool:
        """Whether no measurement justifies it: there is none, all are zero, or they are as high as the others'."""
        return not (self.mean < self.mean_uniform and self.mean != 0)

    def in_words(self) -> str:
        """Return one sentence: the shares, and the reason."""
        shares = f"{self.name}: {self.pool_share:.0%} of the pool, {self.picked_share:.0%} of the forecast picks"
        num, measured = self.counts.num_uniform, self.counts.num_measured
        if not num:
            return f"{shares}; none of it was drawn uniformly, so nothing tells whether that is right"
        if not measured:
            return f"{shares}; none of its {num:,} uniform picks could be measured: look at its rewards"
        of_all = f"those of all sources {self.mean_uniform:.3g}"
        beside = f"its {measured:,} uniform picks score {self.mean:.3g} on average, {of_all}"
        if self.mean == 0:
            return f"{shares}, as {beside}; not one is above 0: look at its rewards"
        return f"{shares}, {'as' if self.mean < self.mean_uniform else 'although'} {beside}"


def starved_sources(counts: Mapping[str, SourceCounts], shares: Mapping[str, float]) -> list[StarvedSource]:
    """Return the sources of the pool that are starved, the largest first. `shares`: of the pool, by source."""
    num_forecast = sum(count.num_forecast for count in counts.values())
    measured = sum(count.num_measured for count in counts.values())
    mean = sum(count.sum_uniform for count in counts.values()) / measured if measured else float("nan")
    found = []
    for name, share in shares.items():
        own, expected = counts.get(name, SourceCounts()), share * num_forecast
        if expected >= MIN_EXPECTED and own.num_forecast < STARVED * expected:
            found.append(StarvedSource(name, share, own.num_forecast / num_forecast, own, mean))
    return sorted(found, key=lambda source: -source.pool_share)
