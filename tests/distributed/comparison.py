# SPDX-License-Identifier: Apache-2.0
"""Scores as the cases report them, compared with the oracle's or with each other."""

from __future__ import annotations

from typing import Any

import torch

KEYS = ("dot", "norm", "cosine", "derivative", "direction_norm")


def case_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    assert "error" not in results[name], results[name]["error"]
    return results[name]


def largest_errors(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Return the largest relative error of each kind of score that `actual` has. What is nan must be nan in both."""
    errors = {}
    for key in KEYS:
        found, wanted = _values(actual, key), _values(expected, key)
        if found is None or wanted is None:
            continue
        assert found.shape == wanted.shape, (key, found.shape, wanted.shape)
        assert torch.equal(found.isnan(), wanted.isnan()), key
        # Where zero is expected, nothing else will do.
        error = torch.where(found == wanted, 0.0, (found - wanted).abs() / wanted.abs())
        errors[key] = error.nan_to_num(nan=0.0).max().item()
    return errors


def _values(scores: dict[str, Any], key: str) -> torch.Tensor | None:
    if key == "cosine":
        dot_P, norm_P = _values(scores, "dot"), _values(scores, "norm")
        return None if dot_P is None or norm_P is None else torch.where(norm_P == 0, 0.0, dot_P / norm_P)
    return None if scores[key] is None else torch.tensor(scores[key], dtype=torch.float64)
