# SPDX-License-Identifier: Apache-2.0
"""The numbers of a report for machines.

print(json.dumps(summary_of(read_run(run))))
"""

from __future__ import annotations

from typing import Any

from verl_gradalign.files import without_nan
from verl_gradalign.report.findings import findings_of, headline_of
from verl_gradalign.report.rules_outcome import accuracy_of, composition_shift
from verl_gradalign.report.run import RunData

__all__ = ["summary_of"]


def summary_of(run: RunData, top: int | None = None) -> dict[str, Any]:
    """Return the numbers of a run's page for machines; what is not known is None."""
    verdict, headline = headline_of(run)
    suspects = run.suspects
    values = {
        "name": run.name,
        "log": str(run.folder),
        "num_steps": len(run.steps.steps),
        "last_step": run.last_step,
        "num_rows": run.steps.num_rows,
        "verdict": verdict,
        "headline": headline,
        "findings": [
            {"topic": f.area, "verdict": f.level, "text": f.message, "remedy": f.remedy} for f in findings_of(run)
        ],
        "missing": run.missing,
        "accuracy": [
            dict(zip(("data_source", "before", "after", "first_step", "last_step"), result, strict=True))
            for result in accuracy_of(run)
        ],
        "reliability": {name: run.metrics.mean(f"gradalign/reliability/{name}") for name in ("scores", "direction")},
        "success_rate": {"pool": run.steps.mean("success_rate", False), "kept": run.steps.mean("success_rate", True)},
        "alignment": {"pool": run.steps.mean("alignment", False), "kept": run.steps.mean("alignment", True)},
        "share_of_step": run.metrics.mean("gradalign/seconds/share_of_step"),
        "reasons": {reason: int(count.sum()) for reason, count in run.reasons.counts(False).items()},
        "composition": {
            column: [{"value": v, "pool": pool, "kept": kept} for v, pool, kept in composition_shift(run, column)]
            for column in run.columns
        },
        "suspicious": {
            "is_cosine": suspects.is_cosine,
            "num_measured": suspects.num_measured,
            "num_suspicious": len(suspects),
            "expected_by_chance": suspects.expected_by_chance,
            "typical": suspects.typical,
            "problems": [_suspect_numbers(run, place) for place in range(len(suspects))[:top]],
        },
    }
    cleaned: dict[str, Any] = without_nan(values)
    return cleaned


def _suspect_numbers(run: RunData, place: int) -> dict[str, Any]:
    s = run.suspects
    return {
        "problem_id": int(s.problem_id_S[place]),
        "kind": s.kind(place),
        "data_source": run.sources[s.source_S[place]] if run.sources else None,
        "alignment": float(s.mean_S[place]),
        "standard_error": float(s.error_S[place]),
        "low": float(s.low_S[place]),
        "high": float(s.high_S[place]),
        "distance": float(s.distance_S[place]),
        "num_measured": int(s.num_measured_S[place]),
        "num_negative": int(s.num_negative_S[place]),
        "success_rate": float(s.success_rate_S[place]),
        "num_kept": int(s.num_kept_S[place]),
    }
