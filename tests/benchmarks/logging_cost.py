# SPDX-License-Identifier: Apache-2.0
"""What noting a step costs: the selection log, texts from TransferQueue, metrics, merging, and wandb's pages.

    python -m tests.benchmarks.logging_cost --candidates 512 --steps 250

Real parts: Ray, TransferQueue, Parquet, wandb offline. Prints a line of JSON: milliseconds per step (median, mean and
worst), of what follows a selection where pages are due, and the length of a step of which the mean is 1%.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("VERL_PLATFORM", "cpu")

import numpy as np
import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.utils.tracking import Tracking

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.rollouts import read_responses
from verl_gradalign.log.columns import StepSeconds
from verl_gradalign.log.run_log import RunNotes
from verl_gradalign.metrics import named
from verl_gradalign.probe.call import ScoringReply
from verl_gradalign.selection.candidates import tabulate
from verl_gradalign.selection.chooser import Choice
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.selection.select import select_top
from verl_gradalign.types import ProblemScores

NUM_RESPONSES, RESPONSE_TOKENS, VOCABULARY = 8, 1024, 150_000
OTHER_METRICS = 120
"""Metrics that verl itself logs."""


class Pool:
    """Problems with texts of a usual length."""

    def text(self, problem_id: int) -> tuple[str, str]:
        return f"problem {problem_id} " * 100, str(problem_id)

    def values(self, column: str) -> list[str]:
        return [f"source {i}" for i in range(4)] if column == "data_source" else [f"level {i}" for i in range(5)]

    def read_labels(self, columns: Sequence[str]) -> None:
        return None

    def label(self, column: str, problem_id: int) -> str:
        return f"level {problem_id % 5}"


def groups_of(num: int, rng: np.random.Generator) -> list[Group]:
    groups = []
    for i in range(num):
        keys = tuple(f"u{i}_{k}_0" for k in range(NUM_RESPONSES))
        rewards = tuple(rng.integers(0, 2, NUM_RESPONSES).astype(float).tolist())
        tokens = NUM_RESPONSES * RESPONSE_TOKENS
        groups.append(
            Group(
                Problem(f"u{i}", i, f"source {i % 4}"), keys, tokens, rewards, False, True, num_response_tokens=tokens
            )
        )
    return groups


def fill_queue(groups: list[Group]) -> None:
    keys = [key for group in groups for key in group.keys]
    rows = [torch.randint(0, VOCABULARY, (RESPONSE_TOKENS,)) for _ in keys]
    fields = TensorDict({"responses": torch.nested.as_nested_tensor(rows, layout=torch.jagged)}, len(keys))
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[{} for _ in keys])


def measure(num_candidates: int, num_steps: int) -> dict[str, float]:
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}, "log": {"columns": ["level"]}})
    rng = np.random.default_rng(0)
    groups = groups_of(num_candidates, rng)
    fill_queue(groups)
    read = partial(read_responses, "train")
    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    os.environ["WANDB_MODE"] = "offline"
    tracking = Tracking("benchmark", "logging", ["wandb"], config={})
    about = {"config": {"key": "value" * 5_000}}
    notes = RunNotes(config, folder / "log", about, Pool(), lambda ids: " ".join(map(str, ids.tolist())), True)
    every_s, pages_s = [], []
    for step in range(1, num_steps + 1):
        dots = torch.from_numpy(rng.normal(size=num_candidates))
        ones = torch.ones_like(dots)
        uids = tuple(group.problem.uid for group in groups)
        scores = ProblemScores(uids, dots, ones, ones.long(), None, 1.0)
        values = {"dot_P": dots, "norm_P": ones, "dot_error_P": ones, "score_P": dots}
        candidates = tabulate(groups, config.success_threshold).of_live(**values)
        choice = Choice(select_top(candidates, num_candidates // 4, "drop", (0, step)), candidates)
        started = time.perf_counter()
        own = notes.record(step, read, groups, choice, ScoringReply(scores, True, {}, 0.1, 0.1), {})
        recorded = time.perf_counter()
        metrics = {**named(own), **{f"timing_s/{i}": 1.0 for i in range(OTHER_METRICS)}}
        notes.end_step(step, metrics, StepSeconds(1.0, 1.0, 1.0, 1.0), tracking)
        if step % config.log.pages_interval == 0:
            pages_s.append(time.perf_counter() - recorded)
        every_s.append(time.perf_counter() - started)
        tracking.log(named(own), step)
    tracking.finish()
    mean_s = statistics.fmean(every_s)
    return {
        "candidates": num_candidates,
        "steps": num_steps,
        "median_ms": 1e3 * statistics.median(every_s),
        "mean_ms": 1e3 * mean_s,
        "worst_ms": 1e3 * max(every_s),
        "pages_median_ms": 1e3 * statistics.median(pages_s),
        "one_percent_of_a_step_of_s": 100 * mean_s,
        "log_bytes_per_row": sum(p.stat().st_size for p in (folder / "log").iterdir()) / num_candidates / num_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    ray.init(num_cpus=16, log_to_driver=False)  # logical: the queue asks for several
    tq.init()
    for num_candidates in arguments.candidates:
        print(json.dumps(measure(num_candidates, arguments.steps)), flush=True)
    tq.close()
    ray.shutdown()


if __name__ == "__main__":
    main()
