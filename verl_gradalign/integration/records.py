# SPDX-License-Identifier: Apache-2.0
"""What is noted of a step's selection: the selection log's columns, and metrics. Pure functions.

Shape legend: P candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from verl_gradalign.integration.groups import Group
from verl_gradalign.integration.worker import ScoringReply
from verl_gradalign.probe.trusted import COMBINED, SetReport
from verl_gradalign.rank_correlation import spearman_brown
from verl_gradalign.selection.select import KEPT_REASONS, REASONS
from verl_gradalign.types import ProblemScores, Selection


def success_rates(groups: Sequence[Group], threshold: float) -> np.ndarray:
    """Return each group's success rate, nan where nothing was generated."""
    return np.array([g.success_rate(threshold) for g in groups], dtype=np.float64)


def spread(values: Any, positions: np.ndarray, num_candidates: int) -> np.ndarray:
    """Return the values of some candidates as a column of all of them, nan elsewhere."""
    column = np.full(num_candidates, np.nan)
    column[positions] = values
    return column


def log_columns(
    step: int,
    groups: Sequence[Group],
    selection: Selection,
    score_P: np.ndarray,
    success_rate_P: np.ndarray,
    scores: ProblemScores | None,
    live: np.ndarray,
) -> dict[str, Any]:
    """Return the selection log's columns of a step. `scores` are those of the candidates at the positions `live`."""
    norms = None if scores is None else scores.norm_P
    return {
        "step": np.full(len(groups), step),
        "problem_id": np.array([g.problem.problem_id for g in groups], dtype=np.int64),
        "data_source": [g.problem.data_source for g in groups],
        "score": score_P,
        "dot": spread([] if scores is None else scores.dot_P.numpy(), live if scores else live[:0], len(groups)),
        "norm": spread([] if norms is None else norms.numpy(), live if norms is not None else live[:0], len(groups)),
        "success_rate": success_rate_P,
        "num_responses": np.array([len(g.rewards) for g in groups], dtype=np.int64),
        "kept": selection.reason_P < len(KEPT_REASONS),
        "reason": np.array(REASONS, dtype=object)[selection.reason_P],
    }


def selection_metrics(groups: Sequence[Group], selection: Selection, success_rate_P: np.ndarray) -> dict[str, float]:
    """Return the metrics that every score has: counts by reason, and success rates."""
    counts = np.bincount(selection.reason_P, minlength=len(REASONS))
    return {
        "candidates": len(groups),
        "live": sum(g.is_live for g in groups),
        "kept": len(selection.kept),
        "rejected": len(groups) - len(selection.kept),
        **{
            f"{'kept' if reason in KEPT_REASONS else 'rejected'}/{reason}": float(count)
            for reason, count in zip(REASONS, counts, strict=True)
        },
        "success_rate/pool": _mean(success_rate_P),
        "success_rate/kept": _mean(success_rate_P[selection.kept]),
    }


def score_metrics(score_P: np.ndarray, selection: Selection) -> dict[str, float]:
    """Return the spread of the finite scores, if there are any."""
    finite = score_P[np.isfinite(score_P)]
    if not len(finite):
        return {}
    return {
        "score/mean": _mean(finite),
        "score/min": float(finite.min()),
        "score/max": float(finite.max()),
        "score/kept_mean": _mean(score_P[selection.kept]),
    }


def reply_metrics(reply: ScoringReply, has_several_sets: bool) -> dict[str, float]:
    """Return what the actor says of its scoring call; of each trusted set where there are several."""
    values = {"seconds/direction": reply.direction_s, "seconds/scores": reply.scores_s}
    if reply.scores is not None:
        values["direction/norm"] = reply.scores.direction_norm
        values |= {f"probe/{name}": value for name, value in reply.scores.diagnostics.items()}
    for name, report in reply.reports.items():
        if name == COMBINED or has_several_sets:
            values |= _set_metrics(name, report)
    return values


def trusted_metrics(trusted: Mapping[str, Sequence[Group]], is_degenerate: bool) -> dict[str, float]:
    """Return the counts of the trusted groups that were rolled out in this step."""
    groups = [g for members in trusted.values() for g in members]
    return {
        "validation/groups": len(groups),
        "validation/live": sum(g.is_live for g in groups),
        "validation/failed": sum(g.is_failed for g in groups),
        "direction/degenerate": float(is_degenerate),
    }


def _set_metrics(name: str, report: SetReport) -> dict[str, float]:
    if name == COMBINED:
        cosine = report.half_cosine
        return {"reliability/direction/cosine": cosine, "reliability/direction": spearman_brown(cosine)}
    return {
        f"direction/{name}/norm": report.norm,
        f"direction/{name}/half_cosine": report.half_cosine,
        f"direction/{name}/cosine": report.cosine,
    }


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is not nan, nan of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
