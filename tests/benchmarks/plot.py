# SPDX-License-Identifier: Apache-2.0
"""The plot of a benchmark's results: the ratio to the update, over what each sweep varies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

from tests.benchmarks.cases import X_AXES

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_ratios(results: Path, target: Path) -> None:
    """Write a figure with one panel for each sweep in the file of JSON lines."""
    records: list[dict[str, Any]] = [json.loads(line) for line in results.read_text().splitlines()]
    sweeps = [sweep for sweep in X_AXES if any(record["sweep"] == sweep for record in records)]
    if not sweeps:
        return
    figure, axes = plt.subplots(1, len(sweeps), figsize=(4 * len(sweeps), 3.5), sharey=True, squeeze=False)
    for axis, sweep in zip(axes[0], sweeps, strict=True):
        key, label = X_AXES[sweep]
        for method in dict.fromkeys(record["method"] for record in records):
            mine = [r for r in records if r["sweep"] == sweep and r["method"] == method and method != "update"]
            if not mine:
                continue
            ratio = [record["ratio"] for record in mine]
            spread = [
                [r["ratio"] - r["ratio_range"][0] for r in mine],
                [r["ratio_range"][1] - r["ratio"] for r in mine],
            ]
            axis.errorbar([record[key] for record in mine], ratio, yerr=spread, marker="o", label=method)
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label)
    axes[0][0].set_ylabel("time / update's time")
    axes[0][0].set_ylim(bottom=0)
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
