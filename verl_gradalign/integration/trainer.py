# SPDX-License-Identifier: Apache-2.0
"""`trainer.v1.trainer_mode=gradalign`: verl's synchronous trainer that chooses what it trains on.

Five of verl's methods are extended; everything else of a step (log-probs, advantages, update, weight push,
checkpoints, validation) is verl's own.
"""

from __future__ import annotations

import logging
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import ray
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import create_rl_dataset
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.alignment import AlignmentSelector
from verl_gradalign.integration.checks import check_data, check_verl_config, read_config
from verl_gradalign.integration.groups import Problem
from verl_gradalign.integration.sampler import GradAlignSampler
from verl_gradalign.integration.worker import GradAlignWorker
from verl_gradalign.metrics import named
from verl_gradalign.report.selection_log import SelectionLog
from verl_gradalign.selection.scores import SCORES

logger = logging.getLogger(__name__)

PROBLEM_ID = "gradalign_problem_id"
SAMPLER = {"path": "pkg://verl_gradalign.integration.sampler", "name": "GradAlignSampler"}


@register_trainer("gradalign")
class GradAlignTrainer(PPOTrainerSync):
    """Rolls out more candidates than it trains on, and the trusted set; trains on the best-aligned ones."""

    def __init__(self, config: DictConfig) -> None:
        self.gradalign: GradAlignConfig = read_config(config)
        check_verl_config(self.gradalign, config)
        check_data(self.gradalign, config)
        _use_own_sampler(self.gradalign, config)
        super().__init__(config)
        if not isinstance(self.replay_buffer, GradAlignSampler):
            raise ValueError(
                f"trainer.v1.sampler.custom_sampler.name={config.trainer.v1.sampler.custom_sampler.name}: "
                "trainer_mode=gradalign needs a GradAlignSampler. Remedy: remove the override, or derive your sampler "
                "from verl_gradalign.integration.sampler.GradAlignSampler."
            )
        log_dir = self.gradalign.log.dir or str(Path(config.trainer.default_local_dir) / "gradalign")
        self._selector = AlignmentSelector(self.gradalign, config, SelectionLog(log_dir), self._free_rollout)
        self.replay_buffer.attach(self._selector)
        self._rollout_is_asleep = False

    @property
    def trainer_mode(self) -> str:
        """verl compares this with "sync" to learn whether training is synchronous, and in this mode it is."""
        return "sync"

    @trainer_mode.setter
    def trainer_mode(self, _: str) -> None:
        return None

    @property
    def _num_candidates(self) -> int:
        if SCORES[self.gradalign.score].rank is None:
            return int(self.config.data.train_batch_size)
        return math.ceil(self.gradalign.oversample * self.config.data.train_batch_size)

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        # The row in the train files identifies a problem; extra_info.index may be missing or repeated.
        rows = self.train_dataset.dataframe
        self.train_dataset.dataframe = rows.add_column(PROBLEM_ID, _rows_in_files(rows))
        if SCORES[self.gradalign.score].needs_direction:
            files = list(self.gradalign.validation.files)
            self._trusted = create_rl_dataset(
                files, self.config.data, self.tokenizer, self.processor, is_train=False, max_samples=-1
            )

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        for role in self.role_worker_mapping:
            if "actor" in str(role):
                self.role_worker_mapping[role] = ray.remote(GradAlignWorker)

    def on_init_end(self) -> None:
        """Connect the selector to the actor, now that there is one."""
        super().on_init_end()
        workers = self.actor_rollout_wg
        if SCORES[self.gradalign.score].needs_direction:
            workers.gradalign_check(self.gradalign.estimator, self.gradalign.probe)
        self._selector.attach_workers(workers.gradalign_score, list(workers._query_dispatch_info("actor")))

    def prepare_step(self) -> dict[str, Any]:
        """Send the step's candidates, and the trusted set when the direction is stale, to the rollout."""
        candidates = self._next_train_batch(self._num_candidates)
        trusted = self._trusted_batch() if self._selector.needs_trusted(self.global_steps) else None
        self._selector.expect(_problems(candidates), _problems(trusted) if trusted is not None else [])
        self._submit_batch_to_rollout(candidates)
        if trusted is not None:
            self._submit_batch_to_rollout(trusted)
        return {}

    def _trusted_batch(self) -> TensorDict:
        """Return every trusted problem as a prompt row with its own group size."""
        num = len(self._trusted)
        columns = collate_fn([self._trusted[i] for i in range(num)])
        columns["uid"] = np.array([str(uuid.uuid4()) for _ in range(num)], dtype=object)
        columns[PROBLEM_ID] = np.arange(num)
        n = self.gradalign.validation.n or self.config.actor_rollout_ref.rollout.n
        columns["__rollout_n__"] = np.array([int(n)] * num, dtype=object)
        batch = tu.get_tensordict(columns)
        tu.assign_non_tensor_data(batch, "global_steps", self.global_steps)
        return batch

    def _free_rollout(self) -> None:
        """Put the rollout replicas to sleep before scoring, as verl does after sampling."""
        super().on_sample_end()
        self._rollout_is_asleep = True

    def on_sample_end(self) -> None:
        """Put the replicas to sleep unless scoring has done it already."""
        if not self._rollout_is_asleep:
            super().on_sample_end()
        self._rollout_is_asleep = False

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        metrics.update(named({"seconds/share_of_step": self._selector.last_selection_s / timing_raw["step"]}))


def _use_own_sampler(config: GradAlignConfig, verl_config: DictConfig) -> None:
    """Fill in the sampler keys, so that trainer_mode=gradalign alone is enough."""
    sampler = verl_config.trainer.v1.sampler
    with open_dict(sampler):
        if not (sampler.custom_sampler.path and sampler.custom_sampler.name):
            sampler.custom_sampler.update(SAMPLER)
        sampler.sampler_kwargs = {"poll_interval_s": config.poll_interval_s, **(sampler.sampler_kwargs or {})}


def _rows_in_files(dataframe: Any) -> list[int]:
    """Return the position of each row of a filtered `datasets.Dataset` in the concatenated train files."""
    indices = dataframe._indices  # how datasets remembers a filter or a selection; None: all rows, in order
    return list(range(len(dataframe))) if indices is None else indices.column(0).to_pylist()


def _problems(batch: TensorDict) -> list[Problem]:
    """Return the problems of a prompt batch, in order."""
    sources = batch["data_source"] if "data_source" in batch.keys() else ["unknown"] * len(batch)
    return [
        Problem(uid=str(uid), problem_id=int(problem_id), data_source=str(source))
        for uid, problem_id, source in zip(batch["uid"], batch[PROBLEM_ID], sources, strict=True)
    ]
