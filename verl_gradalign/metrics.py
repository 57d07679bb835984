# SPDX-License-Identifier: Apache-2.0
"""The catalogue of metrics: what the code may log, and what the documentation says of it.

All appear as `gradalign/<name>` in every logger of verl, and in the `metrics` table of the selection log. `named`
refuses a name that is not in the catalogue; recipes/how_to/metrics.md is made of it (`make docs`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

PREFIX = "gradalign/"


@dataclass(frozen=True)
class Metric:
    """One entry. `<...>` in the name stands for a word of the run's own: a reason, a trusted set, a column, a value."""

    name: str
    unit: str
    formula: str
    group: str


GROUPS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "Kept and rejected": (
        ("candidates", "problems", "groups of the step: a selection's candidates, or what a schedule has put on it"),
        ("live", "problems", "candidates with a non-zero advantage"),
        ("kept", "problems", "candidates that the selection kept"),
        ("kept_by/<reason>", "problems", "the same by reason: top, filler, random, scheduled, forecast, uniform"),
        ("rejected", "problems", "candidates - kept"),
        (
            "rejected_by/<reason>",
            "problems",
            "by reason: low_score, dead, failed, reward_not_finite, non_finite, not_drawn",
        ),
    ),
    "Scores": (
        ("score/mean", "score", "mean of the candidates with a finite score"),
        ("score/min", "score", "their lowest"),
        ("score/max", "score", "their highest"),
        ("score/kept_mean", "score", "mean of the kept ones"),
    ),
    "Candidates and kept problems": (
        ("success_rate/pool", "share", "mean over candidates of the share of responses above success_threshold"),
        ("success_rate/kept", "share", "the same of the kept ones"),
        ("response_length/pool", "tokens", "mean over candidates of their responses' mean length"),
        ("response_length/kept", "tokens", "the same of the kept ones"),
        ("composition/<column>/<value>/pool", "share", "candidates of that data_source, or value of extra_info"),
        ("composition/<column>/<value>/kept", "share", "the same of the kept ones"),
    ),
    "The direction": (
        ("direction/norm", "loss gradient", "|v|; of several trusted sets, of the weighted sum of unit directions"),
        ("direction/age", "steps", "step - step in which the direction in use was made"),
        ("direction/cosine_previous", "cosine", "<v, v of the refresh before>, both unit vectors; when refreshed"),
        ("direction/degenerate", "0 or 1", "1 in a step whose trusted groups gave no direction"),
        ("direction/<set>/norm", "loss gradient", "|v| of one of several trusted sets"),
        ("direction/<set>/half_cosine", "cosine", "between the gradients of two halves of its responses"),
        ("direction/<set>/cosine", "cosine", "of its direction with the combined one"),
        (
            "direction/accuracy",
            "share",
            "success rate of trusted problems at their latest kept rollout, audit left out",
        ),
        ("direction/audit_accuracy", "share", "the same of direction.audit, which enter neither v nor training"),
        ("direction/audit_gap", "share", "direction/accuracy - direction/audit_accuracy"),
        ("direction/kept_responses", "responses", "trusted responses that are kept for v"),
        ("direction/part_responses", "responses", "of them, those that v was made from in this step"),
        ("direction/dropped", "share", "of these, left out: effective sample of the tokens' ratios below half"),
        ("direction/effective_sample", "share", "mean over these of (sum w)^2 / (T sum w^2), w = pi now / pi then"),
        ("direction/ratio", "ratio", "mean over their tokens of min(w, 2)"),
        ("validation/groups", "problems", "trusted groups rolled out in this step"),
        ("validation/live", "problems", "of them, those with a non-zero advantage"),
        ("validation/failed", "problems", "of them, those without responses, or without finite rewards and advantages"),
    ),
    "Reliability": (
        ("reliability/scores_spearman", "correlation", "r of the candidates' ranks by two halves of their groups"),
        ("reliability/scores", "correlation", "2r / (1 + r): of whole groups (Spearman-Brown)"),
        ("reliability/scores_problems", "problems", "candidates that r was measured on"),
        ("reliability/direction_cosine", "cosine", "c between the gradients of two halves of the trusted responses"),
        ("reliability/direction", "correlation", "2c / (1 + c): of all trusted responses (Spearman-Brown)"),
        ("reliability/fallback", "0 or 1", "1 in a step that fell back to reliability.fallback"),
    ),
    "The forecast": (
        ("forecast/picks", "problems", "of the step, those chosen by forecast"),
        ("forecast/uniform", "problems", "of the step, those drawn uniformly"),
        ("forecast/floor", "share", "in use: of a batch to be drawn uniformly (forecast.floor, forecast.on_no_lift)"),
        ("forecast/mean", "score", "mean forecast of the step's forecast picks"),
        ("forecast/deviation", "score", "mean standard deviation of their forecasts"),
        ("forecast/lift", "ratio", "mean measured score of forecast picks over that of uniform ones, latest steps"),
        ("forecast/lift_low", "ratio", "its 90% interval (Fieller), where the uniform mean is clearly above zero"),
        ("forecast/lift_high", "ratio", "the same, upper end"),
        ("forecast/difference", "score", "mean measured score of forecast picks - that of uniform ones"),
        ("forecast/difference_low", "score", "its 90% interval; contains 0 exactly where the lift's contains 1"),
        ("forecast/difference_high", "score", "the same, upper end"),
        ("forecast/spearman", "correlation", "ranks of forecasts with those of later measurements, out of sample"),
        ("forecast/explained_features", "share", "of the variance of measurements, by features"),
        ("forecast/explained_problems", "share", "the same, by the problems' own parts"),
        ("forecast/tau", "score", "standard deviation of the problems' own parts, where scores are of the usual size"),
        ("forecast/size", "score", "root mean square of the measured scores, which the forecast counts in"),
        ("forecast/excess", "score", "the same of measurements, beyond their standard errors and forecasts"),
        ("forecast/common", "score", "the same of a step's error that all its measurements share"),
        ("forecast/known", "problems", "measured at least once so far"),
        ("forecast/resting", "problems", "that may not be picked yet (forecast.rest)"),
        ("forecast/starved", "sources", "hardly among the forecast picks, measured by their share of the pool"),
    ),
    "Measuring in the update": (
        ("update/sum_error", "share", "|sum of the rows' dots - <g, v>| / |g|: g the update's own gradient"),
        ("update/fidelity", "correlation", "ranks by the direction's factors with those by the whole direction"),
        ("update/energy_kept", "share", "of |v|^2, what the factors keep"),
    ),
    "The estimator": (
        ("probe/oversized", "problems", "larger than a micro-batch: scored in several, or by backward"),
        ("probe/oversized_norm_error", "share", "oversized=sketch: standard error of their norms, root mean square"),
        ("probe/canary/relative_error", "share", "largest |g - g exact| / |g exact| of the rescored problems"),
        ("probe/fidelity/spearman", "correlation", "an approximate estimator's ranks with those of exact dot products"),
        ("probe/energy_kept", "share", "low_rank: of |v|^2, what the truncation keeps"),
        ("probe/step", "parameters", "finite_difference: |displacement|"),
    ),
    "Cost": (
        ("seconds/rollout", "s", "sending problems to the rollout and waiting for their groups"),
        ("seconds/direction", "s", "making the direction of the trusted sets, in the actor"),
        ("seconds/scores", "s", "scoring the candidates, in the actor"),
        ("seconds/selection", "s", "the whole selection, data movement and logging included"),
        ("seconds/logging", "s", "selection log and pages; part of seconds/selection, but for what follows the update"),
        ("seconds/update", "s", "the actor's update"),
        ("seconds/share_of_step", "share", "seconds/selection over the step's seconds"),
        ("tokens/generated", "tokens", "responses of candidates and trusted problems"),
        ("tokens/trained", "tokens", "of them, those that are trained on"),
        ("tokens/trusted", "tokens", "of them, the trusted problems'"),
        ("responses/generated", "responses", "of candidates and trusted problems"),
        ("responses/trained", "responses", "of them, those that are trained on"),
        ("responses/trusted", "responses", "of them, the trusted problems'"),
        ("tokens/direction", "tokens", "of the passes that make the direction, prompts included"),
        ("tokens/scores", "tokens", "of the candidates measured, prompts included"),
        ("cost/trusted_share", "share", "responses/trusted / responses/trained: what the direction costs in rollouts"),
        ("cost/unused_rollouts", "share", "1 - tokens/trained / tokens/generated"),
        (
            "cost/share_of_step",
            "share",
            "(seconds/selection + cost/unused_rollouts x seconds/rollout) over the step's seconds",
        ),
    ),
}
CATALOGUE = tuple(Metric(*entry, group) for group, entries in GROUPS.items() for entry in entries)


@cache
def metric_of(name: str) -> Metric | None:
    """Return the catalogue's entry of a metric's name (without the prefix), None if it has none."""
    exact = {metric.name: metric for metric in CATALOGUE}
    if name in exact:
        return exact[name]
    for metric in CATALOGUE:
        pattern = "(.+)".join(map(re.escape, re.split(r"<\w+>", metric.name)))
        if "<" in metric.name and re.fullmatch(pattern, name, re.DOTALL):
            return metric
    return None


def named(values: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics under their full names. Raises KeyError for a name that is not in the catalogue."""
    for name in values:
        if metric_of(name) is None:
            raise KeyError(f"metric {name!r} is not in verl_gradalign.metrics.CATALOGUE")
    return {PREFIX + name: float(value) for name, value in values.items()}
