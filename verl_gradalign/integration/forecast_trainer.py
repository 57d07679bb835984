# SPDX-License-Identifier: Apache-2.0
"""schedule=forecast in the trainer: what a forecast chose is rolled out, all of it is trained on, and measured.

With `measure=update` the update itself measures; with `before`, and for scores of rewards alone, all is known before.
Either way the forecast learns, and the log is written, when the step's updates are through (`trained_step.py`).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transfer_queue import KVBatchMeta

from verl_gradalign.integration.features import ProblemFeatures
from verl_gradalign.integration.forecasting import Forecasting
from verl_gradalign.integration.in_flight import picks_of, with_forecasts
from verl_gradalign.integration.prompt_states import PromptStates, prompt_tokens
from verl_gradalign.integration.requests import token_budget
from verl_gradalign.integration.rollouts import read_responses
from verl_gradalign.integration.selection_trainer import SelectionTrainer
from verl_gradalign.integration.trained_step import TrainedStep
from verl_gradalign.integration.update_measure import (
    MEASURE,
    UpdateReply,
    UpdateRequest,
    in_batch_order,
    require_agreement,
)
from verl_gradalign.metrics import named
from verl_gradalign.selection.chooser import Choice
from verl_gradalign.selection.curriculum import Curriculum, Draw
from verl_gradalign.selection.groups import Group, Problem


class ForecastTrainer(SelectionTrainer):
    """The selecting trainer, with one more schedule."""

    _trained_step: TrainedStep | None = None
    """Of schedule forecast, while its updates are made."""

    def _new_curriculum(self) -> Curriculum | Forecasting | None:
        if not self.gradalign.is_forecast:
            return super()._new_curriculum()
        states = None
        if "prompt" in self.gradalign.forecast.features:
            tokens, budget = prompt_tokens(self.config), token_budget(self.gradalign.probe, self.config)
            # The workers are started later than the pool is read.
            states = lambda chats: PromptStates(tokens, self.actor_rollout_wg, budget)(chats)  # noqa: E731
        features = ProblemFeatures(self.gradalign, self._pool, states)
        return Forecasting(self.gradalign, self._pool, self.config.data.train_batch_size, features)

    def _draw_problems(self, step: int) -> Draw:
        """Leave room in the batch for the trusted groups that are trained on."""
        if not isinstance(self._curriculum, Forecasting):
            return super()._draw_problems(step)
        kept = self._kept_responses
        return self._curriculum.draw(step, 0 if kept is None else kept.num_trainable(step))

    def _sent(self, problems: Sequence[Problem], is_drawn: bool) -> Sequence[Problem]:
        picks = self._curriculum.picks if isinstance(self._curriculum, Forecasting) else None
        return with_forecasts(problems, picks) if picks is not None and is_drawn else problems

    def on_init_end(self) -> None:
        """Make the first features while the rollout still sleeps: afterwards it holds the devices' memory."""
        if isinstance(self._curriculum, Forecasting):
            self._curriculum.prepare(self.global_steps + 1)
        super().on_init_end()

    def _select(
        self, batch: KVBatchMeta, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], step: int
    ) -> tuple[Choice, dict[str, float]]:
        """Keep all groups; measure them now, or leave that to the update."""
        if not isinstance(self._curriculum, Forecasting):
            return super()._select(batch, groups, trusted, step)
        self.free_rollout()
        if self.local_trigger_step == 0:
            # In time for the next step, whose prompts are sent while the rollout is awake.
            self._curriculum.prepare(step + 1)
            self._trained_step = TrainedStep(step, batch.partition_id)
        of = self._trained_step
        assert of is not None
        of.add(groups, trusted)
        if not self.gradalign.measures_in_update:
            of.measured_before = self._measure_step(batch, groups, trusted, step)
            return self._selector.take_picks(groups, of.measured_before), {}
        made = self._renew_direction(batch, trusted, step)
        if self.local_trigger_step == 0:
            # While the critic warms up, there is no update to measure in.
            has_update = self.config.trainer.critic_warmup <= step
            of.direction, of.is_measured = made, has_update and self._selector.may_measure(step)
        return self._selector.take_picks(groups, None), {}

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Have verl's update measure what it trains on."""
        of = self._trained_step
        if of is None or not of.is_measured:
            return super()._update_actor(batch, metrics)
        batch.extra_info[MEASURE] = self._update_request(of.step)
        keys = list(batch.keys)
        batch = super()._update_actor(batch, metrics)
        self._note_update(of, keys)
        return batch

    def _update_request(self, step: int) -> UpdateRequest:
        config, interval = self.gradalign, self.gradalign.probe.canary_interval
        is_audited = interval > 0 and step % interval == 1 % interval
        return UpdateRequest(config.estimator, config.probe, config.direction.metric, is_audited)

    def _note_update(self, of: TrainedStep, keys: Sequence[str]) -> None:
        """Take what the update measured of the rows that it was given, if it measured anything.

        Raises: RuntimeError if that does not add up to the update's own gradient.
        """
        workers = self.actor_rollout_wg
        replies: list[UpdateReply] = workers.gradalign_update_reply()
        if replies[0] is None:
            return
        require_agreement(replies[0], self.gradalign.probe)
        contribution_R, derivative_R = in_batch_order(replies, list(workers._query_dispatch_info("actor")))
        of.add_update(keys, contribution_R, derivative_R, replies[0].diagnostics)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> KVBatchMeta:
        """Make verl's step, and learn from it: the checkpoint, which follows, holds what was learnt."""
        self._trained_step = None
        batch = super().step(metrics, timing_raw)
        if self._trained_step is not None:
            metrics |= named(self._conclude(self._trained_step))
        return batch

    def _conclude(self, of: TrainedStep) -> dict[str, float]:
        """Learn from what a step measured, and write it down; return the metrics."""
        assert isinstance(self._curriculum, Forecasting)
        reply = of.reply(self._selector.direction_norm)
        choice, picks = self._selector.take_picks(of.groups, reply), picks_of(g.problem for g in of.groups)
        metrics: dict[str, float] = {}
        if choice.observations is not None:
            source_of = {group.problem.problem_id: group.problem.data_source for group in of.groups}
            sources = [source_of[problem_id] for problem_id in picks.problem_id_P.tolist()]
            is_fresh = reply is not None and reply.is_fresh
            metrics = self._curriculum.observe(of.step, picks, choice.observations, sources, is_fresh)
        read = partial(read_responses, of.partition_id)
        noted = of.step, read, of.groups, choice, reply, of.trusted, picks, choice.observations
        return metrics | self._notes.record(*noted) | self._kept_metrics()

    def _trained(
        self, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], choice: Choice, step: int
    ) -> list[Group]:
        """Return also the trusted groups that are to be trained on."""
        trained = super()._trained(groups, trusted, choice, step)
        return trained if self._kept_responses is None else trained + self._kept_responses.trainable(trusted)
