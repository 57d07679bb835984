# SPDX-License-Identifier: Apache-2.0
"""The samplers that verl asks for a training batch: wait for the candidates, then let the trainer choose.

Configured as `trainer.v1.sampler.custom_sampler.{path,name}`; the trainer modes of this package set it by themselves.
`sampler_kwargs`: `poll_interval_s`, how often running rollouts are polled; `filter_groups_metric`, DAPO's.
"""

import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from verl_gradalign.integration.in_flight import InFlight
from verl_gradalign.integration.trainer_modes import refused_mode

SAMPLER_PATH = "pkg://verl_gradalign.integration.sampler"
TRAINER = "gradalign_trainer"
"""The key of sampler_kwargs by which a trainer of this package makes itself known."""
Choose = Callable[[KVBatchMeta, list[str], set[str], int], tuple[KVBatchMeta, dict[str, float]]]
"""Of a batch of finished groups, their uids, which of them failed, and the step: the rows to train on, and metrics.
All other rows of the batch are cleared from TransferQueue."""
Look = Callable[[Container[str], Mapping[str, Mapping[str, Any]], float], None]
"""Of the uids of finished groups, the tags of all rows by key, and seconds: to read some of the groups meanwhile."""
Explain = Callable[[], str]
"""What to tell the user of a step in which nothing was answered."""


def _options(kwargs: dict[str, Any], train_batch_size: bool) -> dict[str, Any]:
    """Return verl's constructor arguments, with those that come through sampler_kwargs.

    Raises: ValueError, before any worker starts, if it is not a trainer of this package that builds the sampler.
    """
    own = kwargs["sampler_kwargs"] or {}
    if TRAINER not in own:
        raise ValueError(refused_mode(kwargs["trainer_mode"]))
    options = {**kwargs, "poll_interval": own.get("poll_interval_s", 0.5)}
    options["filter_groups_metric"] = own.get("filter_groups_metric")
    if train_batch_size and options["filter_groups_metric"] is not None:
        options |= {"train_batch_size": own["train_batch_size"], "gen_batch_size": 1}
        options["max_inflight_gen_batches"] = own.get("max_inflight_gen_batches", 1)
    return options


class _Selecting(ReplayBuffer):
    """What both samplers share: training batches are chosen by the trainer's function."""

    _in_flight: InFlight | None = None
    _choose: Choose | None = None
    _explain: Explain | None = None
    _look: Look | None = None
    _taken: Sequence[str] = ()

    def attach(self, in_flight: InFlight, choose: Choose, explain: Explain, look: Look | None = None) -> None:
        """Connect the sampler to its trainer, which does this once."""
        self._in_flight, self._choose, self._explain, self._look = in_flight, choose, explain, look

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """Return a batch of `batch_size` groups: for training the chosen ones, for validation verl's own.

        Raises: RuntimeError if no trainer is attached, or no group was answered at all.
        """
        if partition_id != "train":
            return super().sample(global_steps, partition_id, batch_size)
        if self._in_flight is None or self._choose is None or self._explain is None:
            raise RuntimeError(refused_mode(self.trainer_mode))
        self._taken = ()
        try:
            batch, metrics = super().sample(global_steps, partition_id, self._num_groups(self._in_flight))
        except RuntimeError as error:
            if not self._taken or any(key.split("_")[0] in self._taken for key in self.partitions[partition_id]):
                raise
            # verl's own message names a key that this sampler has no use for, and not what went wrong.
            raise RuntimeError(self._explain()) from error
        failed = set(self.failure_keys[partition_id])
        kept, own_metrics = self._choose(batch, list(self._taken), failed, global_steps)
        return kept, {**metrics, **own_metrics}

    def _wait_for_next_poll(self, partition_id: str, last_debug_time: float) -> float:
        """Read groups that are finished while others are generated, for as long as verl would sleep; else sleep."""
        if partition_id == "train" and self._look is not None:
            started = time.monotonic()
            self._look(self.finished_keys[partition_id], self.partitions[partition_id], self.poll_interval)
            if time.monotonic() - started >= self.poll_interval:
                return last_debug_time
        later: float = super()._wait_for_next_poll(partition_id, last_debug_time)
        return later

    def _num_groups(self, in_flight: InFlight) -> int:
        """Return how many groups a selection is among: all of the step's, trusted ones included."""
        return len(in_flight)

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, int]]:
        """Take the oldest groups, those of one step in the order in which they were sent.

        verl sorts a set of random names by step, so of more groups than needed it leaves out any.
        """
        place_of = {problem.uid: place for place, problem in enumerate(self._in_flight or ())}
        in_order = sorted(sampleable_keys, key=lambda uid: place_of.get(uid, len(place_of)))
        return super()._select_prompt_uids(partition_id, in_order, batch_size)

    def _without_trusted(self, uids: Iterable[str]) -> set[str]:
        return {uid for uid in uids if self._in_flight is None or not self._in_flight.is_trusted(uid)}


class GradAlignSampler(_Selecting):
    """verl's synchronous replay buffer, whose training batches are chosen by alignment."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**_options(kwargs, train_batch_size=True))

    def _dapo_filtered_keys(self, partition_id: str) -> tuple[set[str], Counter[float]]:
        """Leave trusted groups alone: they are not trained on, and a new prompt would not replace them."""
        filtered, counts = super()._dapo_filtered_keys(partition_id)
        return self._without_trusted(filtered), counts

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, int]]:
        """Take all trusted groups, and candidates up to the number asked for."""
        uids, snapshot, steps = super()._select_prompt_uids(partition_id, sampleable_keys, len(sampleable_keys))
        if partition_id == "train" and (in_flight := self._in_flight) is not None:
            uids.sort(key=lambda uid: not in_flight.is_trusted(uid))
            self._taken = uids = uids[:batch_size]
        return uids[:batch_size], snapshot, steps


class GradAlignAsyncSampler(_Selecting, ReplayBufferAsync):
    """verl's asynchronous replay buffer: chooses among the oldest finished candidates while others are generated.

    Staleness is verl's: groups beyond `max_off_policy_threshold` are evicted and replaced before the choice. Trusted
    groups are used when all of a refresh are there, or as they finish where their responses are kept; only the first
    direction of a refresh is waited for.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**_options(kwargs, train_batch_size=False))
        self._failed: set[str] = set()
        """Candidates that failed since the last batch."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """Return a batch of `batch_size` groups; see `_Selecting.sample`."""
        self._failed.clear()
        return super().sample(global_steps, partition_id, batch_size)

    def _num_groups(self, in_flight: InFlight) -> int:
        return in_flight.num_candidates

    def _terminal_eviction_reasons(
        self, global_steps: int, partition_id: str
    ) -> tuple[set[str], set[str], set[str], Counter[float]]:
        """Evict candidates only: a trusted group that failed or is old is still an answer.

        verl replaces failed groups for ever. Raises: RuntimeError if as many failed as a step needs, and none did not.
        """
        stale, filtered, failed, counts = super()._terminal_eviction_reasons(global_steps, partition_id)
        stale, filtered, failed = (self._without_trusted(uids) for uids in (stale, filtered, failed))
        if partition_id == "train" and self._in_flight is not None and self._explain is not None:
            self._failed |= failed
            if len(self._failed) >= self._num_groups(self._in_flight) > 0 and not self.finished_keys[partition_id]:
                raise RuntimeError(self._explain())
        return stale, filtered, failed, counts

    def _clear_groups(self, partition_id: str, uids: set[str]) -> None:
        super()._clear_groups(partition_id, uids)
        if partition_id == "train" and self._in_flight is not None:
            self._in_flight.take(uids)

    def get_sampleable_count(self, global_steps: int, partition_id: str) -> int:
        """Return how many candidates could be taken at once; separate_async lends devices by it."""
        self._sync_metadata_from_transfer_queue()
        reasons = self._terminal_eviction_reasons(global_steps, partition_id)
        return len(self._without_trusted(self._sampleable_terminal_keys(partition_id, reasons)))

    def _has_enough_samples(
        self, global_steps: int, partition_id: str, batch_size: int, sampleable_keys: set[str]
    ) -> bool:
        if partition_id != "train" or self._in_flight is None:
            return super()._has_enough_samples(global_steps, partition_id, batch_size, sampleable_keys)
        candidates = self._without_trusted(sampleable_keys)
        if not super()._has_enough_samples(global_steps, partition_id, batch_size, candidates):
            return False
        return not self._in_flight.waits_for_trusted or self._in_flight.trusted() <= sampleable_keys

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, int]]:
        """Take the oldest candidates, and the trusted groups: all of them or none, unless each is of use alone."""
        if partition_id != "train" or self._in_flight is None:
            return super()._select_prompt_uids(partition_id, sampleable_keys, batch_size)
        candidates = self._without_trusted(sampleable_keys)
        uids, snapshot, steps = super()._select_prompt_uids(partition_id, candidates, batch_size)
        trusted = self._in_flight.trusted() if self._in_flight.takes_trusted else set()
        ready = trusted & sampleable_keys
        takes_them = ready == trusted or self._in_flight.takes_trusted_singly
        self._taken = [*uids, *(sorted(ready) if takes_them else ())]
        # verl asserts that what it takes is not stale, by these steps; a trusted group without one passes.
        return self._taken, snapshot, {uid: steps[uid] for uid in uids}


def use_own_sampler(
    verl_config: DictConfig, trainer: str, sampler_class: type[_Selecting], poll_interval_s: float
) -> None:
    """Fill in verl's sampler keys, so that the trainer mode alone is enough. What the user has set stays."""
    sampler = verl_config.trainer.v1.sampler
    filter_groups: Any = verl_config.algorithm.get("filter_groups") or {}
    own: dict[str, Any] = {"poll_interval_s": poll_interval_s, TRAINER: trainer}
    if filter_groups.get("enable"):
        own |= {
            "filter_groups_metric": str(filter_groups.metric),
            "train_batch_size": verl_config.data.train_batch_size,
            "max_inflight_gen_batches": filter_groups.get("max_inflight_gen_batches", 1),
        }
    with open_dict(sampler):
        custom = sampler.custom_sampler
        if not (custom.path and custom.name) or (custom.path, custom.name) == (SAMPLER_PATH, "GradAlignSampler"):
            custom.update({"path": SAMPLER_PATH, "name": sampler_class.__name__})
        sampler.sampler_kwargs = {**own, **(sampler.sampler_kwargs or {})}
