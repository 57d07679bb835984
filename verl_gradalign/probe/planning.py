# SPDX-License-Identifier: Apache-2.0
"""Which rank scores which problem, and in which micro-batch: whole problems, longest first.

A norm needs all of a problem's tokens in one place, so problems are never cut. Pure functions; every rank that is
given the same numbers finds the same plan.

    budget = TokenBudget(max_tokens=16384, is_padded=False)
    ranks = assign([p.num_tokens for p in problems], num_ranks=8)
    micro_batches = pack(mine, budget)
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from verl_gradalign.types import ProblemRows


@dataclass(frozen=True)
class TokenBudget:
    """What one micro-batch of one rank may hold."""

    max_tokens: int
    """Positions, padding included."""
    is_padded: bool
    """Whether rows are padded to the longest of the micro-batch, or packed."""

    def positions(self, problems: Sequence[ProblemRows]) -> int:
        """Return the positions that `problems` take together."""
        if self.is_padded:
            return sum(p.num_rows for p in problems) * max((p.longest_row for p in problems), default=0)
        return sum(p.num_tokens for p in problems)

    def holds(self, problems: Sequence[ProblemRows]) -> bool:
        return self.positions(problems) <= self.max_tokens


def assign(costs: Sequence[int], num_ranks: int) -> list[int]:
    """Return the rank of each problem: longest first, each to the rank with the least so far.

    No rank gets more than 4/3 of the best possible (Graham, 1969).
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    ranks = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(loads)
        ranks[index] = rank
        heapq.heappush(loads, (load + costs[index], rank))
    return ranks


def pack(problems: Sequence[ProblemRows], budget: TokenBudget) -> list[list[int]]:
    """Return micro-batches of problem indices, each within the budget: longest first, into the first that has room.

    Raises: ValueError if a problem alone exceeds the budget.
    """
    micro_batches: list[list[int]] = []
    # By the longest row, so that rows padded to one width have similar lengths.
    for index in sorted(range(len(problems)), key=lambda i: (-problems[i].longest_row, -problems[i].num_tokens)):
        if not budget.holds([problems[index]]):
            raise ValueError(
                f"a problem takes {budget.positions([problems[index]])} positions, more than the {budget.max_tokens} "
                "of a micro-batch; raise gradalign.probe.max_tokens_per_rank (max_tokens, without verl) or score it "
                "with backward"
            )
        for members in micro_batches:
            if budget.holds([problems[i] for i in [*members, index]]):
                members.append(index)
                break
        else:
            micro_batches.append([index])
    return micro_batches
