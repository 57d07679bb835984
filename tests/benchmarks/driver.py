# SPDX-License-Identifier: Apache-2.0
"""What reading a step's finished groups costs on the driver: rewards, hashes, advantages, coefficients.

    python -m tests.benchmarks.driver --groups 5120 --n 16 --tokens 1000

Rows are made up and lie in a real TransferQueue, whose stores are processes of their own. Prints a line of JSON: of
fetching the rows alone (`fetch`), of reading them all at the selection (`read`), of reading all but the last `--late`
groups while those are generated (`ahead`), and of reading these at the selection (`last`): seconds (`_s`), processor
seconds of the driver (`_own_s`) and of the queue's processes (`_queue_s`), which have cores of their own on a real
head node, and by how many megabytes the driver's memory grew at most (`_mb`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration.read_ahead import ReadAhead
from verl_gradalign.integration.reading import read_groups
from verl_gradalign.selection.groups import Problem

PARTITION, PROMPT, PUT_GROUPS = "train", 100, 64
MB = 2**20
PAGE = resource.getpagesize()


def put_rows(num_groups: int, n: int, num_tokens: int) -> KVBatchMeta:
    """Store groups whose answers are random, half of them right, as the agent loop does: rows of different lengths."""
    rng = np.random.default_rng(0)
    keys, tags = [], []
    for start in range(0, num_groups, PUT_GROUPS):
        count = n * min(PUT_GROUPS, num_groups - start)
        of_part = [f"p{start + row // n}_{row % n}_0" for row in range(count)]
        lengths = rng.integers(num_tokens // 2, num_tokens * 3 // 2 + 1, count)
        ids = [torch.from_numpy(rng.integers(0, 150_000, PROMPT + length)) for length in lengths]
        rewards = [torch.zeros(int(length)) for length in lengths]
        for reward in rewards:
            reward[-1] = float(rng.random() < 0.5)
        columns = {
            "input_ids": ids,
            "response_mask": [torch.ones(int(length), dtype=torch.int64) for length in lengths],
            "rm_scores": rewards,
        }
        nested = {name: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for name, rows in columns.items()}
        of_rows = [{"seq_len": PROMPT + int(length), "response_len": int(length)} for length in lengths]
        tq.kv_batch_put(keys=of_part, partition_id=PARTITION, fields=TensorDict(nested, batch_size=count), tags=of_rows)
        keys += of_part
        tags += of_rows
    return KVBatchMeta(keys=keys, tags=tags, partition_id=PARTITION)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def queue_seconds() -> float:
    """Return the processor seconds of all processes below this one: Ray's, and the queue's among them."""
    parent_of, ticks_of = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # a process that has ended meanwhile
            fields = stat.read_text().rsplit(")", 1)[1].split()
            parent_of[int(stat.parent.name)] = int(fields[1])
            ticks_of[int(stat.parent.name)] = int(fields[11]) + int(fields[12])

    def is_below(pid: int) -> bool:
        above = parent_of.get(pid)
        return above is not None and (above == os.getpid() or is_below(above))

    return sum(ticks for pid, ticks in ticks_of.items() if is_below(pid)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def watched(found: dict[str, float], name: str) -> Iterator[None]:
    """Note the seconds that a block takes, whose they are, and by how many megabytes this process grows at most."""
    before, peak, is_over = resident(), [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    of_queue, own, started = queue_seconds(), time.process_time(), time.perf_counter()
    yield
    found[f"{name}_s"] = round(time.perf_counter() - started, 2)
    found[f"{name}_own_s"] = round(time.process_time() - own, 2)
    found[f"{name}_queue_s"] = round(queue_seconds() - of_queue, 2)
    is_over.set()
    watcher.join()
    found[f"{name}_mb"] = round((peak[0] - before) / MB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=5120)
    parser.add_argument("--n", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--late", type=int, default=64, help="groups that are finished last")
    parser.add_argument("--estimator", default="grpo")
    args = parser.parse_args()
    torch.set_num_threads(1)
    overrides = [f"algorithm.adv_estimator={args.estimator}", f"actor_rollout_ref.rollout.n={args.n}"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        verl_config = compose("ppo_trainer", overrides=overrides)
    verl_config.transfer_queue.backend.SimpleStorage.total_storage_size = None
    ray.init(num_cpus=16)  # each store wants one, however few there are
    tq.init(verl_config.transfer_queue)
    batch = put_rows(args.groups, args.n, args.tokens)
    problems = [Problem(f"p{i}", i, "tasks") for i in range(args.groups)]
    found: dict[str, float] = {"groups": args.groups, "n": args.n, "tokens": args.tokens}
    with watched(found, "fetch"):
        fields = ["rm_scores", "response_mask", "input_ids"]
        for start in range(0, len(batch.keys), 256 * args.n):
            part = batch.keys[start : start + 256 * args.n]
            tq.kv_batch_get(keys=part, partition_id=PARTITION, select_fields=fields)
    config = GradAlignConfig.from_mapping({"validation": {"files": ["trusted"]}})
    with watched(found, "read"):
        groups = read_groups(problems, batch, set(), config, verl_config)
    ahead, late = ReadAhead(config, verl_config), problems[-args.late :]
    tags = dict(zip(batch.keys, batch.tags, strict=True))
    with watched(found, "ahead"):
        ahead.read(problems[: -args.late], tags, is_scored=True, seconds=math.inf)
    with watched(found, "last"):
        known = ahead.take([problem.uid for problem in problems], is_scored=True)
        again = read_groups(problems, batch, set(), config, verl_config, ahead=known)
    assert again == groups and len(known) == args.groups - len(late)
    found["live"] = sum(group.is_live for group in groups)
    print(json.dumps(found))
    tq.close()


if __name__ == "__main__":
    main()
