# SPDX-License-Identifier: Apache-2.0
"""`trainer.v1.trainer_mode=gradalign`: verl's trainers, each with selection.

`gradalign` is synchronous; `gradalign_colocate_async` chooses among finished groups while others are generated;
`gradalign_separate_async` trains on what a forecast chose, which is generated on other devices.
"""

import time
from typing import Any

from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_gradalign.integration.forecast_trainer import ForecastTrainer
from verl_gradalign.integration.sampler import GradAlignAsyncSampler, GradAlignSampler
from verl_gradalign.integration.worker import DetachedWorker


@register_trainer("gradalign")
class GradAlignTrainer(ForecastTrainer, PPOTrainerSync):
    """Synchronous: a step's candidates are rolled out, chosen among and trained on before the next step's begin."""

    verl_mode = "sync"
    sampler_class = GradAlignSampler


@register_trainer("gradalign_colocate_async")
class GradAlignColocateAsyncTrainer(ForecastTrainer, PPOTrainerColocateAsync):
    """Asynchronous on the training devices: chooses among the oldest finished groups while others are in flight."""

    verl_mode = "colocate_async"
    sampler_class = GradAlignAsyncSampler


@register_trainer("gradalign_separate_async")
class GradAlignSeparateAsyncTrainer(ForecastTrainer, PPOTrainerSeparateAsync):
    """Asynchronous beside rollout devices of its own: schedule forecast alone, as a step is cut into several updates.

    Each update trains on the oldest finished picks; all of them are measured along the step's one direction.
    """

    verl_mode = "separate_async"
    sampler_class = GradAlignAsyncSampler
    worker_class = DetachedWorker

    def prepare_step(self) -> dict[str, Any]:
        """Send the step's problems; then generate on the training devices too, if they were lent for it."""
        metrics = super().prepare_step()
        started = time.perf_counter()
        metrics |= self._wait_for_sampleable_and_switch()
        self._sending_s += time.perf_counter() - started
        return metrics
