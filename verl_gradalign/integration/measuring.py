# SPDX-License-Identifier: Apache-2.0
"""What a trainer asks of the actor while the rollout sleeps: the direction of the trusted sets, and groups' scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.utils import create_rl_dataset

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration import run_identity
from verl_gradalign.integration.in_flight import InFlight
from verl_gradalign.integration.prompts import PromptTable
from verl_gradalign.integration.requests import build_requests
from verl_gradalign.integration.rollouts import on_all_ranks
from verl_gradalign.integration.selector import AlignmentSelector
from verl_gradalign.integration.trusted_store import Part, TrustedStore
from verl_gradalign.integration.worker import load_direction
from verl_gradalign.probe.call import DirectionReply, ScoringReply
from verl_gradalign.selection.curriculum import Draw
from verl_gradalign.selection.groups import Group
from verl_gradalign.selection.scores import Score

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer as _Trainer
else:
    _Trainer = object


class MeasuringTrainer(_Trainer):
    """Mixed into a trainer of verl: rolls out the trusted sets when they are due, and measures groups."""

    gradalign: GradAlignConfig
    _score: Score
    _selector: AlignmentSelector
    _in_flight: InFlight
    _draw: Draw
    _is_asleep = False
    _kept_responses: TrustedStore | None = None
    """None: v is made of the trusted responses of one step."""
    _part: Part = {}
    """Kept responses that the step's direction was made of."""
    _replayed: Mapping[str, float] = {}
    """What was found of them."""

    def _init_trusted(self) -> None:
        """Read the trusted sets, where the score needs them."""
        self._trusted = {
            s.name: (PromptTable(self._dataset(s.files)), s.n)
            for s in self.gradalign.validation.trusted_sets()
            if self._score.needs_direction
        }
        if self._trusted and self.gradalign.direction.keeps_responses:
            problem_ids = {name: table.problem_ids.tolist() for name, (table, _) in self._trusted.items()}
            self._kept_responses = TrustedStore(self.gradalign, self.config, problem_ids)

    @property
    def _rollout_n(self) -> int:
        return int(self.config.actor_rollout_ref.rollout.n)

    def _dataset(self, files: Any) -> Any:
        data = self.config.data
        return create_rl_dataset(list(files), data, self.tokenizer, self.processor, is_train=False, max_samples=-1)

    def _due_trusted(self, step: int) -> dict[str, list[int]]:
        """Return the problems of each trusted set that the step rolls out."""
        if self._kept_responses is not None:
            return self._kept_responses.due(step) if self._draw.is_scored else {}
        if not (self._draw.is_scored and self._selector.needs_trusted(step)) or self._in_flight.trusted():
            return {}
        return {name: table.problem_ids.tolist() for name, (table, _) in self._trusted.items()}

    def _measure_step(
        self, batch: KVBatchMeta, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], step: int
    ) -> ScoringReply | None:
        """Have the actor measure the live groups. None if there is nothing to measure, or no direction to be had."""
        if self._kept_responses is None:
            return self._measure_groups(batch, groups, trusted, step)
        made = self._renew_direction(batch, trusted, step)
        reply = self._measure_groups(batch, groups, {}, step)
        return reply if made is None else made.with_scores(reply)

    def _renew_direction(
        self, batch: KVBatchMeta, trusted: Mapping[str, Sequence[Group]], step: int
    ) -> DirectionReply | None:
        """Have the actor make the step's direction of a part of the kept responses, or of those just generated.

        None where there are none with a gradient, and ahead of a step's further updates: the direction is one for all.
        """
        if self._kept_responses is None:
            # Trusted groups that finish later stay in flight for the next step (`InFlight.takes_trusted`).
            reply = self._measure_groups(batch, (), trusted, step) if trusted else None
            return None if reply is None else reply.of_direction()
        self.free_rollout()
        workers, eos_token_id = self.actor_rollout_wg, self.tokenizer.eos_token_id
        # Of the policy that was pushed last: where a step has several updates, verl goes back to it.
        log_probs = super()._compute_old_log_prob
        self._kept_responses.keep(
            trusted, batch, step, lambda rows: on_all_ranks(rows, log_probs, workers, eos_token_id)
        )
        if self.local_trigger_step > 0:
            return None
        self._part, self._replayed = self._kept_responses.draw(step), {}
        if not self._part:
            return None
        requests = self._kept_responses.requests(self._part, list(workers._query_dispatch_info("actor")))
        made: DirectionReply = workers.gradalign_make_direction(*requests)[0]
        self._replayed = made.shares
        self._selector.note_direction(made, step)
        return made

    def _kept_metrics(self) -> dict[str, float]:
        """Return the metrics of the trusted responses that are kept, after the step's direction was made."""
        return {} if self._kept_responses is None else {**self._kept_responses.metrics(self._part), **self._replayed}

    def _measure_groups(
        self, batch: KVBatchMeta, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], step: int
    ) -> ScoringReply | None:
        """Have the actor measure groups along the direction of `trusted`, or along the stored one."""
        request = self._selector.request(groups, trusted, step)
        if request is None:
            return None
        self.free_rollout()
        workers = self.actor_rollout_wg
        dp_rank_of = list(workers._query_dispatch_info("actor"))
        reply: ScoringReply = workers.gradalign_score(*build_requests(batch, trusted, groups, dp_rank_of, request))[0]
        self._selector.note_reply(reply, step)
        return reply

    def free_rollout(self) -> None:
        """End the sampling before scoring: verl puts replicas on the training devices to sleep, and stops its clock."""
        if not self._is_asleep:
            super().on_sample_end()
        self._is_asleep = True

    def on_sample_end(self) -> None:
        """End the sampling unless scoring has done it already."""
        self.free_rollout()
        self._is_asleep = False

    def _save_trusted(self, folder: Path) -> list[dict[str, Any]] | None:
        """Write the direction, or the responses that it is made of, beside a checkpoint; return what is kept of these.

        The direction is written where it outlives its step: one that is made anew in every step is not worth a file.
        """
        if self._score.needs_direction:
            # Also where none is to be kept: what an earlier run has left there must go.
            where = str(run_identity.direction_folder(folder))
            self.actor_rollout_wg.gradalign_save_direction(where, self._direction_outlives_step)
        if self._kept_responses is None:
            return None
        self._kept_responses.save_rows(run_identity.trusted_rows_file(folder))
        return self._kept_responses.state()

    def _load_trusted(self, folder: Path, state: list[dict[str, Any]] | None) -> bool:
        """Take what `_save_trusted` wrote and returned; return whether there is a direction."""
        if self._kept_responses is not None and state is not None:
            self._kept_responses.restore(state, run_identity.trusted_rows_file(folder))
        if not (self._score.needs_direction and self._direction_outlives_step):
            return False
        return load_direction(self.actor_rollout_wg, folder, self.gradalign.direction.offload)

    @property
    def _direction_outlives_step(self) -> bool:
        own = self.gradalign.direction
        return bool(own.ema) or (own.refresh_interval != 1 and self._kept_responses is None)
