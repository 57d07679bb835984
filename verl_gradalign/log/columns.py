# SPDX-License-Identifier: Apache-2.0
"""What is noted of a step's selection: the selection log's columns, metrics, and what the problems are of.

Shape legend: P candidates.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verl_gradalign.metrics import PREFIX
from verl_gradalign.probe.call import ScoringReply
from verl_gradalign.probe.trusted import COMBINED
from verl_gradalign.rank_correlation import spearman_brown
from verl_gradalign.selection.candidates import Candidates
from verl_gradalign.selection.groups import Group, session_of
from verl_gradalign.selection.select import FORECAST, KEPT_REASONS, REASONS, UNIFORM
from verl_gradalign.types import Observations, Picks, Selection

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
        self._names: dict[str, list[str]] = {}
        for column, of_all in values.items():
            counts = Counter(value[:MAX_NAME_CHARS] for value in of_all)
            names = [name for name, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
            self._names[column] = names if len(names) <= MAX_VALUES else [*names[:MAX_VALUES], OTHER]

    def metrics(self, column: str, value_P: Sequence[str], is_kept_P: np.ndarray) -> dict[str, float]:
        """Return the shares of a column's values among the candidates and among the kept ones."""
        names = self._names[column]
        cut_P = np.array([value[:MAX_NAME_CHARS] for value in value_P], dtype=object)
        name_P = np.where(np.isin(cut_P, names), cut_P, OTHER)
        groups = {"pool": name_P, "kept": name_P[is_kept_P]}
        return {
            f"composition/{column}/{name}/{group}": float((name_G == name).mean()) if len(name_G) else 0.0
            for name in names
            for group, name_G in groups.items()
        }


def log_columns(
    step: int,
    c: Candidates,
    selection: Selection,
    picks: Picks | None = None,
    observations: Observations | None = None,
) -> dict[str, Any]:
    """Return the selection log's columns of a step.

    `picks` and `observations`: of schedule forecast, in any order; candidates that they do not hold are unknown there.
    """
    return {
        "step": np.full(len(c), step),
        "problem_id": c.problem_id_P,
        "data_source": c.data_source_P,
        "score": c.score_P,
        "dot": c.dot_P,
        "norm": c.norm_P,
        "dot_error": c.dot_error_P,
        "error_freedom": c.error_freedom_P,
        "success_rate": c.success_rate_P,
        "num_responses": c.num_responses_P,
        "response_tokens": c.response_tokens_P,
        "kept": selection.reason_P < len(KEPT_REASONS),
        "reason": np.array(REASONS, dtype=object)[selection.reason_P],
        **_pick_columns(c.problem_id_P, picks, observations),
    }


def _pick_columns(problem_id_P: np.ndarray, picks: Picks | None, observations: Observations | None) -> dict[str, Any]:
    """Return what was forecast and observed of the candidates."""

    def by_id(ids: np.ndarray, values: np.ndarray, otherwise: Any) -> np.ndarray:
        value_of = dict(zip(ids.tolist(), values.tolist(), strict=True))
        return np.array([value_of.get(problem_id, otherwise) for problem_id in problem_id_P.tolist()])

    unknown = np.full(len(problem_id_P), np.nan)
    columns: dict[str, Any] = dict.fromkeys(("forecast_mean", "forecast_deviation", "observed"), unknown)
    columns["pick"] = np.full(len(problem_id_P), "")
    if picks is not None:
        ids = picks.problem_id_P
        columns["forecast_mean"] = by_id(ids, picks.mean_P, np.nan)
        columns["forecast_deviation"] = by_id(ids, picks.deviation_P, np.nan)
        columns["pick"] = by_id(ids, np.where(picks.is_uniform_P, UNIFORM, FORECAST), "")
    if observations is not None:
        columns["observed"] = by_id(observations.problem_id_P, observations.value_P, np.nan)
    return columns


def selection_metrics(c: Candidates, selection: Selection) -> dict[str, float]:
    """Return the metrics that every score has: counts by reason, success rates, lengths; the spread of the scores."""
    kept, num, num_live = selection.kept, len(selection.kept), int(c.is_live_P.sum())
    values: dict[str, float] = {"candidates": len(c), "live": num_live, "kept": num, "rejected": len(c) - num}
    counts = np.bincount(selection.reason_P, minlength=len(REASONS))
    for reason, count in zip(REASONS, counts, strict=True):
        values[f"{'kept' if reason in KEPT_REASONS else 'rejected'}_by/{reason}"] = float(count)
    for name, value_P in {"success_rate": c.success_rate_P, "response_length": c.response_tokens_P}.items():
        values |= {f"{name}/pool": _mean(value_P), f"{name}/kept": _mean(value_P[kept])}
    finite = c.score_P[np.isfinite(c.score_P)]
    if len(finite):
        values |= {"score/mean": _mean(finite), "score/min": float(finite.min()), "score/max": float(finite.max())}
        values["score/kept_mean"] = _mean(c.score_P[kept])
    return values


def reply_metrics(reply: ScoringReply, has_several_sets: bool) -> dict[str, float]:
    """Return what the actor says of its scoring call; of each trusted set where there are several."""
    values = {"seconds/direction": reply.direction_s, "seconds/scores": reply.scores_s}
    if reply.scores is not None:
        values["direction/norm"] = reply.scores.direction_norm
        values |= {
            name if name.startswith("update/") else f"probe/{name}": value
            for name, value in reply.scores.diagnostics.items()
        }
    if not math.isnan(reply.cosine_previous):
        values["direction/cosine_previous"] = reply.cosine_previous
    for name, report in reply.reports.items():
        if name == COMBINED:
            cosine = report.half_cosine
            values |= {"reliability/direction_cosine": cosine, "reliability/direction": spearman_brown(cosine)}
        elif has_several_sets:
            values |= {f"direction/{name}/{key}": getattr(report, key) for key in ("norm", "half_cosine", "cosine")}
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
    """Return what was generated for the step, and what the actor read to measure it."""
    trusted_groups = [g for members in trusted.values() for g in members]
    num_trusted = sum(g.num_response_tokens for g in trusted_groups)
    is_measured = reply is not None and reply.scores is not None
    return {
        "tokens/generated": num_trusted + sum(g.num_response_tokens for g in groups),
        "tokens/trusted": num_trusted,
        "responses/generated": _num_responses(groups) + _num_responses(trusted_groups),
        "responses/trusted": _num_responses(trusted_groups),
        "tokens/direction": sum(g.num_tokens for g in trusted_groups if g.is_live and reply is not None),
        "tokens/scores": sum(g.num_tokens for g in groups if g.is_live and is_measured),
    }


def _num_responses(groups: Iterable[Group]) -> int:
    """Return the number of responses, whether they were graded or not: a session's outputs are one."""
    return sum(len({session_of(key) for key in group.keys}) for group in groups)


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
    values = {"seconds/rollout": seconds.rollout, "seconds/update": seconds.update}
    values["seconds/share_of_step"] = seconds.selection / seconds.step
    trusted, num_trained = (metrics.get(f"{PREFIX}responses/{name}") for name in ("trusted", "trained"))
    if trusted is not None and num_trained:
        values["cost/trusted_share"] = trusted / num_trained
    generated, trained = (metrics.get(f"{PREFIX}tokens/{name}") for name in ("generated", "trained"))
    if generated and trained is not None:
        unused = 1 - trained / generated
        values["cost/unused_rollouts"] = unused
        values["cost/share_of_step"] = (seconds.selection + unused * seconds.rollout) / seconds.step
    return values


def _mean(values: np.ndarray) -> float:
    """Return the mean of what is not nan, nan of nothing."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
