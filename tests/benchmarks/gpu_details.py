# SPDX-License-Identifier: Apache-2.0
"""Three questions about a GPU, each answered in JSON lines (it runs on a CPU too, with small shapes, as a check).

    python -m tests.benchmarks.gpu_details --device cuda

* How does a loop of matrix products compare with one grouped product, for problems of 1k to 16k tokens?
* What share of a scoring pass is spent gathering the direction?
* How faithful are finite differences by the size of their step?
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tests.benchmarks.cases import BASE, QWEN_05B
from verl_gradalign.bench.device import one_rank
from verl_gradalign.bench.gathers import gathers_of_direction
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.bench.timing import timed
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.audit import spearman

STEPS = (1e-4, 3e-4, 6e-4, 1e-3, 2.3e-3, 5e-3, 1.2e-2)
REPEATS = 7


def median_seconds(method: Callable[[], Any], device: str) -> float:
    method()
    return statistics.median(timed(method, torch.device(device)) for _ in range(REPEATS))


def compare_products(device: str, lengths: tuple[int, ...], width: int, num_problems: int) -> None:
    """Print the time of forming problems' gradients by a loop of products, and by one grouped product."""
    for length in lengths:
        delta_NO = torch.randn(num_problems * length, width, device=device, dtype=torch.bfloat16)
        input_NI = torch.randn(num_problems * length, width, device=device, dtype=torch.bfloat16)
        # The grouped product wants its last offset below the length, so the last position belongs to no problem.
        ends_P = torch.arange(1, num_problems + 1, device=device, dtype=torch.int32) * length
        ends_P[-1] -= 1

        def loop(delta_NO: torch.Tensor = delta_NO, input_NI: torch.Tensor = input_NI, length: int = length) -> None:
            for start in range(0, len(delta_NO), length):
                torch.mm(delta_NO[start : start + length].T, input_NI[start : start + length])

        def grouped(
            delta_NO: torch.Tensor = delta_NO, input_NI: torch.Tensor = input_NI, ends_P: torch.Tensor = ends_P
        ) -> None:
            torch.nn.functional.grouped_mm(delta_NO.T, input_NI, offs=ends_P)

        seconds = {"loop": median_seconds(loop, device), "grouped": median_seconds(grouped, device)}
        ratio = seconds["grouped"] / seconds["loop"]
        print(json.dumps({"question": "products", "tokens": length, "width": width, **seconds, "ratio": ratio}))


def sweep_steps(bench: PlainBench) -> None:
    """Print the rank correlation of finite differences with exact dot products, by relative step."""
    exact = bench.score("ghost")
    for step in STEPS:
        scores = bench.score("finite_difference", ProbeConfig(relative_step=step))
        print(json.dumps({"question": "steps", "step": step, "spearman": spearman(scores.dot_P, exact.dot_P)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().device
    on_gpu = device == "cuda"
    with one_rank(torch.device(device)):
        compare_products(device, (1024, 4096, 16384) if on_gpu else (64,), 896 if on_gpu else 64, 8)
        case = replace(QWEN_05B, num_problems=32, tokens_per_row=512) if on_gpu else replace(BASE, num_problems=16)
        bench = PlainBench(case, torch.device(device))
        print(json.dumps({"question": "gathers", **gathers_of_direction(bench, torch.device(device))}))
        sweep_steps(bench)


if __name__ == "__main__":
    main()
