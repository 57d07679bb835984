# SPDX-License-Identifier: Apache-2.0
"""The names of the metrics, each with its unit and meaning. All appear as `gradalign/<name>` in verl's loggers."""

from __future__ import annotations

PREFIX = "gradalign/"

METRICS: dict[str, str] = {
    "candidates": "groups that were rolled out as candidates",
    "live": "candidate groups with a non-zero advantage",
    "kept": "groups trained on",
    "kept/<reason>": "groups trained on, by reason: top, filler, random",
    "rejected": "candidate groups not trained on",
    "rejected/<reason>": "candidate groups not trained on, by reason: low_score, dead, failed, non_finite, not_drawn",
    "score/mean, score/min, score/max": "of the scored candidates with a finite score",
    "score/kept_mean": "mean score of the kept ones",
    "success_rate/pool, success_rate/kept": "share of responses with a reward above success_threshold",
    "direction/norm": "|v| of the trusted set's gradient, in units of the loss gradient",
    "direction/age": "steps since the direction in use was made",
    "direction/degenerate": "1 in a step whose trusted groups gave no direction, else 0",
    "validation/groups, validation/live, validation/failed": "trusted groups rolled out, with an advantage, failed",
    "probe/oversized": "candidates larger than a micro-batch, scored one at a time with backward",
    "probe/canary/relative_error": "largest error of the rescored problems, as a share of their gradients' norms",
    "probe/fidelity/spearman": "rank correlation of an approximate estimator with exact dot products",
    "probe/energy_kept": "low_rank: share of the direction's squared norm that the truncation keeps",
    "probe/step": "finite_difference: |displacement| of the parameters",
    "seconds/direction": "making the direction, in the actor",
    "seconds/scores": "scoring the candidates, in the actor",
    "seconds/selection": "the whole selection, data movement included",
    "seconds/share_of_step": "seconds/selection over the step's seconds",
}


def named(values: dict[str, float]) -> dict[str, float]:
    """Return the metrics under their full names."""
    return {PREFIX + name: float(value) for name, value in values.items()}
