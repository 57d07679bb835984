# SPDX-License-Identifier: Apache-2.0
"""verl's rollout correction before a selection: by how much training weighs tokens, and which it leaves out.

The rollout engine's probabilities differ a little from the actor's. Where `algorithm.rollout_correction` has training
weigh (`rollout_is`) or mask (`rollout_rs`) tokens by that, scores do the same, by verl's own function. It asks for the
actor's log-probs of all candidates, one forward pass more.

Shape legend: R rows, T response tokens.
"""

from collections.abc import Mapping

from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from verl.protocol import DataProto
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch

READ = ("old_log_probs", "rollout_log_probs", "response_mask")
"""The columns that a correction is computed of."""


def correction_of(verl_config: DictConfig) -> DictConfig | None:
    """Return by what settings training weighs or masks tokens ahead of its update; None where it does not.

    verl's v1 trainer does not in bypass mode (its loss `bypass_mode` may, by settings of its own), nor where the
    rollout keeps no log-probs.
    """
    correction: DictConfig | None = verl_config.algorithm.get("rollout_correction")
    if not correction or correction.get("bypass_mode"):
        return None
    is_asked_for = correction.get("rollout_is") or correction.get("rollout_rs")
    return correction if is_asked_for and verl_config.actor_rollout_ref.rollout.calculate_log_probs else None


def differs_in_response(verl_config: DictConfig) -> bool:
    """Return whether tokens of one response may be weighed or masked differently."""
    correction = correction_of(verl_config)
    if correction is None:
        return False
    return bool(correction.get("rollout_is") == "token" or "token" in str(correction.get("rollout_rs")))


def is_over_all_rows(verl_config: DictConfig) -> bool:
    """Return whether weights are divided by their mean over all rows."""
    correction = correction_of(verl_config)
    return correction is not None and bool(correction.get("rollout_is_batch_normalize"))


def correct(columns: Mapping[str, Tensor] | TensorDict, correction: DictConfig) -> tuple[Tensor, Tensor | None]:
    """Return which tokens training keeps, and what it multiplies their loss by, None for 1; both (rows, tokens).

    `columns` are padded: those of READ.
    """
    given = {name: columns[name] for name in READ}
    data = DataProto(batch=TensorDict(given, batch_size=len(given["response_mask"])))
    data, _ = compute_rollout_correction_and_add_to_batch(data, correction)
    return data.batch["response_mask"], data.batch.get("rollout_is_weights")
