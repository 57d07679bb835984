# SPDX-License-Identifier: Apache-2.0
"""Rows of finished rollouts in TransferQueue: what must be there, which are read, kept, filled up or cleared."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.advantages import needs_values
from verl_gradalign.integration.reading import is_read_by_a_pass, read_groups
from verl_gradalign.integration.rollout_correction import correction_of
from verl_gradalign.selection.groups import Group, Problem, keys_by_uid, natural_order, session_of
from verl_gradalign.selection.scores import score_of


def read_step(
    taken: Sequence[Problem],
    batch: KVBatchMeta,
    failed: set[str],
    config: GradAlignConfig,
    verl_config: DictConfig,
    is_scored: bool = True,
    ahead: Mapping[str, Group] | None = None,
) -> tuple[list[Group], dict[str, list[Group]]]:
    """Return the groups of the candidates, and those of each trusted set that was rolled out; see `read_groups`."""

    def read(name: str | None) -> list[Group]:
        # Apart: advantages may be normalised over all that they are computed with.
        members = [problem for problem in taken if problem.trusted_set == name]
        return read_groups(members, batch, failed, config, verl_config, is_scored, ahead) if members else []

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
