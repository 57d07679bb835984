# SPDX-License-Identifier: Apache-2.0
"""Plans for whole problems: which rank, and which micro-batch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.passes import assign, pack
from verl_gradalign.types import ProblemRows

GRAHAM = 4 / 3


@st.composite
def problem_sizes(draw):
    lengths = draw(st.lists(st.integers(1, 40), max_size=6))
    return ProblemRows("", (), len(lengths), sum(lengths), max(lengths, default=0))


costs = st.lists(st.integers(0, 1000), max_size=40)


@settings(deadline=None)
@given(costs=costs, num_ranks=st.integers(1, 9))
def test_every_problem_gets_one_rank_and_the_same_one_each_time(costs, num_ranks):
    ranks = assign(costs, num_ranks)
    assert len(ranks) == len(costs) and all(0 <= rank < num_ranks for rank in ranks)
    assert ranks == assign(list(costs), num_ranks)


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 1000), min_size=1, max_size=40), num_ranks=st.integers(1, 9))
def test_no_rank_gets_more_than_four_thirds_of_the_best_possible(costs, num_ranks):
    loads = [0] * num_ranks
    for cost, rank in zip(costs, assign(costs, num_ranks), strict=True):
        loads[rank] += cost
    longest = sorted(costs, reverse=True)
    # No plan does better than these: a mean load, the longest, and two of the first num_ranks + 1 on one rank.
    least = max(sum(costs) / num_ranks, longest[0])
    if len(costs) > num_ranks:
        least = max(least, longest[num_ranks - 1] + longest[num_ranks])
    assert max(loads) <= GRAHAM * least


def test_the_longest_problem_is_assigned_first():
    assert assign([1, 1, 1, 3], num_ranks=2) == [1, 1, 1, 0]


@settings(deadline=None)
@given(sizes=st.lists(problem_sizes(), max_size=12), max_tokens=st.integers(1, 500), is_padded=st.booleans())
def test_every_problem_is_packed_once_within_the_budget_or_refused(sizes, max_tokens, is_padded):
    budget = TokenBudget(max_tokens, is_padded)
    if not all(budget.holds([size]) for size in sizes):
        with pytest.raises(ValueError, match=f"more than the {max_tokens}.*max_tokens_per_rank.*estimator=backward"):
            pack(sizes, budget)
        return
    micro_batches = pack(sizes, budget)
    assert sorted(index for members in micro_batches for index in members) == list(range(len(sizes)))
    for members in micro_batches:
        assert members and budget.positions([sizes[index] for index in members]) <= max_tokens


@settings(deadline=None)
@given(sizes=st.lists(problem_sizes(), min_size=2, max_size=12), is_padded=st.booleans())
def test_no_problem_would_have_fitted_into_an_earlier_micro_batch(sizes, is_padded):
    budget = TokenBudget(240, is_padded)
    micro_batches = pack(sizes, budget)
    for later, members in enumerate(micro_batches):
        for earlier in micro_batches[:later]:
            assert not budget.holds([sizes[index] for index in [*earlier, members[0]]])


def test_padded_rows_count_as_long_as_the_longest():
    sizes = [ProblemRows("", (), 2, 12, 10), ProblemRows("", (), 3, 6, 2)]
    assert TokenBudget(100, is_padded=True).positions(sizes) == 50
    assert TokenBudget(100, is_padded=False).positions(sizes) == 18


def test_no_problems_take_no_room():
    assert TokenBudget(1, is_padded=True).positions([]) == 0 and pack([], TokenBudget(1, is_padded=False)) == []
