# SPDX-License-Identifier: Apache-2.0
"""What is noted of a step's selection: the selection log's columns, metrics, and what the problems are of.

Shape legend: P candidates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_gradalign.metrics import PREFIX
from verl_gradalign.probe.call import ScoringReply
from verl_gradalign.probe.trusted import COMBINED, SetReport
from verl_gradalign.rank_correlation import spearman_brown
from verl_gradalign.selection.chooser import Choice
from verl_gradalign.selection.groups import Group, spread
from verl_gradalign.selection.select import KEPT_REASONS, REASONS
from verl_gradalign.types import ProblemScores, Selection

MAX_VALUES = 20
"""Values of a column that have metrics of their own, the most frequent. A logger with thousands is of no use."""

OTHER = "other"
"""Stands for all further values."""

MAX_NAME_CHARS = 60


class Composition:
    """Knows which values of a column are named: decided by the train files, so the same in every step and after resume.

    Args:
        values: of every problem of the train files, by column.
    """

    def __init__(self, values: Mapping[str, Iterable[str]]) -> None:
        self._names = {column: self._most_frequent(of_all) for column, of_all in values.items()}

    @staticmethod
    def _most_frequent(values: Iterable[str]) -> list[str]:
        counts = Counter(value[:MAX_NAME_CHARS] for value in values)
        names = sorted(counts, key=lambda name: (-counts[name], name))
        return names if len(names) <= MAX_VALUES else [*names[:MAX_VALUES], OTHER]

    def metrics(self, column: str, value_P: Sequence[str], is_kept_P: np.ndarray) -> dict[str, float]:
        """Return the shares of a column's values among the candidates and among the kept ones."""
        names = self._names[column]
        known = set(names)
        cut = [value[:MAX_NAME_CHARS] for value in value_P]
        name_P = np.array([name if name in known else OTHER for name in cut], dtype=object)
        shares = {}
        for name in names:
            is_name_P = name_P == name
            for group, members_P in (("pool", is_name_P), ("kept", is_name_P[is_kept_P])):
                shares[f"composition/{column}/{name}/{group}"] = float(members_P.mean()) if len(members_P) else 0.0
        return shares


def success_rates(groups: Sequence[Group], threshold: float) -> np.ndarray:
    """Return each group's success rate, nan where nothing was generated."""
    return np.array([g.success_rate(threshold) for g in groups], dtype=np.float64)


def log_columns(
    step: int, groups: Sequence[Group], choice: Choice, success_rate_P: np.ndarray, scores: ProblemScores | None
) -> dict[str, Any]:
    """Return the selection log's columns of a step. `scores` are those of the live groups."""
    live = np.flatnonzero([g.is_live for g in groups])
    norm_P = None if scores is None else scores.norm_P
    unknown_P = np.full(len(groups), np.nan)
    return {
        "step": np.full(len(groups), step),
        "problem_id": np.array([g.problem.problem_id for g in groups], dtype=np.int64),
        "data_source": [g.problem.data_source for g in groups],
        "score": choice.score_P,
        "dot": unknown_P if scores is None else spread(scores.dot_P.numpy(), live, len(groups)),
        "norm": unknown_P if norm_P is None else spread(norm_P.numpy(), live, len(groups)),
        "dot_error": unknown_P if choice.dot_error_P is None else choice.dot_error_P,
        "error_freedom": unknown_P if choice.error_freedom_P is None else choice.error_freedom_P,
        "success_rate": success_rate_P,
        "num_responses": np.array([len(g.rewards) for g in groups], dtype=np.int64),
        "response_tokens": mean_lengths(groups),
        "kept": choice.selection.reason_P < len(KEPT_REASONS),
        "reason": np.array(REASONS, dtype=object)[choice.selection.reason_P],
    }


def mean_lengths(groups: Sequence[Group]) -> np.ndarray:
    """Return the mean tokens of each group's responses, nan where nothing was generated."""
    return np.array([g.num_response_tokens / len(g.rewards) if g.rewards else np.nan for g in groups])


def selection_metrics(groups: Sequence[Group], selection: Selection, success_rate_P: np.ndarray) -> dict[str, float]:
    """Return the metrics that every score has: counts by reason, success rates, lengths."""
    counts = np.bincount(selection.reason_P, minlength=len(REASONS))
    lengths_P = mean_lengths(groups)
    return {
        "candidates": len(groups),
        "live": sum(g.is_live for g in groups),
        "kept": len(selection.kept),
        "rejected": len(groups) - len(selection.kept),
        **{
            f"{'kept' if reason in KEPT_REASONS else 'rejected'}_by/{reason}": float(count)
            for reason, count in zip(REASONS, counts, strict=True)
        },
        "success_rate/pool": _mean(success_rate_P),
        "success_rate/kept": _mean(success_rate_P[selection.kept]),
        "response_length/pool": _mean(lengths_P),
        "response_length/kept": _mean(lengths_P[selection.kept]),
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
    if not math.isnan(reply.cosine_previous):
        values["direction/cosine_previous"] = reply.cosine_previous
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


def token_metrics(
    groups: Sequence[Group], trusted: Mapping[str, Sequence[Group]], reply: ScoringReply | None
) -> dict[str, float]:
    """Return what was generated for the step, and what the actor read to measure it, in tokens."""
    trusted_groups = [g for members in trusted.values() for g in members]
    num_trusted = sum(g.num_response_tokens for g in trusted_groups)
    is_measured = reply is not None and reply.scores is not None
    return {
        "tokens/generated": num_trusted + sum(g.num_response_tokens for g in groups),
        "tokens/trusted": num_trusted,
        "tokens/direction": sum(g.num_tokens for g in trusted_groups if g.is_live and reply is not None),
        "tokens/scores": sum(g.num_tokens for g in groups if g.is_live and is_measured),
    }


@dataclass(frozen=True)
class StepSeconds:
    """What a step's time went to, in seconds."""

    step: float
    """All of it."""
    rollout: float
    """Sending problems to the rollout, and waiting for their groups."""
    selection: float
    update: float


def cost_metrics(metrics: Mapping[str, float], seconds: StepSeconds) -> dict[str, float]:
    """Return what selection costs of a step, rollouts that are not trained on included.

    `metrics` are those of the step's selection, under their full names.
    """
    values = {
        "seconds/rollout": seconds.rollout,
        "seconds/update": seconds.update,
        "seconds/share_of_step": seconds.selection / seconds.step,
    }
    generated, trained = (metrics.get(f"{PREFIX}tokens/{name}") for name in ("generated", "trained"))
    if generated and trained is not None:
        unused = 1 - trained / generated
        values["cost/unused_rollouts"] = unused
        values["cost/share_of_step"] = (seconds.selection + unused * seconds.rollout) / seconds.step
    return values


def _set_metrics(name: str, report: SetReport) -> dict[str, float]:
    if name == COMBINED:
        cosine = report.half_cosine
        return {"reliability/direction_cosine": cosine, "reliability/direction": spearman_brown(cosine)}
    return {
        f"direction/{name}/norm": report.norm,
        f"direction/{name}/half_cosine": report.half_cosine,
        f"direction/{name}/cosine": report.cosine,
    }


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is not nan, nan of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
