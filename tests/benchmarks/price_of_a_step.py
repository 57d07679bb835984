# SPDX-License-Identifier: Apache-2.0
"""What a step of schedule forecast takes, beside a plain step of verl, on verl itself.

    verl-gradalign compare imbalance_mini --tune --policy outputs/policy --output outputs/price \
        --methods random,forecast --rates 8e-4 --seeds 1,2,3 --jobs 1
    python -m tests.benchmarks.price_of_a_step outputs/price

Reads the runs of such a comparison, which share their processes, and prints a line of JSON for each method: responses
generated per response trained on, seconds of a step as a ratio to `random`'s of the same seed (medians over steps, then
median and range over seeds), and what the step's parts take of it. Steps in which verl tests are left out, and so are
the first two, which compile and warm caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from verl_gradalign.experiments.metrics_file import metrics_by_step

WARM_UP = 2
PARTS = {
    "update": "timing_s/update_actor",
    "direction": "gradalign/seconds/direction",
    "selection": "gradalign/seconds/selection",
    "logging": "gradalign/seconds/logging",
    "rollout": "gradalign/seconds/rollout",
}


def steps_of(run: Path) -> list[Mapping[str, float]]:
    """Return the metrics of the steps that are compared."""
    steps = metrics_by_step(run / "metrics.jsonl")
    is_plain = {step: "timing_s/testing" not in m for step, m in steps.items()}
    return [m for step, m in sorted(steps.items()) if step > WARM_UP and is_plain[step] and "timing_s/step" in m]


def seconds_of(run: Path) -> dict[str, float]:
    """Return medians over a run's steps: of the whole step, and of its parts where they are measured."""
    steps = steps_of(run)
    names = {"step": "timing_s/step", **PARTS}
    known = {part: [m[name] for m in steps if name in m] for part, name in names.items()}
    return {part: statistics.median(values) for part, values in known.items() if values}


def responses_ratio(run: Path) -> float:
    """Return the responses generated in all steps, over those that were trained on."""
    steps = steps_of(run)
    generated, trained = (sum(m[f"gradalign/responses/{name}"] for m in steps) for name in ("generated", "trained"))
    return generated / trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the comparison")
    parser.add_argument("--baseline", default="random")
    arguments = parser.parse_args()
    runs = {path.parent for path in arguments.output.glob("runs/*/*/*/metrics.jsonl")}
    by_method: dict[str, dict[str, dict[str, float]]] = {}
    responses: dict[str, list[float]] = {}
    for run in sorted(runs):
        method, seed = run.relative_to(arguments.output / "runs").parts[0], run.name
        by_method.setdefault(method, {})[seed] = seconds_of(run)
        responses.setdefault(method, []).append(responses_ratio(run))
    plain = by_method[arguments.baseline]
    for method, by_seed in by_method.items():
        ratios = sorted(seconds["step"] / plain[seed]["step"] for seed, seconds in by_seed.items() if seed in plain)
        parts = {
            part: statistics.median(seconds[part] / seconds["step"] for seconds in by_seed.values() if part in seconds)
            for part in PARTS
            if any(part in seconds for seconds in by_seed.values())
        }
        line = {
            "method": method,
            "seeds": list(by_seed),
            "responses_generated_per_trained": round(statistics.mean(responses[method]), 4),
            "step_s": round(statistics.median(seconds["step"] for seconds in by_seed.values()), 3),
            "ratio": round(statistics.median(ratios), 3),
            "range": [round(ratios[0], 3), round(ratios[-1], 3)],
            "share_of_step": {part: round(share, 3) for part, share in parts.items()},
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
