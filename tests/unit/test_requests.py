# SPDX-License-Identifier: Apache-2.0
"""How the rows of problems are assigned to data-parallel ranks, and what each rank is asked for."""

import math
import pickle
import pickletools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from verl_gradalign.config import DirectionConfig, GradAlignConfig, ProbeConfig
from verl_gradalign.integration.requests import (
    ProblemKeys,
    audited_problems,
    build_direction_requests,
    build_requests,
    build_shares,
    keys_by_rank,
    owners_of,
    sequence_parallel,
    token_budget,
)
from verl_gradalign.probe.call import DirectionRequest, ScoringRequest
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.selection.groups import Group, Problem

row_lengths = st.lists(st.integers(1, 40), max_size=20)
groups_of_lengths = st.lists(row_lengths, max_size=8)
world_sizes = st.integers(1, 9)
WHOLE = [name for name, estimator in ESTIMATORS.items() if estimator.needs_whole_problems]
SPREAD = [name for name, estimator in ESTIMATORS.items() if not estimator.needs_whole_problems]


def make_problems(groups: list[list[int]]) -> list[ProblemKeys]:
    return [
        ProblemKeys(f"u{i}", tuple(f"u{i}_{k}_0" for k in range(len(lengths))), tuple(lengths))
        for i, lengths in enumerate(groups)
    ]


@settings(deadline=None)
@given(groups=groups_of_lengths, dp_size=world_sizes, data=st.data())
def test_each_key_is_assigned_to_exactly_one_rank(groups, dp_size, data):
    problems = make_problems(groups)
    owners = data.draw(st.lists(st.none() | st.integers(0, dp_size - 1), min_size=len(groups), max_size=len(groups)))
    assigned = keys_by_rank(problems, owners, dp_size)
    assert len(assigned) == dp_size
    for i, problem in enumerate(problems):
        assert sorted(key for rank in assigned for key in rank.get(i, ())) == sorted(problem.keys)
        if owners[i] is not None:
            assert tuple(assigned[owners[i]].get(i, ())) == problem.keys


@settings(deadline=None)
@given(groups=groups_of_lengths, dp_size=world_sizes)
def test_spread_rows_are_assigned_evenly_each_problem_one_rank_further_on(groups, dp_size):
    problems = make_problems(groups)
    assigned = keys_by_rank(problems, [None] * len(problems), dp_size)
    for i, problem in enumerate(problems):
        counts = [len(rank.get(i, ())) for rank in assigned]
        assert max(counts) - min(counts) <= 1 and max(counts) <= math.ceil(len(problem.keys) / dp_size)
        for k, key in enumerate(problem.keys):
            assert key in assigned[(k + i) % dp_size][i]


@settings(deadline=None)
@given(groups=groups_of_lengths, dp_size=world_sizes, max_tokens=st.integers(1, 400), is_padded=st.booleans())
@pytest.mark.parametrize("estimator", WHOLE)
def test_problems_stay_on_one_rank_and_those_for_backward_are_spread(estimator, groups, dp_size, max_tokens, is_padded):
    problems, budget = make_problems(groups), TokenBudget(max_tokens, is_padded)
    for oversized in ("accumulate", "backward", "stop"):
        owners = owners_of(problems, estimator, budget, dp_size, oversized)
        for problem, owner in zip(problems, owners, strict=True):
            # Without norms there is nothing that backward is needed for.
            is_spread = oversized == "backward" and ESTIMATORS[estimator].gives_norm
            assert (owner is not None) == (not is_spread or budget.holds([problem.size]))
            assert owner is None or 0 <= owner < dp_size


@pytest.mark.parametrize("estimator", SPREAD)
def test_an_estimator_that_works_on_all_ranks_together_gets_spread_rows(estimator):
    problems = make_problems([[3, 4], [5]])
    assert owners_of(problems, estimator, TokenBudget(1000, is_padded=False), 2, "accumulate") == [None, None]


def test_owners_are_balanced_by_tokens_not_by_problems():
    problems = make_problems([[90], [30], [30], [30]])
    owners = owners_of(problems, "ghost", TokenBudget(1000, is_padded=False), 2, "accumulate")
    assert owners[1] == owners[2] == owners[3] != owners[0]


@settings(deadline=None)
@given(groups=groups_of_lengths, dp_size=world_sizes, is_whole=st.booleans())
def test_shares_say_the_same_of_each_problem_on_all_ranks(groups, dp_size, is_whole):
    problems = make_problems(groups)
    owners = [i % dp_size if is_whole else None for i in range(len(problems))]
    shares_by_rank = []
    for mine in keys_by_rank(problems, owners, dp_size):
        table = [key for keys in mine.values() for key in keys]
        shares = build_shares(problems, mine, {key: row for row, key in enumerate(table)})
        assert [table[row] for share in shares for row in share.rows] == table
        shares_by_rank.append(shares)
    assert all(len(shares) == len(problems) for shares in shares_by_rank)
    for i, problem in enumerate(problems):
        for shares in shares_by_rank:
            assert (shares[i].uid, shares[i].num_rows) == (problem.uid, len(problem.keys))
            assert shares[i].num_tokens == sum(problem.lengths)
            assert shares[i].longest_row == max(problem.lengths, default=0)
        assert sum(len(shares[i].rows) for shares in shares_by_rank) == len(problem.keys)


def verl_config(**actor):
    values = {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 512, "ppo_micro_batch_size_per_gpu": 2} | actor
    return OmegaConf.create(
        {
            "actor_rollout_ref": {"actor": values, "model": {"use_remove_padding": True}},
            "data": {"max_prompt_length": 10, "max_response_length": 20},
        }
    )


@pytest.mark.parametrize(
    ("probe", "actor", "expected"),
    [
        ({"max_tokens_per_rank": 77}, {}, 77),
        ({}, {}, 512),
        ({}, {"use_dynamic_bsz": False}, 2 * 30),
        ({}, {"use_dynamic_bsz": False, "ppo_micro_batch_size_per_gpu": None}, 30),
    ],
    ids=["configured", "dynamic", "fixed", "fixed-unset"],
)
def test_the_budget_is_the_configured_one_else_the_updates(probe, actor, expected):
    assert token_budget(ProbeConfig(**probe), verl_config(**actor)) == TokenBudget(expected, is_padded=False)


def test_the_budget_counts_padding_where_the_actor_pads():
    config = verl_config()
    config.actor_rollout_ref.model.use_remove_padding = False
    assert token_budget(ProbeConfig(), config).is_padded


def configuration(estimator, **probe):
    score = "cosine" if ESTIMATORS[estimator].gives_norm else "dot"
    values = {"score": score, "estimator": estimator, "probe": probe, "validation": {"files": ["t"]}}
    return GradAlignConfig.from_mapping(values)


def test_the_canary_is_due_in_the_first_of_every_so_many_scorings():
    config = configuration("ghost", canary_interval=3, canary_problems=2)
    sizes = [len(audited_problems(config, 10, step, num_scorings=step)) for step in range(7)]
    assert sizes == [2, 0, 0, 2, 0, 0, 2]


def test_a_canary_interval_of_zero_means_never():
    config = configuration("ghost", canary_interval=0)
    assert not any(audited_problems(config, 10, step, num_scorings=step) for step in range(5))


@pytest.mark.parametrize("estimator", [name for name, e in ESTIMATORS.items() if not e.is_exact])
def test_an_approximate_estimator_is_measured_in_every_selection(estimator):
    config = configuration(estimator, fidelity_problems=4)
    for step in range(5):
        chosen = audited_problems(config, 10, step, num_scorings=step)
        assert len(set(chosen)) == 4 and list(chosen) == sorted(chosen) and set(chosen) <= set(range(10))


def test_backward_is_not_compared_with_itself():
    assert audited_problems(configuration("backward"), 10, step=0, num_scorings=0) == ()


def test_no_more_problems_are_audited_than_there_are():
    assert audited_problems(configuration("ghost", canary_problems=5), 2, 0, 0) == (0, 1)
    assert audited_problems(configuration("ghost"), 0, 0, 0) == ()


def test_audited_problems_depend_on_seed_and_step_only():
    config = configuration("low_rank", fidelity_problems=3)
    first = [audited_problems(config, 100, step, num_scorings=0) for step in range(4)]
    assert first == [audited_problems(config, 100, step, num_scorings=9) for step in range(4)]
    assert len(set(first)) > 1
    assert first != [audited_problems(replace(config, seed=1), 100, step, num_scorings=0) for step in range(4)]


def in_halves(num: int) -> tuple[int, ...]:
    return tuple(int(k >= (num + 1) // 2) for k in range(num))


def make_groups(
    name: str, groups: list[list[int]], has_coefficients: bool = True
) -> tuple[list[Group], dict[str, int]]:
    problems = [(Problem(f"{name}{i}", i, "tasks"), lengths) for i, lengths in enumerate(groups)]
    lengths = {f"{p.uid}_{k}_0": length for p, each in problems for k, length in enumerate(each)}
    made = [
        Group(
            p,
            tuple(f"{p.uid}_{k}_0" for k in range(len(each))),
            sum(each),
            (),
            False,
            True,
            (),
            tuple(float(k) for k in range(len(each))) if has_coefficients else (),
            in_halves(len(each)),
        )
        for p, each in problems
    ]
    return made, lengths


nonempty_groups = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=6)


@settings(deadline=None)
@given(
    trusted=nonempty_groups,
    candidates=nonempty_groups,
    dp_size=st.integers(1, 4),
    copies=st.integers(1, 2),
    max_tokens=st.integers(1, 200),
)
@pytest.mark.parametrize("estimator", ["ghost", "backward"])
def test_requests_cover_every_row_once_and_end_each_table_with_the_shortest_row(
    estimator, trusted, candidates, dp_size, copies, max_tokens
):
    trusted_groups, trusted_lengths = make_groups("t", trusted)
    candidate_groups, candidate_lengths = make_groups("c", candidates)
    length = trusted_lengths | candidate_lengths
    tags = [{"seq_len": value} for value in length.values()]
    batch = KVBatchMeta(keys=list(length), tags=tags, partition_id="train")
    budget = TokenBudget(max_tokens, is_padded=False)
    weights = {"first": 1.0, "second": 2.0}
    request = ScoringRequest(estimator, ProbeConfig(), DirectionConfig(), budget, 1.0, "trusted", weights, audited=(0,))
    sets = {"first": trusted_groups[:1], "second": trusted_groups[1:]}
    dp_rank_of = [rank for rank in range(dp_size) for _ in range(copies)]
    metas, requests = build_requests(batch, sets, candidate_groups, dp_rank_of, request)
    assert len(metas) == len(requests) == len(dp_rank_of)
    assert [meta.keys for meta in metas[::copies]] == [meta.keys for meta in metas[copies - 1 :: copies]]
    computed: list[str] = []
    for meta, mine in list(zip(metas, requests, strict=True))[::copies]:
        assert len(set(meta.keys)) == len(meta.keys)
        assert length[meta.keys[-1]] == min(length.values())
        assert mine == replace(
            request, trusted=mine.trusted, candidates=mine.candidates, coefficients=_coefficients_of(meta)
        )
        assert [len(mine.trusted[name]) for name in weights] == [1, len(trusted) - 1]
        shares = [*mine.trusted["first"], *mine.trusted["second"], *mine.candidates]
        computed += [meta.keys[row] for share in shares for row in share.rows]
        for share, group in zip(shares, [*trusted_groups, *candidate_groups], strict=True):
            assert share.is_split == (len(group.keys) > 1)
            sessions = [int(meta.keys[row].split("_")[1]) for row in share.rows]
            halves = in_halves(len(group.keys))
            assert share.halves == (tuple(halves[s] for s in sessions) if share.is_split else ())
        for share, group in zip(mine.candidates, candidate_groups, strict=True):
            is_whole = estimator == "ghost" and budget.holds([ProblemKeys("", group.keys, _of(group, length)).size])
            assert not is_whole or tuple(meta.keys[row] for row in share.rows) in ((), group.keys)
    assert sorted(computed) == sorted(length)


def test_shares_are_sent_without_an_object_for_each_problem_of_other_ranks():
    problems = make_problems([[900] * 16] * 640)
    owners = owners_of(problems, "ghost", TokenBudget(20_000, is_padded=False), 64, "accumulate")
    table = {key: row for row, key in enumerate(key for problem in problems for key in problem.keys)}
    shares = build_shares(problems, keys_by_rank(problems, owners, 64)[3], table)
    sent = pickle.dumps(shares)
    assert sum(len(share.rows) for share in shares) == 10 * 16 and len(shares) == 640
    received = pickle.loads(sent)
    assert list(received) == list(shares) and shares[-1] == received[639] and received[1:3] == shares[1:3]
    made = [op for op, _, _ in pickletools.genops(sent) if op.name in ("NEWOBJ", "BUILD", "REDUCE")]
    assert len(made) < 50


@given(
    trusted=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=5),
    dp_size=st.integers(1, 4),
)
def test_requests_for_a_direction_cover_every_row_once_in_the_rows_own_partition(trusted, dp_size):
    groups, length = make_groups("t", trusted)
    batch = KVBatchMeta(keys=list(length), tags=[{"seq_len": v} for v in length.values()], partition_id="kept")
    weights = {"first": 1.0, "absent": 2.0, "second": 0.5}
    request = DirectionRequest(DirectionConfig(), TokenBudget(9, is_padded=True), 1.0, weights)
    sets = {"first": groups[:1], "second": groups[1:]}
    metas, requests = build_direction_requests(batch, sets, range(dp_size), request)
    assert {meta.partition_id for meta in metas} == {"kept"}
    computed = []
    for meta, mine in zip(metas, requests, strict=True):
        assert mine == replace(request, trusted=mine.trusted, coefficients=_coefficients_of(meta))
        assert list(mine.trusted) == list(weights)
        assert length[meta.keys[-1]] == min(length.values())
        assert [len(shares) for shares in mine.trusted.values()] == [1, 0, len(groups) - 1]
        computed += [meta.keys[row] for shares in mine.trusted.values() for share in shares for row in share.rows]
    assert sorted(computed) == sorted(length)


def test_coefficients_are_not_sent_where_some_are_not_known():
    groups, length = make_groups("t", [[3, 4]])
    others, more = make_groups("u", [[5]], has_coefficients=False)
    batch = KVBatchMeta(
        keys=[*length, *more], tags=[{"seq_len": v} for v in (length | more).values()], partition_id="kept"
    )
    request = DirectionRequest(DirectionConfig(), TokenBudget(9, is_padded=True), 1.0, {"one": 1.0})
    _, (sent,) = build_direction_requests(batch, {"one": [*groups, *others]}, [0], request)
    assert sent.coefficients == ()


def _coefficients_of(meta: KVBatchMeta) -> tuple[float, ...]:
    return tuple(float(key.split("_")[1]) for key in meta.keys)


def _of(group: Group, length: dict[str, int]) -> tuple[int, ...]:
    return tuple(length[key] for key in group.keys)


@pytest.mark.parametrize("key", ["ulysses_sequence_parallel_size", "fsdp_config.ulysses_sequence_parallel_size"])
def test_ranks_that_have_slices_of_rows_hold_a_micro_batch_together(key):
    actor = {"use_dynamic_bsz": True, "ppo_max_token_len_per_gpu": 1000, "ppo_micro_batch_size_per_gpu": 2}
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {"actor": actor, "model": {"use_remove_padding": True}},
            "data": {"max_prompt_length": 100, "max_response_length": 400},
        }
    )
    assert token_budget(ProbeConfig(), config).max_tokens == 1000
    OmegaConf.update(config, f"actor_rollout_ref.actor.{key}", 4)
    assert sequence_parallel(config) == (f"actor_rollout_ref.actor.{key}", 4)
    assert token_budget(ProbeConfig(), config).max_tokens == 4000
    assert token_budget(ProbeConfig(max_tokens_per_rank=300), config).max_tokens == 1200
    config.actor_rollout_ref.actor.use_dynamic_bsz = False  # a number of rows, whichever ranks have slices of them
    assert token_budget(ProbeConfig(), config).max_tokens == 1000
