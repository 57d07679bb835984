# SPDX-License-Identifier: Apache-2.0
"""Correlations between two rankings of the same problems. Pure functions.

Shape legend: P problems.
"""

import math

import torch
from torch import Tensor

MIN_RANKED = 3
"""Problems below which a rank correlation says nothing."""
TINY = 1e-300


def spearman(first_P: Tensor, second_P: Tensor) -> float:
    """Return Spearman's rank correlation, ties at their average rank; nan for fewer than two problems or no spread."""
    if first_P.numel() < 2:
        return float("nan")
    return torch.corrcoef(torch.stack([_ranks(first_P), _ranks(second_P)]))[0, 1].item()


def spearman_brown(correlation: float) -> float:
    """Return the reliability of a whole from the correlation of its two halves, 2r / (1 + r), at least -1; nan of nan.

    The bound matters for negative correlations only, where the formula runs off to minus infinity.
    Source: Spearman (1910), Brown (1910).
    """
    return correlation if math.isnan(correlation) else max(-1.0, 2 * correlation / max(1 + correlation, TINY))


def _ranks(values_P: Tensor) -> Tensor:
    """Return ranks from 0 on, equal values at their mean rank."""
    _, place_P, counts_U = torch.unique(values_P, return_inverse=True, return_counts=True)
    end_U = counts_U.cumsum(0).double()
    return (end_U - (counts_U.double() + 1) / 2)[place_P]
