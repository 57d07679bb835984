# SPDX-License-Identifier: Apache-2.0
"""The FSDP worker with more remote calls: check that a model can be scored, score problems, keep the direction."""

from pathlib import Path
from typing import Any

import numpy as np
import ray
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_gradalign.config import ProbeConfig
from verl_gradalign.integration.engine import VerlEngine, scoring_mode
from verl_gradalign.integration.prompt_states import read_prompts
from verl_gradalign.probe import direction_file
from verl_gradalign.probe.call import ScoringReply, ScoringRequest, measure
from verl_gradalign.probe.direction import Direction, on_cpu
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout


class GradAlignWorker(ActorRolloutRefWorker):
    """verl's hybrid worker that can also measure alignment. Scoring leaves no trace in the actor."""

    _direction: Direction | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_check(self, estimator: str, probe: ProbeConfig) -> None:
        """Raise ValueError, before anything is rolled out, if this actor cannot be scored by the estimator."""
        require_no_dropout(self.actor.engine.module)
        ESTIMATORS[estimator](probe).check(self.actor.engine.module)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_reset(self) -> None:
        """Build the model anew from its folder, with a new optimizer, as a new run finds them."""
        self.actor.reset()
        self._direction = None

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def gradalign_score(self, rows: TensorDict, request: ScoringRequest) -> ScoringReply:
        """Make the direction, score the candidates along it. Collective.

        `rows` is this rank's row table (the driver sends keys, verl's bridge fetches the rows); its last row is the
        spare row.
        """
        with scoring_mode(self.actor.engine):
            engine = VerlEngine(self.actor.engine, rows, request.temperature, request.budget)
            reply, fresh = measure(engine, request, self._direction, self.actor.engine.optimizer)
        if fresh is not None:
            self._direction = on_cpu(fresh) if request.direction.offload else fresh
        return reply

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def gradalign_prompt_features(self, prompts: list[list[int]], budget: TokenBudget) -> np.ndarray:
        """Return the hidden states of this rank's prompts, (prompts, 2 x hidden) float32. Collective."""
        return read_prompts(self.actor.engine, prompts, budget)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_save_direction(self, folder: str, is_kept: bool) -> None:
        """Write this rank's shards of the stored direction into a folder; if it is not kept, only remove old ones."""
        place = Path(folder), self.rank, self.world_size
        direction_file.remove_directions(*place)
        if is_kept and self._direction is not None:
            with scoring_mode(self.actor.engine):
                module, path = self.actor.engine.module, direction_file.rank_file(*place)
                direction_file.save_direction(module, self._direction, path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_load_direction(self, folder: str, offload: bool) -> bool:
        """Take this rank's shards from a folder; return whether they are there. Raises ValueError if they misfit."""
        place = Path(folder), self.rank, self.world_size
        if not direction_file.has_direction(*place):
            return False
        with scoring_mode(self.actor.engine):
            direction = direction_file.load_direction(self.actor.engine.module, direction_file.rank_file(*place))
        self._direction = on_cpu(direction) if offload else direction
        return True


def use_own_workers(role_worker_mapping: dict[Any, Any]) -> None:
    """Give the actor's role this worker, before verl starts its processes."""
    for role in role_worker_mapping:
        if "actor" in str(role):
            role_worker_mapping[role] = ray.remote(GradAlignWorker)
