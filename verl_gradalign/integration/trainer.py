# SPDX-License-Identifier: Apache-2.0
"""`trainer.v1.trainer_mode=gradalign`: verl's trainers, each with selection.

`gradalign` is synchronous; `gradalign_colocate_async` chooses among finished groups while others are generated.
"""

from omegaconf import DictConfig
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from verl_gradalign.integration.forecast_trainer import ForecastTrainer
from verl_gradalign.integration.sampler import GradAlignAsyncSampler, GradAlignSampler
from verl_gradalign.integration.trainer_modes import refused_mode


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
class GradAlignSeparateAsyncTrainer(PPOTrainerSeparateAsync):
    """Refused: says why, instead of verl's "unknown trainer"."""

    def __init__(self, config: DictConfig) -> None:
        raise ValueError(refused_mode("separate_async"))
