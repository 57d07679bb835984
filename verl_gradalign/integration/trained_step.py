# SPDX-License-Identifier: Apache-2.0
"""What a step of schedule forecast trains on and measures, over all its updates, until it is concluded.

verl's separate_async cuts a step into several updates, each of a batch of its own; the other modes have one. The
forecast learns once a step, of all of them together, and so does the log.

    trained = TrainedStep(step, batch.partition_id, direction=made, is_measured=True)
    trained.add(groups, trusted)                                             # before each update
    trained.add_update(keys, contribution_R, derivative_R, diagnostics)      # after it, with measure=update
    reply = trained.reply(direction_norm)

Shape legend: R rows of an update.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from verl_gradalign.probe.call import DirectionReply, ScoringReply
from verl_gradalign.selection.groups import Group
from verl_gradalign.selection.update_scores import scores_of_update


@dataclass
class TrainedStep:
    """The groups of a step, and what its updates measured of them."""

    step: int
    partition_id: str
    direction: DirectionReply | None = None
    """What was made for the step; None: nothing could be."""
    is_measured: bool = False
    """Whether the updates measure: there is a direction to measure along."""
    measured_before: ScoringReply | None = None
    """Of a pass of its own ahead of the update, with measure=before, which modes allow that update once a step."""
    groups: list[Group] = field(default_factory=list)
    trusted: dict[str, list[Group]] = field(default_factory=dict)
    _keys: list[str] = field(default_factory=list)
    _contributions: list[Tensor] = field(default_factory=list)
    _derivatives: list[Tensor] = field(default_factory=list)
    _diagnostics: list[Mapping[str, float]] = field(default_factory=list)

    def add(self, groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]]) -> None:
        """Note what was rolled out for the next update, and the trusted groups that have come with it."""
        self.groups += groups
        for name, members in trusted.items():
            self.trusted[name] = [*self.trusted.get(name, ()), *members]

    def add_update(
        self, keys: Sequence[str], contribution_R: Tensor, derivative_R: Tensor, diagnostics: Mapping[str, float]
    ) -> None:
        """Note what an update measured of its rows, whose keys are given in the same order."""
        self._keys += keys
        self._contributions.append(contribution_R)
        self._derivatives.append(derivative_R)
        self._diagnostics.append(diagnostics)

    def reply(self, direction_norm: float) -> ScoringReply | None:
        """Return what was measured of all live groups; None if nothing was. Diagnostics are means over the updates.

        `direction_norm`: |v| of the direction that they were measured along.
        """
        if not self._contributions:
            return self.measured_before
        live = [group for group in self.groups if group.is_live]
        contribution_R, derivative_R = torch.cat(self._contributions), torch.cat(self._derivatives)
        scores = scores_of_update(live, self._keys, contribution_R, derivative_R, direction_norm, self._means())
        reply = ScoringReply(scores, False, {}, 0.0, 0.0)
        # None was made: it is along an earlier one.
        return reply if self.direction is None else self.direction.with_scores(reply)

    def _means(self) -> dict[str, float]:
        names = dict.fromkeys(name for of_update in self._diagnostics for name in of_update)
        values = {name: [d[name] for d in self._diagnostics if name in d] for name in names}
        return {name: sum(found) / len(found) for name, found in values.items()}
