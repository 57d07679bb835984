# SPDX-License-Identifier: Apache-2.0
"""The numbers of a report for machines.

print(json.dumps(summary_of(read_run(run))))
"""

from typing import Any

from verl_gradalign.files import without_nan
from verl_gradalign.report.findings import findings_of, headline_of
from verl_gradalign.report.run import RunData


def summary_of(run: RunData) -> dict[str, Any]:
    """Return the numbers of a run's page for machines; what is not known is None."""
    verdict, headline = headline_of(run)
    steps, metrics, suspects = run.steps, run.metrics, run.suspects
    values = {
        "name": run.name,
        "log": str(run.folder),
        "num_steps": len(steps.steps),
        "last_step": max(steps.steps, default=0),
        "num_rows": steps.num_rows,
        "verdict": verdict,
        "headline": headline,
        "findings": [
            {"topic": f.area, "verdict": f.level, "text": f.message, "remedy": f.remedy} for f in findings_of(run)
        ],
        "missing": run.missing,
        "accuracy": run.accuracy(),
        "reliability": {name: metrics.mean(f"gradalign/reliability/{name}") for name in ("scores", "direction")},
        "success_rate": {"pool": steps.mean("success_rate", False), "kept": steps.mean("success_rate", True)},
        "alignment": {"pool": steps.mean("alignment", False), "kept": steps.mean("alignment", True)},
        "share_of_step": metrics.mean("gradalign/seconds/share_of_step"),
        "reasons": {reason: int(count.sum()) for reason, count in run.reasons.counts(False).items()},
        "composition": {
            column: [{"value": value, "pool": pool, "kept": kept} for value, pool, kept in run.composition(column)]
            for column in run.columns
        },
        "suspicious": {
            "is_cosine": suspects.is_cosine,
            "num_measured": suspects.num_measured,
            "num_suspicious": len(suspects),
            "expected_by_chance": suspects.expected_by_chance,
            "typical": suspects.typical,
            "problems": suspects.table.to_pylist(),
        },
    }
    cleaned: dict[str, Any] = without_nan(values)
    return cleaned
