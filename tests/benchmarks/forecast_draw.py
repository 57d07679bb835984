# SPDX-License-Identifier: Apache-2.0
"""What choosing problems by a forecast costs, and what its state weighs, by the size of the pool.

    python -m tests.benchmarks.forecast_draw --problems 10000000 --batch 128 --oversample 16

Features are made up. Prints a line of JSON for each pool: milliseconds to draw a shortlist, to forecast and cut it, and
to learn a step's measurements (medians); seconds and megabytes of the state after `--known` of the problems were
measured: early in a run few are, and at worst all.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.selection.features import Features
from verl_gradalign.selection.forecast import Forecaster
from verl_gradalign.selection.state_file import load_state, save_state
from verl_gradalign.types import Observations

Result = TypeVar("Result")


def timed(seconds: list[float], call: Callable[[], Result]) -> Result:
    started = time.perf_counter()
    result = call()
    seconds.append(time.perf_counter() - started)
    return result


def observations_of(ids: np.ndarray, rng: np.random.Generator) -> Observations:
    num = len(ids)
    return Observations(ids, rng.standard_normal(num), rng.uniform(0.5, 1.0, num), rng.uniform(100, 900, num))


def visit_all(forecaster: Forecaster, share: float, num_features: int, rng: np.random.Generator) -> None:
    """Note a measurement of this share of the pool, as long runs have them."""
    assert forecaster._score is not None
    known = np.sort(rng.choice(len(forecaster._ids), int(share * len(forecaster._ids)), replace=False))
    forecaster._score.own.learn(known, 1, rng.standard_normal(len(known)), np.ones(len(known)))
    forecaster._pool.note(known, 1)


def measure(num_problems: int, batch_size: int, oversample: float, num_features: int, steps: int, known: float) -> dict:
    config = GradAlignConfig.from_mapping({"score": "random", "schedule": "forecast", "oversample": oversample})
    rng = np.random.default_rng(0)
    ids = np.arange(num_problems, dtype=np.int64)
    forecaster = Forecaster(config, ids, batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in ("draw", "pick", "observe", "save", "load")}
    for step in range(100, 100 + steps):
        shortlist = timed(seconds["draw"], lambda step=step: forecaster.shortlist(step))
        features = Features(rng.standard_normal((len(shortlist), num_features)), np.full(num_features, 0.1))
        call = lambda step=step, s=shortlist, f=features: forecaster.pick(step, s, f, batch_size)  # noqa: E731
        picks = timed(seconds["pick"], call)
        measured = observations_of(picks.problem_id_P, rng)
        timed(seconds["observe"], lambda step=step, m=measured: forecaster.observe(step, m))
        if step == 100:
            visit_all(forecaster, known, num_features, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "forecast.npz"
        timed(seconds["save"], lambda: save_state(path, {}, forecaster.state()))
        other = Forecaster(config, ids, batch_size)
        timed(seconds["load"], lambda: other.restore(load_state(path)))
        size = path.stat().st_size
    return {
        "problems": num_problems,
        "shortlist": len(shortlist),
        "picks": batch_size,
        "features": num_features,
        "known": known,
        **{f"{name}_ms": round(1e3 * statistics.median(seconds[name]), 2) for name in ("draw", "pick", "observe")},
        **{f"{name}_s": round(seconds[name][0], 2) for name in ("save", "load")},
        "state_mb": round(size / 1e6, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--oversample", type=float, default=16)
    parser.add_argument("--features", type=int, default=65)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--known", type=float, nargs="+", default=[0.01, 1.0])
    arguments = parser.parse_args()
    for num_problems in arguments.problems:
        for known in arguments.known:
            of = (num_problems, arguments.batch, arguments.oversample, arguments.features, arguments.steps, known)
            print(json.dumps(measure(*of)), flush=True)


if __name__ == "__main__":
    main()
