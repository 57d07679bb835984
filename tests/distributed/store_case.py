# SPDX-License-Identifier: Apache-2.0
"""What tests/distributed/test_trusted_store.py runs: kept responses in a real TransferQueue, read by verl's engine.

    python -m tests.distributed.store_case FOLDER

Writes FOLDER/results.json. The worker's own method runs, on one rank; log-probs are stored by verl's own function.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
import torch.distributed as dist
import transfer_queue as tq
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.utils import tensordict_utils as tu
from verl.utils.transferqueue_utils import tqbridge

from tests.distributed.engines import build_engine, train
from tests.distributed.images import build_vision_model, make_rows
from tests.distributed.setups import Setup
from tests.numerics.problems import TEMPERATURE, VOCABULARY, build_model
from verl_gradalign.config import GradAlignConfig
from verl_gradalign.integration import trusted_rows
from verl_gradalign.integration.engine import STORED_LOG_PROBS, VerlEngine, scoring_mode
from verl_gradalign.integration.rollouts import on_all_ranks, read_step
from verl_gradalign.integration.trusted_rows import PARTITION, copy_rows, load_rows, save_rows
from verl_gradalign.integration.trusted_store import TrustedStore
from verl_gradalign.integration.worker import GradAlignWorker
from verl_gradalign.probe.call import make_direction
from verl_gradalign.probe.direction import Direction
from verl_gradalign.selection.groups import Group, Problem
from verl_gradalign.selection.state_file import load_state, save_state

N, NUM_PROBLEMS, BATCH_SIZE, NUM_RANKS = 4, 6, 6, 3
DEAD, FAILED = 1, 2
"""Problems that are always answered right, and whose groups fail."""
OWN = {
    "score": "dot",
    "validation": {"files": ["trusted"]},
    "direction": {"rolling": True, "refresh_interval": 2, "replay": 2, "train_on_trusted": True, "audit": 0.2},
}
OVERRIDES = [
    f"data.train_batch_size={BATCH_SIZE}",
    f"actor_rollout_ref.rollout.n={N}",
    f"actor_rollout_ref.rollout.temperature={TEMPERATURE}",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "algorithm.adv_estimator=grpo",
]


class Run:
    """One process's side of a run: an engine, and what the trainer does with trusted problems."""

    def __init__(self, root: Path) -> None:
        with initialize_config_module("verl.trainer.config", version_base=None):
            self.verl_config = compose("ppo_trainer", overrides=OVERRIDES)
        tq.init(self.verl_config.transfer_queue)
        self.config = GradAlignConfig.from_mapping(OWN)
        build_model(root / "qwen2", "qwen2", tie_word_embeddings=True)
        self.engine = build_engine(root, Setup("fsdp2", "qwen2", dtype="fp32"))
        self.worker: Any = object.__new__(GradAlignWorker)
        self.worker.actor = SimpleNamespace(engine=self.engine)
        self.store = self.new_store()
        self.sizes: list[int] = []

    def new_store(self) -> TrustedStore:
        return TrustedStore(self.config, self.verl_config, {"trusted": range(NUM_PROBLEMS)})

    def roll_out(self, step: int) -> tuple[dict[str, list[Group]], KVBatchMeta]:
        """Roll out what is due, in verl's partition, and return the groups and their rows."""
        problems = [Problem(f"p{i}s{step}", i, "tasks", "trusted") for i in self.store.due(step)["trusted"]]
        keys = [f"{p.uid}_{k}_0" for p in problems for k in range(N)]
        rows = [_row(step, p.problem_id, k) for p in problems for k in range(N)]
        sizes = [{"seq_len": len(row["input_ids"]), "response_len": len(row["responses"])} for row in rows]
        for key, row, tag in zip(keys, rows, sizes, strict=True):  # as the agent loop: one by one
            tq.kv_batch_put(keys=[key], partition_id="train", fields=tu.list_of_dict_to_tensordict([row]), tags=[tag])
        batch = KVBatchMeta(keys=keys, tags=sizes, partition_id="train")
        failed = {p.uid for p in problems if p.problem_id == FAILED}
        _, trusted = read_step(problems, batch, failed, self.config, self.verl_config)
        return trusted, batch

    def add_log_probs(self, batch: KVBatchMeta) -> None:
        """As the trainer: verl's own function, on rows filled up to a multiple of the ranks."""
        workers = SimpleNamespace(
            compute_log_prob=tqbridge()(self.compute_log_prob), _query_dispatch_info=lambda _: range(NUM_RANKS)
        )
        trainer: Any = SimpleNamespace(config=self.verl_config, actor_rollout_wg=workers)
        on_all_ranks(
            batch, lambda *args, **kwargs: PPOTrainer._compute_old_log_prob(trainer, *args, **kwargs), workers, 0
        )

    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        self.sizes.append(len(data))
        settings = {"use_remove_padding": False, "use_fused_kernels": False, "use_dynamic_bsz": True}
        tu.assign_non_tensor(data, **settings, max_token_len_per_gpu=256)
        with self.engine.eval_mode():
            output = self.engine.infer_batch(data)
        return TensorDict(output["model_output"], batch_size=len(data))

    def step(self, step: int) -> tuple[dict[str, list[Group]], KVBatchMeta]:
        trusted, batch = self.roll_out(step)
        self.store.keep(trusted, batch, step, self.add_log_probs)
        return trusted, batch

    def direction(self, store: TrustedStore, step: int) -> tuple[Direction, dict[str, Any]]:
        """Have the worker make a step's direction of what a store keeps."""
        self.worker._direction = None
        part = store.draw(step)
        metas, requests = store.requests(part, [0])
        reply = GradAlignWorker.gradalign_make_direction(self.worker, metas[0], requests[0])
        reports = {name: asdict(report) for name, report in reply.reports.items()}
        found = {"shares": dict(reply.shares), "reports": reports, "metrics": store.metrics(part)}
        return self.worker._direction, found | {"is_fresh": reply.is_fresh}

    def unweighed(self, store: TrustedStore, step: int) -> Direction:
        """Return the direction of the same rows without ratios, as a step makes it of fresh responses."""
        metas, requests = store.requests(store.draw(step), [0])

        @tqbridge()
        def make(rows: TensorDict) -> list[Direction | None]:
            with scoring_mode(self.engine):
                engine = VerlEngine(self.engine, rows, TEMPERATURE, requests[0].budget, requests[0].coefficients)
                return [make_direction(engine, requests[0], None)[1]]

        (direction,) = make(metas[0])
        assert direction is not None
        return direction


def _row(step: int, problem_id: int, k: int) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(1000 * step + 10 * problem_id + k)
    prompt = torch.arange(1, 4 + problem_id % 3)
    response = torch.randint(1, VOCABULARY, (3 + int(torch.randint(5, (1,), generator=draws)),), generator=draws)
    mask, rewards = torch.ones_like(response), torch.zeros(len(response))
    rewards[-1] = float(k < 2 or problem_id == DEAD)
    ids = torch.cat([prompt, response])
    return {
        "prompts": prompt,
        "responses": response,
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": ids,
        "position_ids": torch.arange(len(ids)),
        "rm_scores": rewards,
        "rollout_log_probs": torch.full((len(response),), -1.0),
        "raw_prompt": [{"role": "user", "content": "what is it?"}],
        "uid": f"p{problem_id}s{step}",
    }


def _keys(partition: str) -> list[str]:
    return sorted((tq.kv_list(partition) or {}).get(partition, {}))


def _flat(direction: Direction) -> torch.Tensor:
    return torch.cat([shard.flatten() for shard in direction.shards if shard is not None])


def measure(root: Path) -> dict[str, Any]:
    run = Run(root)
    run.step(1)
    trusted, _ = run.step(2)
    found: dict[str, Any] = {"after_a_turn": _keys(PARTITION), "padded_sizes": list(run.sizes)}
    found["trainable"] = [group.problem.problem_id for group in run.store.trainable(trusted)]
    same, found["same_policy"] = run.direction(run.store, 2)
    found["error_same_policy"] = (_flat(same) - _flat(run.unweighed(run.store, 2))).norm().item()
    for step in range(3, 9):
        train(run.engine, step)
        run.step(step)
    found["after_turns"], found["in_train"] = _keys(PARTITION), len(_keys("train"))
    parts = [run.direction(run.store, step) for step in range(9, 15)]
    found["num_distinct"] = len({str(_flat(direction).tolist()) for direction, _ in parts})
    found["moved_policy"] = [of_step for _, of_step in parts]
    found["change_by_ratios"] = (_flat(parts[0][0]) - _flat(run.unweighed(run.store, 9))).norm().item()

    rows_file, state_file = root / "actor" / "gradalign_trusted.pt", root / "gradalign.npz"
    run.store.save_rows(rows_file)
    save_state(state_file, {}, {"trusted": run.store.state()})
    found["bytes_per_token"] = _bytes_per_token(rows_file)
    trusted_rows.clear_rows(_keys(PARTITION)[1:])
    resumed = run.new_store()
    resumed.restore(load_state(state_file)["trusted"], rows_file)
    again = [run.direction(resumed, step) for step in range(9, 15)]
    found["is_resumed"] = [
        torch.equal(_flat(a), _flat(b)) and found_a == found_b
        for (a, found_a), (b, found_b) in zip(parts, again, strict=True)
    ]
    found["after_resuming"] = _keys(PARTITION)
    found["refusals"] = _refusals(resumed, load_state(state_file)["trusted"], rows_file)
    found["not_finite"] = _with_nan(run)
    found["images_differ"] = _differences_of_images(root)
    tq.close()
    return found


def _with_nan(run: Run) -> dict[str, Any]:
    """Return what a store keeps of a step in which one response's log-probs are not finite."""
    store, (trusted, batch) = run.new_store(), run.roll_out(9)
    spoilt = ""

    def add_log_probs(copies: KVBatchMeta) -> None:
        nonlocal spoilt
        run.add_log_probs(copies)
        spoilt, length = copies.keys[0], copies.tags[0]["response_len"]
        column = torch.nested.as_nested_tensor([torch.full((length,), torch.nan)], layout=torch.jagged)
        tq.kv_batch_put(keys=[spoilt], partition_id=PARTITION, fields=TensorDict({STORED_LOG_PROBS: column}, 1))

    store.keep(trusted, batch, 9, add_log_probs)
    of_group = [key for key in _keys(PARTITION) if key.split("_")[0] == spoilt.split("_")[0]]
    drawn = [key for members in store.draw(9).values() for kept in members for key in kept.group.keys]
    return {"rows_left": of_group, "is_drawn": spoilt in drawn}


def _bytes_per_token(path: Path) -> float:
    rows = torch.load(path, weights_only=True)["rows"].values()
    return sum(v.nbytes for row in rows for v in row.values()) / sum(len(row["input_ids"]) for row in rows)


def _refusals(store: TrustedStore, state: list[dict[str, Any]], path: Path) -> dict[str, str]:
    content = torch.load(path, weights_only=True)
    contents: dict[str, Any] = {
        "missing": None,
        "damaged": b"PK\x03\x04 half of it",
        "other": {**content, "version": 99},
        "lacking": {**content, "rows": dict(list(content["rows"].items())[1:])},
    }
    messages = {}
    for name, value in contents.items():
        path.unlink(missing_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        elif value is not None:
            torch.save(value, path)
        try:
            store.restore(state, path)
            messages[name] = ""
        except ValueError as error:
            messages[name] = str(error)
    return messages


def _differences_of_images(root: Path) -> list[str]:
    """Return what is not as the agent loop has put it, of rows that were copied, saved, loaded and copied again."""
    rows = [row for members in make_rows(build_vision_model("qwen3_vl")).values() for row in members]
    keys = [f"a_{place}_0" for place in range(len(rows))]
    for key, row in zip(keys, rows, strict=True):
        tq.kv_batch_put(keys=[key], partition_id="images", fields=tu.list_of_dict_to_tensordict([row]), tags=[{}])
    copy_rows(KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id="images"), keys)
    groups: Sequence[Sequence[str]] = [keys[:3], keys[3:]]
    save_rows(root / "images.pt", groups)
    load_rows(root / "images.pt", groups)
    kept = trusted_rows._rows(tq.kv_batch_get(keys=keys, partition_id=PARTITION))
    differ = []
    for place, (row, copy) in enumerate(zip(rows, kept, strict=True)):
        wanted = {**row, **{f"image {n}": v for n, v in row["multi_modal_inputs"].items()}}
        actual = {**copy, **{f"image {n}": v for n, v in copy["multi_modal_inputs"].items()}}
        names = [name for name, value in wanted.items() if isinstance(value, torch.Tensor)]
        differ += [f"{place} {name}" for name in names if not torch.equal(wanted[name], actual[name])]
        differ += [f"{place} images"] if len(row["multi_modal_inputs"]) != len(copy["multi_modal_inputs"]) else []
    return differ


def main(root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=0, world_size=1)
    # Logical: the queue asks for several.
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    (root / "results.json").write_text(json.dumps(measure(root)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
