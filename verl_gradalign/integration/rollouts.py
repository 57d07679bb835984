# SPDX-License-Identifier: Apache-2.0
"""Groups of finished rollouts read from TransferQueue: keys in order, rewards, advantages, coefficients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.advantages import asked, needs_values
from verl_gradalign.integration.coefficients import coefficients, of_tokens, row_sums, uniform, weighed
from verl_gradalign.integration.engine import COEFFICIENTS
from verl_gradalign.integration.rollout_correction import correction_of, is_over_all_rows
from verl_gradalign.selection.groups import (
    NON_FINITE,
    REWARD_NOT_FINITE,
    Group,
    Problem,
    halved,
    keys_by_uid,
    natural_order,
    session_of,
)
from verl_gradalign.selection.scores import score_of

ROWS_AT_ONCE = 2048


def read_groups(
    problems: Sequence[Problem],
    batch: KVBatchMeta,
    failed: set[str],
    config: GradAlignConfig,
    verl_config: DictConfig,
    is_scored: bool = True,
) -> list[Group]:
    """Return the group of every problem, in the order of `problems`, and store token coefficients beside the rollouts.

    Rewards are read from TransferQueue, advantages computed as training will compute them (`advantage: trainer`) or
    centred, and the coefficients written back under `gradalign_coefficients`; a step that scores nothing, and a score
    that looks at rewards alone, need neither, and with `measure=update` those of candidates are not stored. A group
    with a reward, or anything that training computes its loss from, that is not finite has failed, and is left out
    before advantages are computed: they may be normalised over all rows.

    Rows are read `ROWS_AT_ONCE`, so that memory does not grow with their number; all at once where it matters to
    advantages.
    """
    by_uid = keys_by_uid(batch.keys)
    tags = dict(zip(batch.keys, batch.tags, strict=True))
    groups = [_unread(p, by_uid.get(p.uid, []), tags, p.uid not in by_uid or p.uid in failed) for p in problems]
    is_measured = is_scored and score_of(config.score).needs_gradients
    is_stored = is_measured and is_read_by_a_pass(problems[0], config)
    # An estimator is not asked for advantages that nobody needs.
    needs_all = is_measured and (is_over_all_rows(verl_config) or not asked(config, verl_config).is_of_each_group)
    at_once = len(batch.keys) if needs_all else ROWS_AT_ONCE
    read: dict[str, Group] = {}
    for some in _parts([group for group in groups if not group.is_failed], at_once):
        of_some = _read_together(some, batch.partition_id, config, verl_config, is_measured, is_stored)
        read |= {group.problem.uid: group for group in of_some}
    return [read.get(group.problem.uid, group) for group in groups]


def is_read_by_a_pass(problem: Problem, config: GradAlignConfig) -> bool:
    """Return whether a pass of ours reads the problem's rows, by coefficients that are stored beside them.

    An update that measures weighs its rows itself; the direction is made of trusted ones by a pass all the same.
    """
    return not config.measures_in_update or problem.trusted_set is not None


def _parts(groups: Sequence[Group], max_rows: int) -> Iterator[list[Group]]:
    """Cut the groups into parts of so many rows at most; a larger group is a part of its own."""
    part: list[Group] = []
    num_rows = 0
    for group in groups:
        if part and num_rows + len(group.keys) > max_rows:
            yield part
            part, num_rows = [], 0
        part.append(group)
        num_rows += len(group.keys)
    if part:
        yield part


def _read_together(
    groups: Sequence[Group],
    partition_id: str,
    config: GradAlignConfig,
    verl_config: DictConfig,
    is_measured: bool,
    is_stored: bool,
) -> list[Group]:
    """Return some groups as they are read; see `read_groups`."""
    usable = {group.problem.uid: list(group.keys) for group in groups}
    correction = correction_of(verl_config) if is_stored else None
    fields = ["rm_scores", "response_mask", "input_ids", *_read_by_the_loss(config, verl_config, is_measured)]
    fields += ["old_log_probs"] if correction else []
    usable, data, failures = _finite_rows(partition_id, usable, fields)
    groups = [_failing(group, failures.get(group.problem.uid)) for group in groups]
    if data is None:
        return groups
    keys = [key for members in usable.values() for key in members]
    reward_R = row_sums(data["rm_scores"])
    reward_of = dict(zip(keys, reward_R.tolist(), strict=True))
    ids_of = dict(zip(keys, _row_bytes(data["input_ids"]), strict=True))
    of_one: dict[str, tuple[float, float]] = {}
    live: set[str] | None = None
    # A step that measures nothing needs no advantages (they may need a critic's values), and nothing is stored.
    if is_measured:
        table = weighed(data, reward_R, keys, correction, config, verl_config)
        coefficient_RT, live, odd = coefficients(table, usable, ids_of, config, verl_config)
        groups = [_failing(group, NON_FINITE if group.problem.uid in odd else None) for group in groups]
        of_one = dict(zip(keys, uniform(table.advantage_RT, coefficient_RT, table.mask_RT), strict=True))
        if is_stored:
            column = {COEFFICIENTS: of_tokens(coefficient_RT, data["response_mask"])}
            tq.kv_batch_put(keys=keys, partition_id=partition_id, fields=TensorDict(column, len(keys)))
    content = {key: ids_of[key] + repr(reward_of[key]).encode() for key in keys}

    def read(group: Group) -> Group:
        halves, ordered = zip(*halved(group.keys, content), strict=True)
        # One per session: that of its last output.
        rewards = tuple({key.rsplit("_", 1)[0]: reward_of[key] for key in ordered}.values())
        return replace(
            group,
            keys=ordered,
            halves=halves,
            rewards=rewards,
            is_live=len(set(rewards)) > 1 if live is None else group.problem.uid in live,
            advantages=tuple(of_one[key][0] for key in ordered if of_one),
            coefficients=tuple(of_one[key][1] for key in ordered if of_one),
        )

    return [group if group.is_failed else read(group) for group in groups]


def _read_by_the_loss(config: GradAlignConfig, verl_config: DictConfig, is_measured: bool) -> list[str]:
    """Return the columns, beside rewards, that advantages or the loss are computed from."""
    values = ["values"] if is_measured and needs_values(config, verl_config) else []
    correction = verl_config.algorithm.get("rollout_correction") or {}
    is_used = correction.get("rollout_is") or correction.get("rollout_rs") or correction.get("bypass_mode")
    return [*values, *(["rollout_log_probs"] if is_used else [])]


def _finite_rows(
    partition_id: str, members: dict[str, list[str]], fields: list[str]
) -> tuple[dict[str, list[str]], TensorDict | None, dict[str, str]]:
    """Return the groups (keys by uid) whose columns are all there and finite, their rows, and why the others fail.

    The rows stand in the order of the keys that are returned; None where no group is left.
    """

    failures: dict[str, str] = {}
    while members:
        keys = [key for of_group in members.values() for key in of_group]
        data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=fields)
        if "rm_scores" in data.keys():
            odd = odd_groups(data, members, fields)
        else:
            odd = dict.fromkeys(without_reward(partition_id, members), REWARD_NOT_FINITE)
        if not odd:
            return members, data, failures
        failures |= odd
        members = {uid: keys for uid, keys in members.items() if uid not in odd}
    return {}, None, failures


def without_reward(partition_id: str, members: Mapping[str, list[str]]) -> set[str]:
    """Return the groups (keys by uid) with a row that has no reward: verl stores none where a function returns None."""

    def have_rewards(keys: list[str]) -> bool:
        # TransferQueue leaves a column out that one of the rows asked for lacks.
        data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["rm_scores", "response_mask"])
        return "rm_scores" in data.keys()

    if not members or have_rewards([key for keys in members.values() for key in keys]):
        return set()
    return {uid for uid, keys in members.items() if not have_rewards(keys)}


def odd_groups(data: TensorDict, members: Mapping[str, list[str]], fields: Sequence[str]) -> dict[str, str]:
    """Return the groups with a row in which a column is not finite, and what they fail by."""
    owners = [uid for uid, keys in members.items() for _ in keys]
    odd: dict[str, str] = {}
    for name in fields:
        column = data.get(name, None)
        # All at once first: to tell rows apart takes them apart, and nearly always there is no need.
        if column is None or (column.values() if column.is_nested else column).isfinite().all():
            continue
        failure = REWARD_NOT_FINITE if name == "rm_scores" else NON_FINITE
        rows = zip(owners, column.unbind(), strict=True)
        odd = {uid: failure for uid, row in rows if not row.isfinite().all()} | odd
    return odd


def _failing(group: Group, failure: str | None) -> Group:
    return group if failure is None else replace(group, is_failed=True, failure=failure)


def _unread(problem: Problem, keys: Sequence[str], tags: Mapping[str, Any], is_failed: bool) -> Group:
    """Return a group of which only the keys and their lengths are known."""
    num_tokens, num_response_tokens = (sum(tags[key][name] for key in keys) for name in ("seq_len", "response_len"))
    return Group(problem, tuple(keys), num_tokens, (), is_failed, False, num_response_tokens=num_response_tokens)


def read_step(
    taken: Sequence[Problem],
    batch: KVBatchMeta,
    failed: set[str],
    config: GradAlignConfig,
    verl_config: DictConfig,
    is_scored: bool = True,
) -> tuple[list[Group], dict[str, list[Group]]]:
    """Return the groups of the candidates, and those of each trusted set that was rolled out; see `read_groups`."""

    def read(name: str | None) -> list[Group]:
        # Apart: advantages may be normalised over all that they are computed with.
        members = [problem for problem in taken if problem.trusted_set == name]
        return read_groups(members, batch, failed, config, verl_config, is_scored) if members else []

    trusted = {s.name: read(s.name) for s in config.validation.trusted_sets()}
    return read(None), {name: groups for name, groups in trusted.items() if groups}


def needs_completion(config: GradAlignConfig, verl_config: DictConfig, is_scored: bool) -> bool:
    """Return whether rows lack what is read of them: a colocated reward model's rewards, values, log-probs."""
    reward_model = verl_config.reward.reward_model
    is_colocated = reward_model.enable and not reward_model.enable_resource_pool
    return is_colocated or (is_scored and (needs_values(config, verl_config) or needs_log_probs(config, verl_config)))


def needs_log_probs(config: GradAlignConfig, verl_config: DictConfig) -> bool:
    """Return whether the coefficients of rows need the actor's log-probs, which training corrects the rollout's by."""
    return score_of(config.score).needs_gradients and correction_of(verl_config) is not None


def stored_rows(batch: KVBatchMeta, problems: Sequence[Problem], config: GradAlignConfig) -> KVBatchMeta:
    """Return the rows of those of the problems that a pass of ours reads."""
    uids = {problem.uid for problem in problems if is_read_by_a_pass(problem, config)}
    return batch.select_keys([key for uid, keys in keys_by_uid(batch.keys).items() if uid in uids for key in keys])


def keep_rows(batch: KVBatchMeta, groups: Sequence[Group], num_sessions: int) -> KVBatchMeta:
    """Clear every row that does not belong to one of the groups, and return the rest in the groups' order.

    A candidate may have more responses than training takes: its first `num_sessions` are kept.
    """
    rows = [sorted(group.keys, key=natural_order) for group in groups]
    kept = [key for keys in rows for key in keys if session_of(key) < num_sessions]
    cleared = sorted(set(batch.keys) - set(kept))
    if cleared:
        tq.kv_clear(keys=cleared, partition_id=batch.partition_id)
    return batch.select_keys(kept)


def read_responses(partition_id: str, keys: list[str]) -> Sequence[Any]:
    """Return the token ids of some trajectories' responses."""
    rows = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=["responses"])
    return list(rows["responses"].unbind())


def _row_bytes(column: Any) -> list[bytes]:
    """Return the token ids of each row of a column, as bytes."""
    if not column.is_nested:
        return [row.tobytes() for row in column.numpy()]
    # Not by unbind, which takes far longer for thousands of rows.
    values, bounds = column.values().numpy(), column.offsets().tolist()
    return [values[start:end].tobytes() for start, end in pairwise(bounds)]


def on_all_ranks(batch: KVBatchMeta, compute: Callable[..., Any], workers: Any, eos_token_id: int) -> None:
    """Call a function of verl's trainer that computes something of each row, and stores it beside them.

    Rows are split over ranks in equal shares, so the batch is filled up with rows that are cleared afterwards.
    """
    if not batch.keys:
        return
    keys = set(batch.keys)
    # Of all ranks: a critic's may have slices of rows where the actor's have whole ones, or the other way round.
    num_ranks = len(workers._query_dispatch_info("actor"))
    whole = replace(batch, keys=list(batch.keys), tags=list(batch.tags))
    whole = upsample_batch_to_divisible_size(whole, num_ranks, eos_token_id)
    compute(whole, metrics={})
    padding = [key for key in whole.keys if key not in keys]
    if padding:
        tq.kv_clear(keys=padding, partition_id=batch.partition_id)
