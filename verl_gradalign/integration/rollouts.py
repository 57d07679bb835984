# SPDX-License-Identifier: Apache-2.0
"""Groups of finished rollouts as TransferQueue holds them: keys in order, rewards, advantages, coefficients.

A trajectory's key is `{uid}_{session}_{index}`; a response is a session, whose reward is that of its last output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.protocol import DataProto
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.workers.utils.padding import response_to_nested

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.engine import COEFFICIENTS
from verl_gradalign.probe.objective import token_coefficients
from verl_gradalign.selection.scores import score_of

# Advantages of a group whose rewards are all equal differ from 0 by the rounding of its mean only.
ZERO_ADVANTAGE = 1e-6


@dataclass(frozen=True)
class Problem:
    """A prompt that was sent to the rollout."""

    uid: str
    problem_id: int
    """Row in the train files (or in the trusted files)."""
    data_source: str
    trusted_set: str | None = None
    """Name of the trusted set it belongs to; None: a candidate."""


@dataclass(frozen=True)
class Group:
    """A problem and its finished trajectories."""

    problem: Problem
    keys: tuple[str, ...]
    """The first half of the group first (`halved`); empty if nothing was generated."""
    num_tokens: int
    """Of all trajectories, prompts included."""
    rewards: tuple[float, ...]
    """One per response, in the keys' order."""
    is_failed: bool
    is_live: bool
    advantages: tuple[float, ...] = ()
    """One per key; nan where its tokens have different ones."""
    coefficients: tuple[float, ...] = ()
    """Factor of each key's log-probability in the problem's objective; nan where its tokens have different ones."""
    halves: tuple[int, ...] = ()
    """0 or 1: the half of the group that each key counts to when reliability is measured. Empty: not split."""
    num_response_tokens: int = 0
    """Of all trajectories, prompts excluded."""

    def success_rate(self, threshold: float) -> float:
        """Return the share of responses with a reward above `threshold`; NaN without responses."""
        if not self.rewards:
            return float("nan")
        return sum(reward > threshold for reward in self.rewards) / len(self.rewards)


def session_of(key: str) -> int:
    """Return the session number of a trajectory's key."""
    return int(key.rsplit("_", 2)[1])


def natural_order(key: str) -> tuple[int, int]:
    """Return what trajectory keys of a problem are sorted by: session, then output."""
    _, session, output = key.rsplit("_", 2)
    return int(session), int(output)


def keys_by_uid(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return trajectory keys by their problem's uid, in session and output order."""
    by_uid: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        by_uid[key.split("_", 1)[0]].append(key)
    for members in by_uid.values():
        members.sort(key=natural_order)
    return by_uid


def halved(keys: Sequence[str], content: Mapping[str, bytes]) -> list[tuple[int, str]]:
    """Return (half, key) of a group's keys, half 0 first.

    Sessions go to the halves in turn, in the order of a hash of what they hold: which response a session got depends
    on the order in which requests reached the rollout, and a repeated run must find the same halves.
    """
    sessions: dict[int, list[str]] = defaultdict(list)
    for key in keys:
        sessions[session_of(key)].append(key)
    digests = {s: blake2b(b"".join(content[key] for key in members)).digest() for s, members in sessions.items()}
    places = {session: place for place, session in enumerate(sorted(sessions, key=lambda s: (digests[s], s)))}

    def order(key: str) -> tuple[int, int, int]:
        session, output = natural_order(key)
        return places[session] % 2, places[session], output

    return [(order(key)[0], key) for key in sorted(keys, key=order)]


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
    that looks at rewards alone, need neither.
    """
    is_measured = is_scored and score_of(config.score).needs_gradients
    by_uid = keys_by_uid(batch.keys)
    tags = dict(zip(batch.keys, batch.tags, strict=True))
    usable = {p.uid: by_uid[p.uid] for p in problems if p.uid in by_uid and p.uid not in failed}
    keys = [key for members in usable.values() for key in members]
    rewards: dict[str, tuple[float, ...]] = {}
    live: set[str] = set()
    per_key: dict[str, tuple[float, float]] = {}
    split: dict[str, list[tuple[int, str]]] = {}
    if keys:
        fields = ["rm_scores", "response_mask", "input_ids"]
        fields += ["values"] if is_measured and needs_values(config, verl_config) else []
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=fields)
        padded = data.to_padded_tensor()
        row_rewards = dict(zip(keys, padded["rm_scores"].sum(dim=1).tolist(), strict=True))
        ids = zip(keys, data["input_ids"].unbind(), strict=True)
        content = {key: row.numpy().tobytes() + repr(row_rewards[key]).encode() for key, row in ids}
        split = {uid: halved(members, content) for uid, members in usable.items()}
        rewards = {uid: _response_rewards([key for _, key in split[uid]], row_rewards) for uid in usable}
        if not is_measured:
            # No advantages (they may need a critic's values), and nothing to store.
            live = {uid for uid, values in rewards.items() if len(set(values)) > 1}
        else:
            advantage_RT = _advantages(padded, keys, config, verl_config)
            coefficient_RT, live = _coefficients(padded, advantage_RT, usable, config, verl_config)
            uniform = (_uniform(values_RT, padded["response_mask"]) for values_RT in (advantage_RT, coefficient_RT))
            per_key = dict(zip(keys, zip(*uniform, strict=True), strict=True))
            column = {COEFFICIENTS: response_to_nested(coefficient_RT, data["response_mask"])}
            tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=TensorDict(column, len(keys)))
    ordered = {uid: [key for _, key in split[uid]] if uid in split else members for uid, members in by_uid.items()}
    return [
        Group(
            problem=p,
            keys=tuple(ordered.get(p.uid, ())),
            num_tokens=sum(tags[key]["seq_len"] for key in by_uid.get(p.uid, ())),
            rewards=rewards.get(p.uid, ()),
            is_failed=p.uid not in usable,
            is_live=p.uid in live,
            advantages=tuple(per_key[key][0] for key in ordered.get(p.uid, ()) if key in per_key),
            coefficients=tuple(per_key[key][1] for key in ordered.get(p.uid, ()) if key in per_key),
            halves=tuple(half for half, _ in split.get(p.uid, ())),
            num_response_tokens=sum(tags[key]["response_len"] for key in by_uid.get(p.uid, ())),
        )
        for p in problems
    ]


def needs_values(config: GradAlignConfig, verl_config: DictConfig) -> bool:
    """Return whether the advantages that candidates are scored with need a critic's values."""
    is_gae = verl_config.algorithm.adv_estimator == "gae" and config.advantage == "trainer"
    return is_gae and score_of(config.score).needs_gradients


def _uniform(values_RT: torch.Tensor, mask_RT: torch.Tensor) -> list[float]:
    """Return each row's value, nan where its masked tokens have different ones."""
    first_R1 = values_RT.gather(1, mask_RT.long().argmax(dim=1, keepdim=True))
    is_same_R = ((values_RT == first_R1) | ~mask_RT.bool()).all(dim=1)
    return torch.where(is_same_R, first_R1.squeeze(1), torch.nan).tolist()


def _coefficients(
    padded: TensorDict,
    advantage_RT: torch.Tensor,
    usable: dict[str, list[str]],
    config: GradAlignConfig,
    verl_config: DictConfig,
) -> tuple[torch.Tensor, set[str]]:
    """Return the token coefficients of all rows (rows, tokens), and the uids of the live groups.

    `usable` gives each group's keys; rows stand in that order. Rows of dead groups have coefficients of zero.
    """
    actor = verl_config.actor_rollout_ref.actor
    coefficient_RT = torch.zeros_like(advantage_RT)
    live: set[str] = set()
    start = 0
    for uid, members in usable.items():
        rows = slice(start, start + len(members))
        start += len(members)
        mask_RT = padded["response_mask"][rows]
        if (advantage_RT[rows] * mask_RT).abs().max() > ZERO_ADVANTAGE:
            coefficients_of_group_RT = token_coefficients(
                advantage_RT[rows],
                mask_RT,
                config.loss_agg_mode or actor.loss_agg_mode,
                actor.get("loss_scale_factor") or verl_config.data.max_response_length,
            )
            if not cancels(padded["input_ids"][rows], coefficients_of_group_RT):
                live.add(uid)
                coefficient_RT[rows] = coefficients_of_group_RT
    return coefficient_RT, live


def cancels(ids_RS: torch.Tensor, coefficient_RT: torch.Tensor) -> bool:
    """Return whether the coefficients of equal rows add up to zero, so that the group's gradient is zero.

    It is when all responses are the same while their rewards differ: noise in the reward under a confident policy.
    Computed, such a gradient is rounding error, whose cosine means nothing.
    """
    _, place_R = torch.unique(ids_RS, dim=0, return_inverse=True)
    total_RT = torch.zeros_like(coefficient_RT).index_add_(0, place_R, coefficient_RT)
    return bool(total_RT.abs().max() <= ZERO_ADVANTAGE * coefficient_RT.abs().sum(dim=0).max())


def _response_rewards(keys: Sequence[str], row_rewards: dict[str, float]) -> tuple[float, ...]:
    """Return one reward per session: that of its last output."""
    return tuple({key.rsplit("_", 1)[0]: row_rewards[key] for key in keys}.values())


def _advantages(
    padded: TensorDict, keys: Sequence[str], config: GradAlignConfig, verl_config: DictConfig
) -> torch.Tensor:
    """Return advantages (rows, tokens), by verl's own function or centred."""
    mask_RT = padded["response_mask"].float()
    uids = [key.split("_", 1)[0] for key in keys]
    if config.advantage == "centred":
        reward_R = padded["rm_scores"].sum(dim=1)
        means = {uid: reward_R[[u == uid for u in uids]].mean() for uid in set(uids)}
        centred_R = reward_R - torch.stack([means[uid] for uid in uids])
        return centred_R.unsqueeze(1) * mask_RT
    algorithm = verl_config.algorithm
    columns = {
        "response_mask": padded["response_mask"],
        "token_level_scores": padded["rm_scores"],
        "token_level_rewards": padded["rm_scores"],
    }
    if needs_values(config, verl_config):
        columns["values"] = padded["values"]
    data = DataProto(
        batch=TensorDict(columns, batch_size=len(keys)), non_tensor_batch={"uid": np.array(uids, dtype=object)}
    )
    data = compute_advantage_for_multi_trajectories(
        data,
        batch_keys=list(keys),
        adv_estimator=algorithm.adv_estimator,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        num_repeat=verl_config.actor_rollout_ref.rollout.n,
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
        config=algorithm,
    )
    return data.batch["advantages"].float()
