# SPDX-License-Identifier: Apache-2.0
"""The names of the metrics, each with its unit and meaning. All appear as `gradalign/<name>` in verl's loggers."""

from __future__ import annotations

PREFIX = "gradalign/"

METRICS: dict[str, str] = {
    "candidates": "groups of the step: candidates of a selection, or the problems a schedule has put on it",
    "live": "of them, those with a non-zero advantage",
    "kept": "groups that the selection kept",
    "kept/<reason>": "the same by reason: top, filler, random, scheduled",
    "rejected": "candidate groups not kept",
    "rejected/<reason>": "the same by reason: low_score, dead, failed, non_finite, not_drawn",
    "score/mean, score/min, score/max": "of the scored candidates with a finite score",
    "score/kept_mean": "mean score of the kept ones",
    "success_rate/pool, success_rate/kept": "share of responses with a reward above success_threshold",
    "reliability/scores/spearman": "rank correlation of the candidates' scores on two halves of their groups",
    "reliability/scores": "the same for whole groups, by Spearman-Brown",
    "reliability/scores/problems": "candidates that it was measured on",
    "reliability/direction/cosine": "cosine between the gradients of two halves of the trusted responses",
    "reliability/direction": "the same for all of them, by Spearman-Brown",
    "reliability/fallback": "1 in a step that fell back to reliability.fallback, else 0",
    "direction/norm": "|v|, in units of the loss gradient; of several trusted sets, of the weighted unit directions",
    "direction/age": "steps since the direction in use was made",
    "direction/degenerate": "1 in a step whose trusted groups gave no direction, else 0",
    "direction/<set>/norm, direction/<set>/half_cosine": "of several trusted sets, each one's own",
    "direction/<set>/cosine": "cosine of a trusted set's direction with the combined one",
    "validation/groups, validation/live, validation/failed": "trusted groups rolled out, with an advantage, failed",
    "probe/oversized": "candidates larger than a micro-batch, scored one at a time with backward",
    "probe/canary/relative_error": "largest error of the rescored problems, as a share of their gradients' norms",
    "probe/fidelity/spearman": "rank correlation of an approximate estimator with exact dot products; of a sketch, "
    "estimated from two independent parts of it",
    "probe/energy_kept": "low_rank: share of the direction's squared norm that the truncation keeps",
    "probe/step": "finite_difference: |displacement| of the parameters",
    "seconds/direction": "making the direction of the trusted sets, in the actor",
    "seconds/scores": "scoring the candidates, in the actor",
    "seconds/selection": "the whole selection, data movement included",
    "seconds/share_of_step": "seconds/selection over the step's seconds",
}


def named(values: dict[str, float]) -> dict[str, float]:
    """Return the metrics under their full names."""
    return {PREFIX + name: float(value) for name, value in values.items()}
