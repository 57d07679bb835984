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
from verl_gradalign.integration.prompt_states import PromptStates, prompt_tokens
from verl_gradalign.integration.requests import token_budget
from verl_gradalign.integration.rollouts import read_responses
from verl_gradalign.integration.selection_trainer import SelectionTrainer
from verl_gradalign.integration.update_scores import scores_of_update
from verl_gradalign.metrics import named
from verl_gradalign.probe.call import ScoringReply
from verl_gradalign.selection.chooser import Choice
from verl_gradalign.selection.curriculum import Curriculum
from verl_gradalign.selection.groups import Group
from verl_gradalign.types import Picks

MEASURE = "gradalign_measure"
"""What tells the worker's update that it is to measure."""


@dataclass(frozen=True)
class RolledOut:
    """What a step rolled out, until it is measured."""

    step: int
    partition_id: str
    groups: Sequence[Group]
    trusted: Mapping[str, Sequence[Group]]
    picks: Picks
    reply: ScoringReply | None
    """On the step's direction; None: there is none to measure along."""


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
        picks = self._curriculum.picks_of(groups)
        self.free_rollout()
        # In time for the next step, whose prompts are sent while the rollout is awake.
        self._curriculum.prepare(step + 1)
        reply = self._renew_direction(batch, trusted, step)
        rolled_out = RolledOut(step, batch.partition_id, groups, trusted, picks, reply)
        if self._updates_measure(step):
            self._unmeasured = rolled_out
            return self._selector.take_picks(groups, None, picks), {}
        measured = self._measure_step(batch, groups, trusted, step)
        return self._conclude(rolled_out, measured)

    def _updates_measure(self, step: int) -> bool:
        """Return whether the step's update measures. verl does not update the actor while the critic warms up."""
        return self.gradalign.measures_in_update and self.config.trainer.critic_warmup <= step

    def _conclude(self, of: RolledOut, reply: ScoringReply | None) -> tuple[Choice, dict[str, float]]:
        """Learn from what was measured, and write it down; return the choice and its metrics."""
        assert isinstance(self._curriculum, Forecasting)
        choice = self._selector.take_picks(of.groups, reply, of.picks)
        metrics: dict[str, float] = {}
        if choice.observations is not None:
            sources = [group.problem.data_source for group in of.groups]
            metrics = self._curriculum.observe(of.step, of.picks, choice.observations, sources)
        read = partial(read_responses, of.partition_id)
        return choice, metrics | self._notes.record(of.step, read, of.groups, choice, reply, of.trusted, of.picks)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Have verl's update measure what it trains on. The checkpoint, which follows, holds what was learnt of it."""
        of, self._unmeasured = self._unmeasured, None
        if of is None:
            return super()._update_actor(batch, metrics)
        batch.extra_info[MEASURE] = of.reply is not None
        batch = super()._update_actor(batch, metrics)
        reply = of.reply
        if reply is not None:
            live = [group for group in of.groups if group.is_live]
            scores = scores_of_update(of.partition_id, live, reply.direction_norm)
            reply = replace(reply, scores=scores)
        metrics |= named(self._conclude(of, reply)[1])
        return batch

    def _trained(self, groups: Sequence[Group], choice: Choice, step: int) -> list[Group]:
        if not isinstance(self._curriculum, Forecasting):
            return super()._trained(groups, choice, step)
        return [groups[place] for place in sorted(choice.selection.kept)]
