# SPDX-License-Identifier: Apache-2.0
"""schedule=forecast in the trainer: what a forecast chose is rolled out, all of it is trained on, and measured.

With `measure=update` the update itself measures: the step's choice is concluded when the actor was updated. With
`before`, and for scores of rewards alone, it is concluded before, as in the other schedules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from verl_gradalign.integration.update_measure import (
    MEASURE,
    UpdateReply,
    UpdateRequest,
    in_batch_order,
    require_agreement,
)
from verl_gradalign.metrics import named
from verl_gradalign.probe.call import DirectionReply, ScoringReply
from verl_gradalign.selection.chooser import Choice
from verl_gradalign.selection.curriculum import Curriculum, Draw
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.selection.update_scores import scores_of_update


@dataclass(frozen=True)
class RolledOut:
    """What a step rolled out, until it is measured."""

    step: int
    partition_id: str
    groups: Sequence[Group]
    trusted: Mapping[str, Sequence[Group]]
    direction: DirectionReply | None = None
    """What was made for the step; None: nothing could be."""
    is_measured: bool = False
    """Whether the update measures: there is a direction to measure along."""


class ForecastTrainer(SelectionTrainer):
    """The selecting trainer, with one more schedule."""

    _unmeasured: RolledOut | None = None

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
        # In time for the next step, whose prompts are sent while the rollout is awake.
        self._curriculum.prepare(step + 1)
        rolled_out = RolledOut(step, batch.partition_id, groups, trusted)
        if not self.gradalign.measures_in_update:
            return self._conclude(rolled_out, self._measure_step(batch, groups, trusted, step))
        made = self._renew_direction(batch, trusted, step)
        if self.config.trainer.critic_warmup > step:  # no update to measure in
            return self._conclude(rolled_out, None)
        self._unmeasured = replace(rolled_out, direction=made, is_measured=self._selector.may_measure(step))
        return self._selector.take_picks(groups, None), {}

    def _conclude(self, of: RolledOut, reply: ScoringReply | None) -> tuple[Choice, dict[str, float]]:
        """Learn from what was measured, and write it down; return the choice and its metrics."""
        assert isinstance(self._curriculum, Forecasting)
        choice, picks = self._selector.take_picks(of.groups, reply), picks_of(g.problem for g in of.groups)
        metrics: dict[str, float] = {}
        if choice.observations is not None:
            source_of = {group.problem.problem_id: group.problem.data_source for group in of.groups}
            sources = [source_of[problem_id] for problem_id in picks.problem_id_P.tolist()]
            is_fresh = reply is not None and reply.is_fresh
            metrics = self._curriculum.observe(of.step, picks, choice.observations, sources, is_fresh)
        read = partial(read_responses, of.partition_id)
        noted = of.step, read, of.groups, choice, reply, of.trusted, picks, choice.observations
        return choice, metrics | self._notes.record(*noted) | self._kept_metrics()

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Have verl's update measure what it trains on. The checkpoint, which follows, holds what was learnt of it."""
        of, self._unmeasured = self._unmeasured, None
        if of is None:
            return super()._update_actor(batch, metrics)
        if of.is_measured:
            batch.extra_info[MEASURE] = self._update_request(of.step)
        keys = list(batch.keys)
        batch = super()._update_actor(batch, metrics)
        reply = self._measured_in_update(of, keys)
        metrics |= named(self._conclude(of, reply)[1])
        return batch

    def _update_request(self, step: int) -> UpdateRequest:
        config, interval = self.gradalign, self.gradalign.probe.canary_interval
        is_audited = interval > 0 and step % interval == 1 % interval
        return UpdateRequest(config.estimator, config.probe, config.direction.metric, is_audited)

    def _measured_in_update(self, of: RolledOut, keys: Sequence[str]) -> ScoringReply | None:
        """Return what the update measured of the rows that it was given; None if it measured nothing.

        Raises: RuntimeError if that does not add up to the update's own gradient.
        """
        workers = self.actor_rollout_wg
        replies: list[UpdateReply] = workers.gradalign_update_reply()
        if replies[0] is None:
            return None
        require_agreement(replies[0], self.gradalign.probe)
        contribution_R, derivative_R = in_batch_order(replies, list(workers._query_dispatch_info("actor")))
        live = [group for group in of.groups if group.is_live]
        norm, diagnostics = self._selector.direction_norm, replies[0].diagnostics
        scores = scores_of_update(live, keys, contribution_R, derivative_R, norm, diagnostics)
        if of.direction is None:  # along an earlier one
            return ScoringReply(scores, False, {}, 0.0, 0.0)
        return of.direction.with_scores(ScoringReply(scores, False, {}, 0.0, 0.0))

    def _trained(
        self, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], choice: Choice, step: int
    ) -> list[Group]:
        """Return also the trusted groups that are to be trained on."""
        trained = super()._trained(groups, trusted, choice, step)
        return trained if self._kept_responses is None else trained + self._kept_responses.trainable(trusted)
