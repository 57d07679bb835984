# SPDX-License-Identifier: Apache-2.0
"""Whether TransferQueue has room for all answers that a selection waits for.

Its in-memory storage refuses rows beyond `total_storage_size`; verl's rollout catches that for each answer, so the run
goes on and the problems count as failed. `+gradalign=...` lifts the limit (configs/gradalign/base.yaml); what a user
sets is checked here.
"""

import math

from omegaconf import DictConfig, OmegaConf

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse
from verl_gradalign.selection.curriculum import num_candidates
from verl_gradalign.selection.scores import score_of

KEY = "transfer_queue.backend.SimpleStorage.total_storage_size"


def check_storage(config: GradAlignConfig, verl_config: DictConfig, num_problems: int, num_trusted: int) -> None:
    """Raise ValueError if the storage has a limit below the rows that a scored step needs at once.

    `num_problems` are in the train files, `num_trusted` rows are those of the trusted sets, each problem answered once
    by all its responses. One row for each response; agents that give several a response need as many times more.
    """
    limit = OmegaConf.select(verl_config, KEY)
    if limit is None or OmegaConf.select(verl_config, "transfer_queue.backend.storage_backend") != "SimpleStorage":
        return
    batch_size, n = verl_config.data.train_batch_size, verl_config.actor_rollout_ref.rollout.n
    num = batch_size
    if not config.is_forecast and (score_of(config.score).rank is not None or config.schedule != "step"):
        num = num_candidates(config, num_problems, batch_size)
        n = n if config.schedule == "step" else config.curriculum.n or n
    num_trusted = trusted_rows(config, num_trusted)
    num_rows = num * n + num_trusted
    if num_rows > limit:
        parts = f"{num} candidates x {n} responses" + (f" and {num_trusted} trusted ones" if num_trusted else "")
        why = f"schedule {config.schedule} needs {num_rows} rows at once ({parts}); what does not fit would be lost"
        refuse(KEY, limit, why, f"set {KEY}=null (no limit), or {num_rows} or more")


def trusted_rows(config: GradAlignConfig, num_trusted: int) -> int:
    """Return the most trusted rows that are there at once: those of a step, and what `direction.replay` keeps."""
    direction = config.direction
    if not direction.keeps_responses:
        return num_trusted
    assert direction.replay is not None and direction.refresh_interval is not None
    of_step = math.ceil(num_trusted / direction.refresh_interval) if direction.rolling else num_trusted
    # A step's rows are copied before the oldest, and they themselves, are cleared.
    return direction.replay * num_trusted + 2 * of_step
