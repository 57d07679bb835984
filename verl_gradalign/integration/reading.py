# SPDX-License-Identifier: Apache-2.0
"""Groups of finished rollouts read from TransferQueue: keys in order, rewards, advantages, coefficients.

Rows are read in parts, the next part's while one is worked on. What is kept of a part is a few numbers per row.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.advantages import asked, needs_values
from verl_gradalign.integration.coefficients import coefficients, row_sums, uniform, weighed
from verl_gradalign.integration.engine import COEFFICIENTS
from verl_gradalign.integration.rollout_correction import correction_of, is_over_all_rows
from verl_gradalign.integration.row_content import RowContent
from verl_gradalign.selection.groups import (
    NON_FINITE,
    REWARD_NOT_FINITE,
    Group,
    Problem,
    halved,
    keys_by_uid,
)
from verl_gradalign.selection.scores import score_of

ROWS_AT_ONCE = 1024
T = TypeVar("T")


def read_groups(
    problems: Sequence[Problem],
    batch: KVBatchMeta,
    failed: set[str],
    config: GradAlignConfig,
    verl_config: DictConfig,
    is_scored: bool = True,
    ahead: Mapping[str, Group] | None = None,
) -> list[Group]:
    """Return the group of every problem, in the order of `problems`.

    Rewards are read from TransferQueue, advantages computed as training will compute them (`advantage: trainer`) or
    centred; a step that scores nothing, and a score that looks at rewards alone, need no advantages. Where tokens of a
    response may have different coefficients, these are written back under `gradalign_coefficients`, unless no pass of
    ours reads the rows. A group with a reward, or anything that training computes its loss from, that is not finite
    has failed, and is left out before advantages are computed: they may be normalised over all rows.

    Rows are read `ROWS_AT_ONCE`, so that memory does not grow with their number; all at once where it matters to
    advantages. `ahead` has the groups, by uid, that were read before the others were finished (`read_ahead`).
    """
    ahead = ahead or {}
    by_uid = keys_by_uid(key for key in batch.keys if key.split("_", 1)[0] not in ahead)
    tags = dict(zip(batch.keys, batch.tags, strict=True))
    groups = [
        ahead.get(p.uid) or _unread(p, by_uid.get(p.uid, []), tags, p.uid not in by_uid or p.uid in failed)
        for p in problems
    ]
    wanted = _Wanted.of(problems[0], config, verl_config, is_scored)
    at_once = ROWS_AT_ONCE if is_of_each_group(config, verl_config, is_scored) else len(batch.keys)
    unread = [group for group in groups if group.problem.uid not in ahead and not group.is_failed]
    parts = list(in_parts(unread, lambda group: len(group.keys), at_once))
    read = {group.problem.uid: group for group in _read_parts(parts, batch.partition_id, wanted)}
    return [read.get(group.problem.uid, group) for group in groups]


def _read_parts(parts: Sequence[Sequence[Group]], partition_id: str, wanted: "_Wanted") -> Iterator[Group]:
    """Yield the groups of all parts as they are read. While one part is worked on the next one comes, and no other."""
    fetch = partial(_fetch, partition_id, wanted.fields)
    with ThreadPoolExecutor(1, "gradalign_fetch") as fetcher:
        coming = [fetcher.submit(fetch, part) for part in parts[:1]]
        for place, part in enumerate(parts):
            with collector_at_rest():
                data = coming.pop().result()
                coming += [fetcher.submit(fetch, following) for following in parts[place + 1 : place + 2]]
                groups = _read_together(part, data, partition_id, wanted)
                del data  # so that no more than two parts are in memory
            yield from groups


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep Python from looking for cyclic garbage in a block that makes many objects and no cycles.

    Each look walks all objects of the process: a quarter of a second in verl's driver, and every few thousand rows.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def is_of_each_group(config: GradAlignConfig, verl_config: DictConfig, is_scored: bool) -> bool:
    """Return whether a group is read alike whatever others it is read with."""
    if not (is_scored and score_of(config.score).needs_gradients):
        return True  # an estimator is not asked for advantages that nobody needs
    return not is_over_all_rows(verl_config) and asked(config, verl_config).is_of_each_group


def is_read_by_a_pass(problem: Problem, config: GradAlignConfig) -> bool:
    """Return whether a pass of ours reads the problem's rows, by coefficients that are stored beside them.

    An update that measures weighs its rows itself; the direction is made of trusted ones by a pass all the same.
    """
    return not config.measures_in_update or problem.trusted_set is not None


def in_parts(items: Iterable[T], num_rows_of: Callable[[T], int], max_rows: int) -> Iterator[list[T]]:
    """Cut groups, or what stands for them, into parts of so many rows at most; a larger one is a part of its own."""
    part: list[T] = []
    num_rows = 0
    for item in items:
        of_item = num_rows_of(item)
        if part and num_rows + of_item > max_rows:
            yield part
            part, num_rows = [], 0
        part.append(item)
        num_rows += of_item
    if part:
        yield part


@dataclass(frozen=True)
class _Wanted:
    """What is to be made of rows."""

    config: GradAlignConfig
    verl_config: DictConfig
    is_measured: bool
    """Whether advantages and coefficients are. Else they are not needed, and might need a critic's values."""
    is_stored: bool
    """Whether a pass of ours reads the rows."""
    correction: DictConfig | None
    fields: list[str]
    """Columns that are read."""

    @classmethod
    def of(cls, problem: Problem, config: GradAlignConfig, verl_config: DictConfig, is_scored: bool) -> "_Wanted":
        """Return what is wanted of all problems of the trusted set of this one, or of all candidates."""
        is_measured = is_scored and score_of(config.score).needs_gradients
        is_stored = is_measured and is_read_by_a_pass(problem, config)
        correction = correction_of(verl_config) if is_stored else None
        fields = ["rm_scores", "response_mask", "input_ids", *_read_by_the_loss(config, verl_config, is_measured)]
        fields += ["old_log_probs"] if correction else []
        return cls(config, verl_config, is_measured, is_stored, correction, fields)


def _fetch(partition_id: str, fields: list[str], groups: Sequence[Group]) -> TensorDict:
    keys = [key for group in groups for key in group.keys]
    return tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=fields)


def _read_together(groups: Sequence[Group], data: TensorDict, partition_id: str, wanted: _Wanted) -> list[Group]:
    """Return some groups as they are read, given their rows; see `read_groups`."""
    usable = {group.problem.uid: list(group.keys) for group in groups}
    usable, finite, failures = _finite_rows(partition_id, usable, wanted.fields, data)
    groups = [_failing(group, failures.get(group.problem.uid)) for group in groups]
    if finite is None:
        return groups
    keys = [key for members in usable.values() for key in members]
    reward_R = row_sums(finite["rm_scores"])
    reward_of = dict(zip(keys, reward_R.tolist(), strict=True))
    content = RowContent(finite["input_ids"])
    of_one: dict[str, tuple[float, float]] = {}
    live: set[str] | None = None
    if wanted.is_measured:
        config, verl_config = wanted.config, wanted.verl_config
        table = weighed(finite, reward_R, keys, wanted.correction, config, verl_config)
        coefficient_RT, live, odd = coefficients(table, usable, content, config, verl_config)
        groups = [_failing(group, NON_FINITE if group.problem.uid in odd else None) for group in groups]
        of_one = dict(zip(keys, uniform(table.advantage_RT, coefficient_RT, table.mask_RT), strict=True))
        # One for all of a row travels with the request for its score: tokens would take as long to put as to get.
        if wanted.is_stored and coefficient_RT.shape[1] > 1:
            column = {COEFFICIENTS: response_to_nested(coefficient_RT, finite["response_mask"])}
            tq.kv_batch_put(keys=keys, partition_id=partition_id, fields=TensorDict(column, len(keys)))
    hashed = {key: (content.of_row(row), repr(reward_of[key]).encode()) for row, key in enumerate(keys)}

    def read(group: Group) -> Group:
        halves, ordered = zip(*halved(group.keys, hashed), strict=True)
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
    partition_id: str, members: dict[str, list[str]], fields: list[str], data: TensorDict
) -> tuple[dict[str, list[str]], TensorDict | None, dict[str, str]]:
    """Return the groups (keys by uid) whose columns are all there and finite, their rows, and why the others fail.

    `data` are the rows of all. Those that are returned stand in the order of the keys that are; None where no group is
    left.
    """

    failures: dict[str, str] = {}
    while members:
        if "rm_scores" in data.keys():
            odd = odd_groups(data, members, fields)
        else:
            odd = dict.fromkeys(without_reward(partition_id, members), REWARD_NOT_FINITE)
        if not odd:
            return members, data, failures
        failures |= odd
        members = {uid: keys for uid, keys in members.items() if uid not in odd}
        if keys := [key for of_group in members.values() for key in of_group]:
            data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=fields)
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
        # By sums first: a number that is not finite makes its row's sum so too, and sums are read faster.
        if column is None or not column.is_floating_point() or row_sums(column).isfinite().all():
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
