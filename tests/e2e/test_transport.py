# SPDX-License-Identifier: Apache-2.0
"""Rows with images reach a worker through TransferQueue as the agent loop has put them there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.runs import REPOSITORY

pytestmark = pytest.mark.e2e

CODE = """
import json, os, verl
import ray, torch, transfer_queue as tq
from hydra import compose, initialize_config_module
from transfer_queue import KVBatchMeta
from verl.utils import tensordict_utils as tu
from verl.utils.transferqueue_utils import tqbridge
from tests.distributed.images import build_vision_model, make_rows
from verl_gradalign.integration.engine import COEFFICIENTS, VerlEngine
from verl_gradalign.probe.engine import TokenBudget

rows = [row for members in make_rows(build_vision_model("qwen3_vl")).values() for row in members]
keys = [f"a_{place}_0" for place in range(len(rows))]
ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
with initialize_config_module("verl.trainer.config", version_base=None):
    tq.init(compose("ppo_trainer").transfer_queue)
for key, row in zip(keys, rows, strict=True):  # as the agent loop: one by one, whichever is ready
    tq.kv_batch_put(keys=[key], partition_id="train", fields=tu.list_of_dict_to_tensordict([row]), tags=[{}])

@tqbridge()
def receive(data):
    engine = VerlEngine(None, data, 1.0, TokenBudget(100, True))
    again = engine._select(list(engine._rows), list(range(len(rows))), [1.0] * len(rows))
    differ = [
        (place, name)
        for place, row in enumerate(rows)
        for name in ("input_ids", "position_ids", COEFFICIENTS, "response_mask")
        if not torch.equal(again[name].unbind()[place], row[name])
    ]
    images = again.get("multi_modal_inputs").tolist()
    for place, row in enumerate(rows):
        wanted = row["multi_modal_inputs"]
        if set(images[place]) != set(wanted) or any(not torch.equal(images[place][n], wanted[n]) for n in wanted):
            differ.append((place, "multi_modal_inputs"))
    print("ANSWER:" + json.dumps({"differ": differ, "names": sorted(engine._rows)}), flush=True)

receive(KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id="train"))
tq.close()
"""


def test_images_and_their_positions_survive_the_transport() -> None:
    process = subprocess.run(
        [sys.executable, "-c", CODE], cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False
    )
    answers = [line for line in process.stdout.splitlines() if line.startswith("ANSWER:")]
    assert process.returncode == 0 and len(answers) == 1, process.stderr[-3000:]
    answer = json.loads(answers[0].removeprefix("ANSWER:"))
    assert answer["differ"] == [] and "multi_modal_inputs" in answer["names"] and "advantage" in answer["names"]
