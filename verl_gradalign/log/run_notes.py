# SPDX-License-Identifier: Apache-2.0
"""Everything a run writes down besides verl's own metrics: made once by the trainer, told of every step's end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.about import about_run
from verl_gradalign.integration.prompts import PromptTable
from verl_gradalign.log.columns import StepSeconds, cost_metrics
from verl_gradalign.log.run_log import StepRecorder
from verl_gradalign.log.selection_log import SelectionLog
from verl_gradalign.log.wandb_pages import Pages
from verl_gradalign.metrics import named

__all__ = ["RunNotes"]

# Of verl's metrics those that the report reads.
KEPT_METRICS = ("gradalign/", "timing_s/", "val-core/", "critic/score/mean", "response_length/mean", "actor/", "perf/")


class RunNotes:
    """The selection log of a run, its metrics, and the pages for wandb.

    Args:
        config: the `gradalign` block.
        verl_config: the whole configuration.
        pool: the train files' problems.
        decode: turns a response's token ids into text.
    """

    def __init__(
        self, config: GradAlignConfig, verl_config: DictConfig, pool: PromptTable, decode: Callable[[Any], str]
    ) -> None:
        own = config.log
        folder = own.dir or str(Path(verl_config.trainer.default_local_dir) / "gradalign")
        max_bytes = None if own.max_gb is None else int(own.max_gb * 1e9)
        pool.read_labels(own.columns)
        self._log = SelectionLog(folder, own.columns, about_run(verl_config), own.steps_per_part, max_bytes)
        self._pages = (
            Pages(own.pages_problems) if own.pages_interval and "wandb" in verl_config.trainer.logger else None
        )
        self._pages_interval = own.pages_interval
        self._late_s = 0.0
        self.recorder = StepRecorder(config, self._log, pool, decode, self._pages)

    def begin(self, step: int) -> None:
        """Get ready to go on after `step`."""
        self._log.begin(step)

    def note_validation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Note a validation. Later ones than that before training are among their step's metrics."""
        if step == 0:
            self._log.write_metrics(0, _to_keep(metrics))

    def end_step(self, step: int, metrics: Mapping[str, Any], seconds: StepSeconds, tracking: Any) -> dict[str, float]:
        """Note a step's metrics, publish pages when they are due, and return what selection cost of the step.

        `tracking` is verl's.
        """
        started = time.perf_counter()
        costs = named({**cost_metrics(metrics, seconds), "seconds/logging": self.recorder.seconds + self._late_s})
        self._log.write_metrics(step, _to_keep({**metrics, **costs}))
        if self._pages is not None and step % self._pages_interval == 0:
            self._pages.publish(tracking.logger["wandb"], step)
        self._late_s = time.perf_counter() - started
        return costs


def _to_keep(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that the selection log keeps."""
    numbers = (int, float, np.number)
    return {k: float(v) for k, v in metrics.items() if k.startswith(KEPT_METRICS) and isinstance(v, numbers)}
