# SPDX-License-Identifier: Apache-2.0
"""What a problem is known by before it was ever measured, as numbers that a forecast is linear in.

Shape legend: S problems of a shortlist, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Features:
    """The features of a shortlist, in its order."""

    values_SF: np.ndarray
    """float64; the same F numbers, in the same order, throughout a run."""
    prior_F: np.ndarray
    """How much of a score each feature may explain before anything was measured: the prior standard deviation of its
    weight, in units of the scores' typical size; above 0. Wide for a source, narrow for a projection of prompts."""
