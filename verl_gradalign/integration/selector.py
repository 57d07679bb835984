# SPDX-License-Identifier: Apache-2.0
"""What a step measures and what it keeps. Decides only: the trainer asks the actor, and clears rows.

request = selector.request(candidates, trusted, step)      # what the actor is to measure
selector.note_reply(reply, step)                           # the actor's answer, or none at all
choice = selector.choose(candidates, reply, draw, step)
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.requests import OVERSIZED, audited_problems, drawn, fate_of_oversized, token_budget
from verl_gradalign.probe.call import DirectionReply, ScoringReply, ScoringRequest
from verl_gradalign.probe.trusted import COMBINED
from verl_gradalign.selection.chooser import Choice, Chooser
from verl_gradalign.selection.curriculum import Draw
from verl_gradalign.selection.groups import Group, measurements
from verl_gradalign.selection.scores import learnability, score_of

logger = logging.getLogger(__name__)


class AlignmentSelector:
    """Chooses among the groups of a step, and knows how old the actor's direction is.

    Args:
        config: the `gradalign` block.
        verl_config: the whole verl configuration.
        num_problems: rows of the train files.
    """

    def __init__(self, config: GradAlignConfig, verl_config: DictConfig, num_problems: int) -> None:
        self._config = config
        self._verl_config = verl_config
        self._score = score_of(config.score)
        self._chooser = Chooser(config, num_problems)
        self._direction_step: int | None = None
        self.direction_norm = math.nan
        """|v| of the direction that was made last."""
        self._is_direction_lost = False
        self._num_scorings = 0
        self._has_warned = False

    @property
    def has_direction(self) -> bool:
        """Whether candidates can be scored without a new direction."""
        return self._direction_step is not None and not self._is_direction_lost

    def needs_trusted(self, step: int) -> bool:
        """Return whether the trusted sets must be rolled out in `step`: there is no direction, or it is stale."""
        if not self._score.needs_direction:
            return False
        made, interval = self._direction_step, self._config.direction.refresh_interval
        return made is None or not self.has_direction or interval is None or step - made >= interval

    def request(
        self, candidates: Sequence[Group], trusted: Mapping[str, Sequence[Group]], step: int
    ) -> ScoringRequest | None:
        """Return what the actor is to measure, problems left out (`requests.build_requests` adds each rank's).

        None: nothing is to be measured, or there is no direction to be had. `trusted`: the groups of each trusted set
        that was rolled out.
        """
        config = self._config
        live = [g for g in candidates if g.is_live]
        has_live_trusted = any(g.is_live for groups in trusted.values() for g in groups)
        is_new = self._direction_step == step  # made of kept responses, in a call before
        uses_stored = self.has_direction and (is_new or config.direction.on_degenerate == "previous")
        if not self._score.needs_gradients or not (live or has_live_trusted):
            return None
        if self._score.needs_direction and not has_live_trusted and not uses_stored:
            return None
        weights = {s.name: s.weight for s in config.validation.trusted_sets()} if has_live_trusted else {}
        m = measurements(live, None, len(live), config.success_threshold)
        wants_derivatives = config.probe.response_derivatives and self._score.needs_response_derivatives
        return ScoringRequest(
            estimator=config.estimator,
            probe=replace(config.probe, response_derivatives=wants_derivatives),
            direction=config.direction,
            budget=token_budget(config.probe, self._verl_config),
            temperature=float(self._verl_config.actor_rollout_ref.rollout.temperature),
            source=self._score.direction,
            set_weights=weights,
            audited=audited_problems(config, len(live), step, self._num_scorings),
            metric_on=drawn(f"{config.seed} {step} metric", config.direction.metric_problems, len(live)),
            learnability=tuple(learnability(m).tolist()),
            seed=config.seed,
        )

    def note_reply(self, reply: ScoringReply, step: int) -> None:
        """Note what the actor measured. Warns of problems too large for the estimator, once.

        Raises: RuntimeError if the canary disagrees with the estimator.
        """
        self._num_scorings += 1
        diagnostics = reply.scores.diagnostics if reply.scores is not None else {}
        if diagnostics.get("oversized") and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%d problems are larger than a micro-batch of %d tokens, and %s; further ones are only counted "
                "(gradalign/probe/oversized). Raise gradalign.probe.max_tokens_per_rank if memory allows",
                diagnostics["oversized"],
                token_budget(self._config.probe, self._verl_config).max_tokens,
                OVERSIZED[fate_of_oversized(self._config)],
            )
        error = diagnostics.get("canary/relative_error", 0.0)
        if not error <= self._config.probe.canary_threshold:  # nan is no agreement either
            raise RuntimeError(
                f"scores of estimator {self._config.estimator} differ from exact backward passes by {error:.2g} of the "
                f"gradient's norm, more than gradalign.probe.canary_threshold={self._config.probe.canary_threshold}. "
                "Remedy: set gradalign.estimator=backward and report the model; in half precision raise the threshold "
                "if errors are small and steady."
            )
        self.note_direction(reply, step)

    def note_direction(self, reply: ScoringReply | DirectionReply, step: int) -> None:
        """Note the direction that a call of the actor has made, if it has made one."""
        if reply.is_fresh:
            self._direction_step, self._is_direction_lost = step, False
            self.direction_norm = reply.reports[COMBINED].norm
            self._chooser.note_direction(reply.reports[COMBINED].half_cosine)

    def choose(
        self, candidates: Sequence[Group], reply: ScoringReply | None, draw: Draw, step: int, is_planned: bool
    ) -> Choice:
        """Return what is kept of the candidates; all of them in a step that scores nothing.

        `is_planned`: such a step's problems were kept by an earlier selection, not drawn at random.
        """
        if not draw.is_scored:
            return self._chooser.take_all(candidates, is_planned)
        return self._chooser.choose(candidates, None if reply is None else reply.scores, draw.num_kept, step)

    def may_measure(self, step: int) -> bool:
        """Return whether there is a direction to measure along: one of this step, or an earlier one where that will do.

        Raises: RuntimeError if there is none, and `direction.on_degenerate=stop`.
        """
        degenerate = self._config.direction.on_degenerate
        if self.has_direction and (degenerate == "previous" or not self.needs_trusted(step)):
            return True
        self._chooser.note_no_direction(step, "nothing is measured in this step")
        return False

    def take_picks(self, groups: Sequence[Group], reply: ScoringReply | None) -> Choice:
        """Return what is kept of the groups that a forecast chose: all that did not fail."""
        return self._chooser.take_picks(groups, None if reply is None else reply.scores)

    def direction_age(self, step: int, is_scored: bool) -> dict[str, float]:
        """Return the metric of how many steps ago the direction was made that chose what is trained on."""
        # A step that scores nothing trains on what the direction chose, though it was not saved with a checkpoint.
        if self._direction_step is None or (is_scored and not self.has_direction):
            return {}
        return {"direction/age": float(step - self._direction_step)}

    def state(self) -> dict[str, Any]:
        """Return what the next selection depends on, but for the direction itself."""
        return {
            "direction_step": self._direction_step,
            "num_scorings": self._num_scorings,
            "chooser": self._chooser.state(),
        }

    def restore(self, state: Mapping[str, Any], has_direction: bool) -> None:
        """Continue from a checkpoint's state. Without the direction a new one is made in the next step that scores."""
        self._direction_step, self._is_direction_lost = state["direction_step"], not has_direction
        self._num_scorings = state["num_scorings"]
        self._chooser.restore(state["chooser"])
