# SPDX-License-Identifier: Apache-2.0
"""A reward that an untrained model earns about half of the time, so that groups are live without a warm-up.

reward.custom_reward_function.path=pkg://verl_gradalign.bench.first_byte
"""

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    """Return 1.0 for a response that begins with an ASCII character: half of all bytes."""
    return float(bool(solution_str) and solution_str[0].isascii())
