# SPDX-License-Identifier: Apache-2.0
"""The sampler that verl asks for a training batch: waits for all candidates, then lets the selector choose.

Configured as `trainer.v1.sampler.custom_sampler.{path,name}`; `trainer_mode=gradalign` sets it by itself.
"""

from __future__ import annotations

from typing import Any, Protocol

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class Selector(Protocol):
    """What the trainer attaches: it knows the step's problems and chooses among their groups."""

    @property
    def num_expected(self) -> int:
        """Problems, candidates and trusted, that were sent to the rollout in this step."""
        ...

    def select(
        self, batch: KVBatchMeta, failed: set[str], num_kept: int, global_steps: int
    ) -> tuple[KVBatchMeta, dict[str, float]]:
        """Return the rows to train on, and metrics. Everything else is cleared from TransferQueue."""
        ...


class GradAlignSampler(ReplayBuffer):
    """verl's synchronous replay buffer, whose training batches are chosen by alignment.

    `sampler_kwargs.poll_interval_s` sets how often it looks at running rollouts.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, poll_interval=(kwargs["sampler_kwargs"] or {}).get("poll_interval_s", 0.5))
        self._selector: Selector | None = None

    def attach(self, selector: Selector) -> None:
        """Give the sampler its selector; the trainer does this once."""
        self._selector = selector

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict[str, Any]]:
        """Return a batch of `batch_size` groups: for training the chosen ones, for validation verl's own.

        Raises: RuntimeError if no selector is attached, or nothing was generated at all.
        """
        if partition_id != "train":
            return super().sample(global_steps, partition_id, batch_size)
        if self._selector is None:
            raise RuntimeError(
                "GradAlignSampler has no selector: trainer.v1.sampler.custom_sampler.name=GradAlignSampler works only "
                "with its trainer. Remedy: set trainer.v1.trainer_mode=gradalign."
            )
        batch, metrics = super().sample(global_steps, partition_id, self._selector.num_expected)
        failed = set(self.failure_keys[partition_id])
        kept, own_metrics = self._selector.select(batch, failed, batch_size, global_steps)
        return kept, {**metrics, **own_metrics}
