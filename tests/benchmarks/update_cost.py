# SPDX-License-Identifier: Apache-2.0
"""What measuring in the update costs: verl's own update with and without it, side by side, in one run.

    python -m tests.benchmarks.update_cost                       two CPU cores, verl's FSDP2 actor, 1 and 2 ranks
    python -m tests.benchmarks.update_cost --device cuda --sweeps gpu

Each repeat times the plain update and the measured ones once, in turn, the direction's replication included; a ratio is
taken within its repeat, and its median, least and largest are printed, one JSON line per case and method; also the
ratio of processor seconds of rank 0, which a busy machine disturbs less. Peak memory comes from an update that is not
timed, and counts what was there before but is looked at, such as the direction itself. Aims: 1.40 with the whole
direction, 1.15 with rank 16.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.benchmarks.cases import SWEEPS, Case
from tests.benchmarks.counting import peak_bytes
from tests.benchmarks.ranks import run_on_ranks
from verl_gradalign.bench.timing import side_by_side
from verl_gradalign.config import ProbeConfig

if not torch.cuda.is_available():
    # Before verl is imported, here and in the ranks that this program spawns: it has no platform otherwise.
    os.environ.setdefault("VERL_PLATFORM", "cpu")

METHODS: dict[str, tuple[str, int] | None] = {
    "update": None,
    "whole": ("ghost", 1),
    "rank 16": ("low_rank", 16),
    "rank 8": ("low_rank", 8),
}


class UpdateBench:
    """verl's engine, the rows of an update, and the direction along which they are measured."""

    def __init__(self, case: Case, root: Path, device: str) -> None:
        from tests.benchmarks.on_verl import VerlBench

        self._bench = VerlBench(case, root, device)
        self.num_parameters = self._bench.num_parameters

    def update(self, method: tuple[str, int] | None) -> None:
        """Take one training step on all candidates."""
        from verl.utils import tensordict_utils as tu

        from verl_gradalign.integration.engine import coefficient_loss
        from verl_gradalign.integration.update_measure import UpdateRequest, measured_update

        bench, case = self._bench, self._bench._case
        data = bench._update_rows.copy()
        settings = {"use_dynamic_bsz": True, "max_token_len_per_gpu": case.max_tokens}
        tu.assign_non_tensor(data, temperature=1.0, use_remove_padding=False, use_fused_kernels=False, **settings)
        tu.assign_non_tensor(data, mini_batch_size=len(data) * case.num_ranks)
        # verl's worker, as far as an update of one mini-batch asks for it.
        actor: Any = SimpleNamespace(engine=bench._verl, loss_fn=coefficient_loss)
        measured: Any = nullcontext()
        if method is not None:
            request = UpdateRequest(method[0], ProbeConfig(rank=method[1]))
            measured = measured_update(actor, bench._direction, data, request)
        with measured as found, bench._verl.train_mode():
            output = bench._verl.train_batch(data, lambda **given: actor.loss_fn(**given))
        if found is not None:
            metrics = {"metrics": {"grad_norm": [output["metrics"]["grad_norm"]]}}
            found.reply(tu.get_tensordict({}, metrics))


def run_case(case: Case, root: Path, device: str, repeats: int) -> list[dict[str, Any]]:
    """Return one record per method. Collective: every rank runs it."""
    bench = UpdateBench(case, root, device)
    methods: dict[str, Callable[[], None]] = {name: partial(bench.update, how) for name, how in METHODS.items()}
    timings = side_by_side(methods, repeats, torch.device(device))
    records = []
    for name, method in methods.items():
        ratios = timings[name].ratios(timings["update"])
        records.append(
            {
                **asdict(case),
                "device": device,
                "num_parameters": bench.num_parameters,
                "method": name,
                "seconds": round(timings[name].median, 4),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
                "processor_ratio": round(timings[name].processor_ratio(timings["update"]), 3),
                "peak_bytes": peak_bytes(method, device),
            }
        )
    return records


def records_of(case: Case, root: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    return run_case(case, root, arguments.device, arguments.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=["base", "width"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, shared by the ranks")
    parser.add_argument("--out", default="outputs/benchmarks")
    arguments = parser.parse_args()
    results = Path(arguments.out) / "update_cost.jsonl"
    run_on_ranks(arguments, records_of, results)


if __name__ == "__main__":
    main()
