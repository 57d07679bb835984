# SPDX-License-Identifier: Apache-2.0
"""Notes what a step chose: metrics, the selection log, and texts of some problems.

Shape legend: P candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.rollouts import Group
from verl_gradalign.integration.worker import ScoringReply
from verl_gradalign.log.columns import (
    log_columns,
    reply_metrics,
    score_metrics,
    selection_metrics,
    success_rates,
    token_metrics,
    trusted_metrics,
)
from verl_gradalign.log.composition import Composition
from verl_gradalign.log.samples import Problems, choose_samples, sample_columns
from verl_gradalign.log.selection_log import EXTRA, SelectionLog
from verl_gradalign.log.wandb_pages import Pages
from verl_gradalign.selection.chooser import Choice

__all__ = ["StepRecorder"]


class StepRecorder:
    """Writes the log of a run and makes its metrics.

    Args:
        config: the `gradalign` block.
        log: what is written to.
        problems: of the train files.
        decode: turns a response's token ids into text.
        pages: collects what is shown at an interval; None: nothing is.
    """

    def __init__(
        self,
        config: GradAlignConfig,
        log: SelectionLog,
        problems: Problems,
        decode: Callable[[Any], str],
        pages: Pages | None = None,
    ) -> None:
        self._config = config
        self._log = log
        self._problems = problems
        self._decode = decode
        self._pages = pages
        self._composition = Composition({name: problems.values(name) for name in ("data_source", *log.columns)})
        self.seconds = 0.0
        """Spent on the last step's notes."""

    def record(
        self,
        step: int,
        batch: KVBatchMeta,
        groups: Sequence[Group],
        choice: Choice,
        reply: ScoringReply | None,
        trusted: Mapping[str, Sequence[Group]],
    ) -> dict[str, float]:
        """Note a step's choice while its rows are still there, and return the metrics."""
        started = time.perf_counter()
        rate_P = success_rates(groups, self._config.success_threshold)
        scores = None if reply is None else reply.scores
        columns = log_columns(step, groups, choice, rate_P, scores)
        labels = {name: self._labels(name, groups) for name in self._log.columns}
        self._log.write(step, columns | {EXTRA + name: values for name, values in labels.items()})
        samples = self._samples(step, batch, groups, choice, columns)
        composed: dict[str, float] = {}
        for name, values in {"data_source": columns["data_source"], **labels}.items():
            composed |= self._composition.metrics(name, values, columns["kept"])
        if self._pages is not None:
            self._pages.add(step, columns, samples, composed)
        metrics = {
            **choice.metrics,
            **selection_metrics(groups, choice.selection, rate_P),
            **score_metrics(choice.score_P, choice.selection),
            **composed,
            **token_metrics(groups, trusted, reply),
        }
        if reply is not None:
            metrics |= reply_metrics(reply, len(self._config.validation.trusted_sets()) > 1)
        if trusted:
            metrics |= trusted_metrics(trusted, is_degenerate=not (reply is not None and reply.is_fresh))
        self.seconds = time.perf_counter() - started
        return metrics

    def _labels(self, column: str, groups: Sequence[Group]) -> list[str]:
        return [self._problems.label(column, group.problem.problem_id) for group in groups]

    def _samples(
        self, step: int, batch: KVBatchMeta, groups: Sequence[Group], choice: Choice, columns: Mapping[str, Any]
    ) -> dict[str, list[Any]]:
        """Write texts of some of the scored candidates, and return them."""
        log = self._config.log
        chosen = choose_samples(
            log.sample_problems, choice.score_P, columns["dot"], columns["norm"], choice.dot_error_P
        )
        samples = sample_columns(
            step, groups, chosen, batch.partition_id, self._problems, self._decode, log.sample_chars
        )
        if chosen:
            self._log.write_samples(step, samples)
        return samples
