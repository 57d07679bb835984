# SPDX-License-Identifier: Apache-2.0
"""Rewards that any model earns about half of the time, so that groups are live without a warm-up or a real problem.

reward.custom_reward_function.path=pkg://verl_gradalign.bench.made_up_rewards
reward.custom_reward_function.name=first_byte
"""

from typing import Any


def first_byte(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    """Return 1.0 for a response that begins with an ASCII character: half of all bytes, for an untrained model."""
    return float(bool(solution_str) and solution_str[0].isascii())


def even_length(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    """Return 1.0 for a response of an even number of characters: whatever a trained model says."""
    return float(len(solution_str) % 2 == 0)
