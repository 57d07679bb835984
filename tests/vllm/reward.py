# SPDX-License-Identifier: Apache-2.0
"""A reward that an untrained model earns about half of the time, so that groups are live without a warm-up."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """Return 1.0 for a response that begins with an ASCII character: half of all bytes."""
    return float(bool(solution_str) and solution_str[0].isascii())
