# SPDX-License-Identifier: Apache-2.0
"""What is noted of a step's selection: one log row per candidate, and metrics. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from verl_gradalign.integration.groups import Group
from verl_gradalign.integration.worker import ScoringReply
from verl_gradalign.selection.select import KEPT_REASONS, REJECTED_REASONS
from verl_gradalign.types import Selection


def log_rows(
    step: int,
    groups: Sequence[Group],
    selection: Selection,
    reply: ScoringReply | None,
    scores: Mapping[str, float],
    success_threshold: float,
) -> list[dict[str, Any]]:
    """Return the selection log's rows of a step. Scores are by uid; what was not measured is None."""
    measured: dict[str, tuple[float, float | None]] = {}
    if reply is not None and reply.scores is not None:
        norms = reply.scores.norm_P
        dots = reply.scores.dot_P.tolist()
        norm_list = [None] * len(dots) if norms is None else norms.tolist()
        measured = dict(zip(reply.scores.uid, zip(dots, norm_list, strict=True), strict=True))
    rows: list[dict[str, Any]] = []
    for g in groups:
        dot, norm = measured.get(g.problem.uid, (None, None))
        rows.append(
            {
                "step": step,
                "problem_id": g.problem.problem_id,
                "data_source": g.problem.data_source,
                "score": scores.get(g.problem.uid),
                "dot": dot,
                "norm": norm,
                "success_rate": g.success_rate(success_threshold) if g.rewards else None,
                "num_responses": len(g.rewards),
                "kept": selection.reasons[g.problem.uid] in KEPT_REASONS,
                "reason": selection.reasons[g.problem.uid],
            }
        )
    return rows


def selection_metrics(groups: Sequence[Group], selection: Selection, success_threshold: float) -> dict[str, float]:
    """Return the metrics that every score has: counts by reason, and success rates."""
    counts = Counter(selection.reasons.values())
    kept = set(selection.kept)
    rates = {g.problem.uid: g.success_rate(success_threshold) for g in groups if g.rewards}
    return {
        "candidates": len(groups),
        "live": sum(g.is_live for g in groups),
        "kept": len(kept),
        "rejected": len(groups) - len(kept),
        **{f"kept/{reason}": counts[reason] for reason in KEPT_REASONS},
        **{f"rejected/{reason}": counts[reason] for reason in REJECTED_REASONS},
        "success_rate/pool": _mean(rates.values()),
        "success_rate/kept": _mean(rate for uid, rate in rates.items() if uid in kept),
    }


def alignment_metrics(
    trusted: Sequence[Group], selection: Selection, reply: ScoringReply | None, scores: Mapping[str, float]
) -> dict[str, float]:
    """Return the metrics of a score that needs a direction."""
    finite = {uid: score for uid, score in scores.items() if np.isfinite(score)}
    values: dict[str, float] = {
        "validation/groups": len(trusted),
        "validation/live": sum(g.is_live for g in trusted),
        "validation/failed": sum(g.is_failed for g in trusted),
        "direction/degenerate": bool(trusted) and not (reply is not None and reply.is_fresh),
    }
    if finite:
        values |= {
            "score/mean": _mean(finite.values()),
            "score/min": min(finite.values()),
            "score/max": max(finite.values()),
            "score/kept_mean": _mean(score for uid, score in finite.items() if uid in set(selection.kept)),
        }
    if reply is not None:
        values |= {"seconds/direction": reply.direction_s, "seconds/scores": reply.scores_s}
        if reply.scores is not None:
            values["direction/norm"] = reply.scores.direction_norm
            values |= {f"probe/{name}": value for name, value in reply.scores.diagnostics.items()}
    return values


def _mean(values: Iterable[float]) -> float:
    """Return the mean, NaN of nothing."""
    items = list(values)
    return float(np.mean(items)) if items else float("nan")
