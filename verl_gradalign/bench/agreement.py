# SPDX-License-Identifier: Apache-2.0
"""How far scores are from the reference, and what of it is claimed.

Shape legend: P problems, R responses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verl_gradalign.bench.options import Record
from verl_gradalign.bench.reference import Reference
from verl_gradalign.rank_correlation import spearman
from verl_gradalign.types import ProblemScores

FLOAT32_RMS = 1e-3
"""Of the gradient's norm. Sums of this many float32 products, in another order and by other attention kernels, measured
1e-7 on a tiny model; a layer that was missed, or TF32, is off by more than this."""
HALF_RMS = 0.02
"""In half precision a gradient differs by about 1e-2."""
HALF_SPEARMAN = 0.99
"""Between responses: there are few problems, of which one swap of two near ones takes more."""


def agreement(scores: ProblemScores, reference: Reference) -> Record:
    """Return errors of dot products as shares of the gradients' norms, of norms as shares of themselves, and ranks."""
    error_P = (scores.dot_P - reference.dot_P) / reference.norm_P
    found: Record = {"dot_rms": _rms(error_P), "dot_max": float(error_P.abs().max())}
    if scores.norm_P is not None:
        error_P = scores.norm_P / reference.norm_P - 1
        found |= {"norm_rms": _rms(error_P), "norm_max": float(error_P.abs().max())}
    found["spearman_problems"] = spearman(scores.dot_P, reference.dot_P)
    if scores.response_derivative_PR is not None:
        # Of the contributions to the dot products, which both know of every response.
        known_PR = scores.response_derivative_PR.isfinite()
        pair = scores.response_derivative_PR[known_PR], reference.derivative_PR[known_PR]
        found |= {"spearman_responses": spearman(*pair), "responses": int(known_PR.sum())}
    return found


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def is_exact(found: Record) -> bool:
    """Return whether errors are those of rounding in float32."""
    return max(found["dot_rms"], found.get("norm_rms", 0.0)) <= FLOAT32_RMS


def is_faithful(found: Record) -> bool:
    """Return whether errors are those of rounding in half precision."""
    errors_hold = max(found["dot_rms"], found.get("norm_rms", 0.0)) <= HALF_RMS
    return errors_hold and found.get("spearman_responses", 1.0) >= HALF_SPEARMAN


def largest_difference(first: ProblemScores, second: ProblemScores) -> float:
    """Return the largest difference of two ways' dot products and norms, as a share of the norms."""
    assert first.norm_P is not None and second.norm_P is not None
    differences = torch.stack([first.dot_P - second.dot_P, first.norm_P - second.norm_P])
    return float((differences / second.norm_P).abs().max())
