# SPDX-License-Identifier: Apache-2.0
"""A finding: what is said of a run, how good or bad it is, and what to change."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAIR", "GOOD", "NOISE", "NOTE", "PROBLEM", "WATCH", "Finding"]

GOOD, NOTE, WATCH, PROBLEM = "good", "note", "watch", "problem"

NOISE = 0.3
"""A reliability below which a ranking is mostly noise: under a third of its variance would come out again."""
FAIR = 0.5


@dataclass(frozen=True)
class Finding:
    """A sentence or two, with its verdict; the remedy names keys of the configuration."""

    topic: str
    verdict: str
    text: str
    remedy: str = ""
