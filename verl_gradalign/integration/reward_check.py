# SPDX-License-Identifier: Apache-2.0
"""What a run's reward function says when it is asked directly.

verl writes what a reward function raises into a worker's log and tells the trainer only that a group has failed. So
where groups have failed, the trainer asks a reward worker itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError
from tensordict import TensorDict
from verl.protocol import DataProto

TIMEOUT_S = 60.0
REMEDY = (
    "Remedy: have reward.custom_reward_function give a finite number, or a dict with one under 'score', for every "
    "answer; if it does, look above for errors of the rollout engine or the agent loop ('Error in _run_prompt'). "
    "`verl-gradalign doctor` tries the reward function on your data."
)


def failures_in_words(counts: Mapping[str, int], num_groups: int) -> str:
    """Return how many of a step's groups are not trained on for which reasons, as a sentence."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    num = sum(counts.values())
    which = f"none of {num_groups} candidate groups" if num == num_groups else f"{num} of {num_groups} candidate groups"
    return f"{which} {'can be' if num == num_groups else 'are not'} trained on ({reasons})."


def reward_of_empty_answer(reward_workers: Sequence[Any] | None, prompt: TensorDict, eos_token_id: int) -> str:
    """Return, as a sentence, what the reward function gives or raises for an empty answer to a problem.

    Args:
        reward_workers: verl's reward loop workers; none where rewards are computed elsewhere.
        prompt: the problem as the agent loop is sent it, one row.
        eos_token_id: the only token of the answer.
    """
    if not reward_workers:
        return "Look for errors of the reward function or the reward model above this message."
    try:
        reply = ray.get(reward_workers[0].compute_score.remote(_answered(prompt, eos_token_id)), timeout=TIMEOUT_S)
    except RayTaskError as error:
        return f"For an empty answer the reward function raises {_in_words(error)}."
    except Exception as error:
        return f"The reward worker does not answer ({_in_words(error)})."
    reward = reply.get("reward_score")
    return f"For an empty answer the reward function gives {reward!r} ({type(reward).__name__})."


def _answered(prompt: TensorDict, eos_token_id: int) -> DataProto:
    """Return the problem with an answer of one token, as verl's agent loop sends it to a reward worker."""
    token_11 = torch.tensor([[eos_token_id]])
    tokens = {"prompts": token_11, "responses": token_11, "input_ids": token_11.repeat(1, 2)}
    tokens |= {"attention_mask": torch.ones(1, 2, dtype=torch.int64), "position_ids": torch.arange(2).unsqueeze(0)}
    columns = {}
    for name in prompt.keys():
        columns[name] = np.empty(1, dtype=object)
        value = prompt[name] if name == "global_steps" else prompt[name][0]
        columns[name][0] = getattr(value, "data", value)
    columns |= {"__num_turns__": np.array([2]), "tool_extra_fields": np.array([{}], dtype=object)}
    return DataProto(batch=TensorDict(tokens, batch_size=1), non_tensor_batch=columns)


def _in_words(error: BaseException) -> str:
    """Return an error's class and message; of one that a worker has raised, the worker's."""
    cause = getattr(error, "cause", None) or error
    message = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {message[-1] if message else ''}"
