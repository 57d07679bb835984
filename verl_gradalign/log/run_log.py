# SPDX-License-Identifier: Apache-2.0
"""Everything a run writes down besides verl's own metrics: the selection log, texts of some problems, wandb's pages.

Shape legend: P candidates.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.log.columns import (
    Composition,
    StepSeconds,
    cost_metrics,
    log_columns,
    reply_metrics,
    selection_metrics,
    token_metrics,
    trusted_metrics,
)
from verl_gradalign.log.samples import Problems, ReadResponses, choose_samples, sample_columns
from verl_gradalign.log.selection_log import EXTRA, SelectionLog
from verl_gradalign.log.wandb_pages import Pages
from verl_gradalign.metrics import named
from verl_gradalign.probe.call import ScoringReply
from verl_gradalign.selection.chooser import Choice
from verl_gradalign.selection.groups import Group
from verl_gradalign.types import Observations, Picks

# Of verl's metrics those that the report reads.
KEPT_METRICS = ("gradalign/", "timing_s/", "val-core/", "critic/score/mean", "response_length/mean", "actor/", "perf/")


class RunNotes:
    """The selection log of a run, its metrics, and the pages for wandb.

    Args:
        config: the `gradalign` block.
        folder: where the log lies unless `log.dir` says otherwise.
        about: versions and the whole configuration, for every file's metadata.
        problems: of the train files.
        decode: turns a response's token ids into text.
        has_wandb: whether the run is logged there.
    """

    def __init__(
        self,
        config: GradAlignConfig,
        folder: Path,
        about: Mapping[str, Any],
        problems: Problems,
        decode: Callable[[Any], str],
        has_wandb: bool = False,
    ) -> None:
        own = config.log
        max_bytes = None if own.max_gb is None else int(own.max_gb * 1e9)
        problems.read_labels(own.columns)
        self._config, self._problems, self._decode = config, problems, decode
        where = own.dir or folder
        self._log = SelectionLog(where, own.columns, about, own.steps_per_part, max_bytes, config.is_forecast)
        self._pages = Pages(own.pages_problems) if own.pages_interval and has_wandb else None
        self._composition = Composition({name: problems.values(name) for name in ("data_source", *own.columns)})
        # Seconds spent on notes: of a step's selection, and after the step before, which is counted to this one.
        self._recording_s = self._late_s = 0.0

    def begin(self, step: int) -> None:
        """Get ready to continue after `step`."""
        self._log.begin(step)

    def record(
        self,
        step: int,
        read_responses: ReadResponses,
        groups: Sequence[Group],
        choice: Choice,
        reply: ScoringReply | None,
        trusted: Mapping[str, Sequence[Group]],
        picks: Picks | None = None,
        observations: Observations | None = None,
    ) -> dict[str, float]:
        """Note a step's choice while the rows of those that have a score are still there, and return the metrics.

        That may be after the update, where it measures: verl clears the rows that were trained on at the end of `fit`'s
        turn. `picks`, `observations`: of schedule forecast. See `samples.sample_columns`.
        """
        started = time.perf_counter()
        c, own = choice.candidates, self._config.log
        columns = log_columns(step, c, choice.selection, picks, observations)
        labels = {name: [self._problems.label(name, g.problem.problem_id) for g in groups] for name in own.columns}
        self._log.write(step, columns | {EXTRA + name: values for name, values in labels.items()})
        chosen = choose_samples(own.sample_problems, c.score_P, c.dot_P, c.norm_P, c.dot_error_P)
        texts, decode = self._problems.text, self._decode
        samples = sample_columns(step, groups, chosen, read_responses, texts, decode, own.sample_chars)
        if chosen:
            self._log.write_samples(step, samples)
        composed: dict[str, float] = {}
        for name, values in {"data_source": columns["data_source"], **labels}.items():
            composed |= self._composition.metrics(name, values, columns["kept"])
        if self._pages is not None:
            self._pages.add(step, columns, samples, composed)
        metrics = {**choice.metrics, **selection_metrics(c, choice.selection), **composed}
        metrics |= token_metrics(groups, trusted, reply)
        if reply is not None:
            metrics |= reply_metrics(reply, len(self._config.validation.trusted_sets()) > 1)
        if trusted:
            metrics |= trusted_metrics(trusted, is_degenerate=not (reply is not None and reply.is_fresh))
        self._recording_s = time.perf_counter() - started
        return metrics

    def note_validation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Note a validation. Later ones than that before training are among their step's metrics."""
        if step == 0:
            self._log.write_metrics(0, _to_keep(metrics))

    def end_step(self, step: int, metrics: Mapping[str, Any], seconds: StepSeconds, tracking: Any) -> dict[str, float]:
        """Note a step's metrics, publish pages when they are due, and return what selection cost of the step.

        `tracking` is verl's.
        """
        started = time.perf_counter()
        costs = named({**cost_metrics(metrics, seconds), "seconds/logging": self._recording_s + self._late_s})
        self._log.write_metrics(step, _to_keep({**metrics, **costs}))
        if self._pages is not None:
            self._pages.add_lift(step, metrics)
        if self._pages is not None and step % self._config.log.pages_interval == 0:
            self._pages.publish(tracking.logger["wandb"], step)
        self._late_s = time.perf_counter() - started
        return costs


def _to_keep(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers that the selection log keeps."""
    numbers = (int, float, np.number)
    return {k: float(v) for k, v in metrics.items() if k.startswith(KEPT_METRICS) and isinstance(v, numbers)}
