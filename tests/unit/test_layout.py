# SPDX-License-Identifier: Apache-2.0
"""Where rows and problems lie in a micro-batch: the layout's several views of it agree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_gradalign.probe.layout import packed_layout, padded_layout, row_sums

CPU = torch.device("cpu")
GROUP = object()
"""Stands for the ranks that have the other slices, which a layout only hands on."""


@st.composite
def layouts(draw):
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=6).filter(any))
    if draw(st.booleans()):
        return padded_layout(sum(counts), draw(st.integers(1, 5)), counts)
    lengths = draw(st.lists(st.integers(1, 5), min_size=sum(counts), max_size=sum(counts)))
    return packed_layout(lengths, sum(lengths) + draw(st.integers(0, 3)), counts)


@settings(deadline=None)
@given(layout=layouts(), factor=st.integers(1, 3))
def test_rows_and_problems_cover_all_positions_in_order(layout, factor):
    wide = layout.widened(factor)
    positions = [p for row in wide.rows() for p in range(row.start, row.stop)]
    assert positions == list(range(wide.shape[0] * wide.shape[1])) and len(wide.rows()) == wide.num_rows
    rows = [r for problem in wide.problems() for r in range(problem.start, problem.stop)]
    assert rows == list(range(wide.num_rows)) and len(wide.problems()) == wide.num_problems
    row_N, narrow_N = wide.row_of_position(CPU), layout.row_of_position(CPU)
    for index, row in enumerate(wide.rows()):
        assert (row_N[row] == index).all() and len(row_N[row]) == factor * (narrow_N == index).sum()
    problem_R = wide.problem_of_row(CPU)
    for index, problem in enumerate(wide.problems()):
        assert (problem_R[problem] == index).all()
        assert wide.positions_of(problem).stop - wide.positions_of(problem).start == sum(
            row.stop - row.start for row in wide.rows()[problem]
        )


@settings(deadline=None)
@given(layout=layouts(), max_rows=st.integers(1, 8))
def test_runs_of_alike_problems_cover_all_and_are_alike(layout, max_rows):
    counts = [problem.stop - problem.start for problem in layout.problems()]
    runs = list(layout.alike(max_rows))
    assert [p for run in runs for p in range(run.start, run.stop)] == list(range(layout.num_problems))
    for run in runs:
        members = counts[run]
        if len(members) > 1:
            assert layout.is_padded and len(set(members)) == 1 and sum(members) <= max_rows


@settings(deadline=None)
@given(layout=layouts(), factor=st.integers(1, 3), max_rows=st.integers(1, 8))
def test_a_part_is_the_layout_of_its_positions_alone(layout, factor, max_rows):
    wide = layout.widened(factor)
    for run in wide.alike(max_rows):
        part = wide.part(run)
        rows = slice(wide.problem_bounds[run.start], wide.problem_bounds[run.stop])
        assert part.num_problems == run.stop - run.start and part.num_rows == rows.stop - rows.start
        assert [r.stop - r.start for r in part.rows()] == [r.stop - r.start for r in wide.rows()[rows]]
        assert [p.stop - p.start for p in part.problems()] == [p.stop - p.start for p in wide.problems()[run]]
        assert part.shape[0] * part.shape[1] == part.row_bounds[-1]
        if part.num_problems > 1:
            assert part.is_padded


@settings(deadline=None)
@given(layout=layouts(), factor=st.integers(1, 3))
def test_merged_rows_are_the_problems(layout, factor):
    whole = [(rows.stop - rows.start,) for rows in layout.problems()]
    merged = layout.merged(whole)
    assert merged.problems() == [slice(i, i + 1) for i in range(layout.num_problems)]
    assert merged.rows() == [layout.positions_of(rows) for rows in layout.problems()]
    assert merged.shape[0] * merged.shape[1] == layout.shape[0] * layout.shape[1]
    single = layout.merged([(1,) * num_rows for (num_rows,) in whole])
    assert (single.rows(), single.problems()) == (layout.rows(), layout.problems())
    assert merged.widened(factor) == layout.widened(factor).merged(whole)


@settings(deadline=None)
@given(layout=layouts(), seed=st.integers(0, 100), has_factor=st.booleans())
def test_row_sums_add_up_the_positions_of_each_row(layout, seed, has_factor):
    generator = torch.Generator().manual_seed(seed)
    num_positions = layout.shape[0] * layout.shape[1]
    # Whole numbers, so that sums are exact in any order.
    values_NF = torch.randint(-9, 9, (num_positions, 3), generator=generator).double()
    factor_N = torch.randint(-9, 9, (num_positions,), generator=generator).double() if has_factor else None
    weighted_NF = values_NF if factor_N is None else values_NF * factor_N.unsqueeze(-1)
    expected_RF = torch.stack([weighted_NF[row].sum(dim=0) for row in layout.rows()])
    assert torch.equal(row_sums(values_NF, layout, torch.float64, factor_N), expected_RF)


@settings(deadline=None)
@given(layout=layouts(), num_slices=st.integers(1, 4), data=st.data())
def test_slices_have_each_position_once_and_their_row_sums_add_up(layout, num_slices, data):
    num_positions = layout.shape[0] * layout.shape[1]
    cuts = [0, *sorted(data.draw(st.integers(0, num_positions)) for _ in range(num_slices - 1)), num_positions]
    values_NF = torch.arange(2 * num_positions, dtype=torch.float64).view(num_positions, 2)
    total_RF = torch.zeros(layout.num_rows, 2, dtype=torch.float64)
    for window in map(slice, cuts, cuts[1:]):
        part = layout.sliced(window, GROUP)
        assert part.group is GROUP and not part.is_padded and part.problems() == layout.problems()
        assert part.row_bounds[0] == 0 and part.row_bounds[-1] == part.shape[1] == window.stop - window.start
        assert all(each.group is GROUP for each in (part.part(slice(0, 1)), part.widened(2)))
        total_RF += row_sums(values_NF[window], part, torch.float64)
    assert torch.equal(total_RF, row_sums(values_NF, layout, torch.float64))


@settings(deadline=None)
@given(layout=layouts(), data=st.data())
def test_responses_alone_follow_one_another(layout, data):
    lengths = [data.draw(st.integers(0, 4)) for _ in range(layout.num_rows)]
    responses = layout.of_responses(lengths)
    assert [row.stop - row.start for row in responses.rows()] == lengths
    assert responses.problems() == layout.problems()
    assert responses.shape[0] * responses.shape[1] == sum(lengths)


def test_a_padding_suffix_counts_to_the_last_row():
    assert packed_layout([5, 9, 7], 24, (3,)).row_bounds == (0, 5, 14, 24)


def test_rows_that_no_problem_claims_are_refused():
    with pytest.raises(ValueError, match="problems have 3 rows, but the micro-batch has 4"):
        padded_layout(4, 10, (2, 1))
