# SPDX-License-Identifier: Apache-2.0
"""How many of the machine's cores are idle: threads beyond them wait for each other at every operation."""

import os

import psutil

WATCHED_S = 1.0


def idle_cores() -> int:
    """Return how many cores nobody used during one second, at least 1. The caller sleeps meanwhile."""
    idle_share = 1 - psutil.cpu_percent(WATCHED_S) / 100
    return max(1, round((os.cpu_count() or 1) * idle_share))
