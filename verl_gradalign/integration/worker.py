# SPDX-License-Identifier: Apache-2.0
"""verl's worker with more remote calls: check that a model can be scored, make the direction, score problems."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from tensordict import TensorDict
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_gradalign.config import ProbeConfig
from verl_gradalign.integration import update_measure
from verl_gradalign.integration.engine import VerlEngine, module_of, scoring_mode
from verl_gradalign.integration.model_check import check_row_use
from verl_gradalign.integration.prompt_states import read_prompts
from verl_gradalign.integration.requests import RowUse
from verl_gradalign.integration.run_identity import direction_folder
from verl_gradalign.integration.update_measure import MEASURE, UpdateReply, UpdateRequest, measured_update
from verl_gradalign.probe import direction_file
from verl_gradalign.probe.call import (
    DirectionReply,
    DirectionRequest,
    ScoringReply,
    ScoringRequest,
    make_direction,
    measure,
)
from verl_gradalign.probe.direction import Direction, on_cpu
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import require_no_dropout


class GradAlignWorker(ActorRolloutRefWorker):
    """verl's hybrid worker that can also measure alignment. Scoring leaves no trace in the actor."""

    _direction: Direction | None = None
    _update_reply: UpdateReply | None = None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_check(self, estimator: str, probe: ProbeConfig, use: RowUse, in_update: bool = False) -> None:
        """Raise ValueError, before anything is rolled out, if this actor cannot be scored by the estimator."""
        module = module_of(self.actor.engine)
        if in_update:
            update_measure.check(module, estimator, probe)
            return
        require_no_dropout(module)
        ESTIMATORS[estimator](probe).check(module)
        check_row_use(estimator, use, module)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_reset(self, learning_rate: float) -> None:
        """Build the model anew from its folder, with a new optimizer, as a new run of that learning rate finds them."""
        # verl's engine makes its optimizer from this configuration whenever it builds its model.
        engine = self.actor.engine
        engine.optimizer_config = replace(engine.optimizer_config, lr=learning_rate)
        self.actor.reset()
        self._direction = self._update_reply = None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: TensorDict) -> TensorDict | None:
        """Update the actor as verl does; measure the rows in passing if the batch asks for it and there is a direction.

        Returns verl's own output. What was measured is asked for by `gradalign_update_reply`: an output with a column
        for each row would be stored, and verl's trainer would find no metrics in what it gets in its stead.
        """
        request: UpdateRequest | None = tu.pop(data, MEASURE, None)
        self._update_reply = None
        if request is None or self._direction is None:
            return super().update_actor(data)
        with measured_update(self.actor, self._direction, data, request) as measured:
            output = super().update_actor(data)
        self._update_reply = measured.reply(output)
        return output

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_update_reply(self) -> UpdateReply | None:
        """Return what this rank measured in the last update, once; None if it did not measure."""
        reply, self._update_reply = self._update_reply, None
        return reply

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def gradalign_score(self, rows: TensorDict, request: ScoringRequest) -> ScoringReply:
        """Make the direction, score the candidates along it. Collective.

        `rows` is this rank's row table (the driver sends keys, verl's bridge fetches the rows); its last row is the
        spare row.
        """
        with scoring_mode(self.actor.engine):
            engine = VerlEngine(self.actor.engine, rows, request.temperature, request.budget, request.coefficients)
            reply, fresh = measure(engine, request, self._direction, self.actor.engine.optimizer)
        self._keep(fresh, request.direction.offload)
        return reply

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def gradalign_prompt_features(self, prompts: list[list[int]], budget: TokenBudget) -> np.ndarray:
        """Return the hidden states of this rank's prompts, (prompts, 2 x hidden) float32. Collective."""
        return read_prompts(self.actor.engine, prompts, budget)

    @register(dispatch_mode=Dispatch.DP_COMPUTE)
    def gradalign_make_direction(self, rows: TensorDict, request: DirectionRequest) -> DirectionReply:
        """Make the direction of kept responses, read at the present policy, and store it. Collective.

        `rows` as in `gradalign_score`, with the log-probs of the policy that answered. A call of `gradalign_score`
        without trusted sets then scores along it. A degenerate one does not replace the one before.
        """
        with scoring_mode(self.actor.engine):
            given = request.temperature, request.budget, request.coefficients
            engine = VerlEngine(self.actor.engine, rows, *given, is_replayed=True)
            reply, fresh = make_direction(engine, request, self._direction)
            reply = replace(reply, shares=engine.replay_shares())
        self._keep(fresh, request.direction.offload)
        return reply

    def _keep(self, fresh: Direction | None, offload: bool) -> None:
        if fresh is not None:
            self._direction = on_cpu(fresh) if offload else fresh

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_save_direction(self, folder: str, is_kept: bool) -> None:
        """Write this rank's shards of the stored direction into a folder; if it is not kept, only remove old ones."""
        place = Path(folder), self.rank, self.world_size
        direction_file.remove_directions(*place)
        if is_kept and self._direction is not None:
            with scoring_mode(self.actor.engine):
                module, path = module_of(self.actor.engine), direction_file.rank_file(*place)
                direction_file.save_direction(module, self._direction, path)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradalign_load_direction(self, folder: str, offload: bool) -> bool:
        """Take this rank's shards from a folder; return whether they are there. Raises ValueError if they misfit."""
        place = Path(folder), self.rank, self.world_size
        if not direction_file.has_direction(*place):
            return False
        with scoring_mode(self.actor.engine):
            direction = direction_file.load_direction(module_of(self.actor.engine), direction_file.rank_file(*place))
        self._direction = on_cpu(direction) if offload else direction
        return True


class DetachedWorker(GradAlignWorker, DetachActorWorker):
    """The same for separate_async, whose actor can go back to the policy that was pushed last."""


def use_own_workers(role_worker_mapping: dict[Any, Any], worker_class: type[GradAlignWorker] = GradAlignWorker) -> None:
    """Give the actor's role a worker of this package, before verl starts its processes."""
    for role in role_worker_mapping:
        if "actor" in str(role):
            role_worker_mapping[role] = ray.remote(worker_class)


def load_direction(workers: Any, folder: Path, offload: bool) -> bool:
    """Have every rank load its part of a checkpoint's direction; return whether there is one.

    Raises: ValueError if some ranks have a part and others have none.
    """
    where = direction_folder(folder)
    # The workers' answer, not the driver's: their disks may be other disks.
    loaded = workers.gradalign_load_direction(str(where), offload)
    if any(loaded) and not all(loaded):
        missing = [rank for rank, is_loaded in enumerate(loaded) if not is_loaded]
        raise ValueError(
            f"{where} has no gradalign_direction file for ranks {missing} of {len(loaded)}, but has the others'. "
            "Remedy: start the ranks on the machines that wrote them, as verl's own checkpoint asks for, or delete "
            "the checkpoint's gradalign_direction files on all machines to make a new direction."
        )
    return all(loaded)
