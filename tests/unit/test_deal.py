# SPDX-License-Identifier: Apache-2.0
"""How the rows of problems are dealt to data-parallel ranks."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.integration.worker import build_shares, deal

group_sizes = st.lists(st.integers(0, 20), max_size=8)
world_sizes = st.integers(1, 9)


def make_problems(sizes: list[int]) -> list[tuple[str, list[str], int]]:
    return [(f"u{i}", [f"u{i}_{k}_0" for k in range(size)], 10 * size) for i, size in enumerate(sizes)]


@settings(deadline=None)
@given(sizes=group_sizes, dp_size=world_sizes)
def test_each_key_is_dealt_to_exactly_one_rank(sizes: list[int], dp_size: int) -> None:
    problems = make_problems(sizes)
    dealt = deal(problems, dp_size)
    assert len(dealt) == dp_size
    for i, (_, keys, _) in enumerate(problems):
        assert sorted(key for rank in dealt for key in rank[i]) == sorted(keys)


@settings(deadline=None)
@given(sizes=group_sizes, dp_size=world_sizes)
def test_ranks_differ_by_at_most_one_row_per_problem(sizes: list[int], dp_size: int) -> None:
    dealt = deal(make_problems(sizes), dp_size)
    for i, size in enumerate(sizes):
        counts = [len(rank[i]) for rank in dealt]
        assert max(counts) - min(counts) <= 1
        assert max(counts) <= math.ceil(size / dp_size)


@settings(deadline=None)
@given(sizes=group_sizes, dp_size=world_sizes)
def test_key_k_of_problem_i_goes_to_rank_k_plus_i(sizes: list[int], dp_size: int) -> None:
    problems = make_problems(sizes)
    dealt = deal(problems, dp_size)
    for i, (_, keys, _) in enumerate(problems):
        for k, key in enumerate(keys):
            assert key in dealt[(k + i) % dp_size][i]


@settings(deadline=None)
@given(sizes=group_sizes, dp_size=world_sizes)
def test_shares_say_the_same_of_each_problem_on_all_ranks(sizes: list[int], dp_size: int) -> None:
    problems = make_problems(sizes)
    shares_by_rank = []
    for mine in deal(problems, dp_size):
        table = [key for keys in mine for key in keys]
        shares = build_shares(problems, mine, {key: row for row, key in enumerate(table)})
        assert [table[row] for share in shares for row in share.rows] == table
        shares_by_rank.append(shares)
    for i, (uid, keys, num_tokens) in enumerate(problems):
        for shares in shares_by_rank:
            assert (shares[i].uid, shares[i].num_rows, shares[i].num_tokens) == (uid, len(keys), num_tokens)
        assert sum(len(shares[i].rows) for shares in shares_by_rank) == len(keys)
