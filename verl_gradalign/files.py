# SPDX-License-Identifier: Apache-2.0
"""Numbers as JSON has them, which knows neither nan nor infinity."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["without_nan"]


def without_nan(value: Any) -> Any:
    """Return nested values with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
