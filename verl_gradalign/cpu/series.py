# SPDX-License-Identifier: Apache-2.0
"""Several runs of verl, one after the other, in one set of worker processes.

Starting the processes takes a minute, which is longer than a small run trains. Every run is verl's own trainer with a
separate configuration; what they share are the processes: between two runs the actor is built anew from its model
folder, with a new optimizer, and its weights are pushed to the rollout. A run is the same as if it had been started
alone (tests/e2e/test_series.py).

    python -m verl_gradalign.cpu.series series.json

The file holds a list of {"folder": ..., "done": ..., "seed": ..., "overrides": [...]}: the overrides are those of
`python -m verl.trainer.main_ppo`. A run's metrics go to <folder>/metrics.jsonl; when it has ended, the file `done` is
written. Runs that are done are not run again. A run with `"may_fail": true` leaves its error in <folder>/failed.txt and
does not end the series; it must not be the first one. With `"budget": {"amount": ..., "unit": ..., "num_tests": ...}` a
run ends when it has generated so many responses or tokens, or taken so many seconds, in however many steps (`Meter`).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf, open_dict
from transfer_queue import KVBatchMeta
from verl.trainer.main_ppo import run_ppo
from verl.trainer.ppo.utils import need_critic
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, get_trainer_cls
from verl.utils.import_utils import load_class_from_fqn

from verl_gradalign.integration.compose import compose_run, composing, validate
from verl_gradalign.integration.worker import use_own_workers
from verl_gradalign.types import RESPONSES, SECONDS, TOKENS

if TYPE_CHECKING:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

BEGINS = "==== series: "
"""Stands in the output, before a run's folder, where the run begins."""

# What verl's trainers make in `_setup` and a later run takes over.
PROCESSES = (
    "resource_pool_manager",
    "resource_pool_to_cls",
    "role_worker_mapping",
    "ref_in_actor",
    "actor_rollout_wg",
    "ref_policy_wg",
    "reward_loop_manager",
    "teacher_model_manager",
    "distillation_config",
    "llm_server_manager",
    "checkpoint_manager",
)

# What runs of a series may differ in, by the beginnings of `<key>:`. All else is given to processes when they start.
PER_RUN = (
    *("data.", "trainer.", "algorithm.", "gradalign.", "actor_rollout_ref.actor.optim.lr:"),
    # The trainer tells the worker with every batch; the worker's own copy is read by nobody. There is no critic.
    *("actor_rollout_ref.actor.ppo_mini_batch_size:", "critic.ppo_mini_batch_size:"),
)
# A manager that lives in the trainer's process is made anew for every run, so these may differ as well. No worker of
# verl reads the copies of rollout.n that its configuration gives to them.
PER_MANAGER = (
    "actor_rollout_ref.actor.rollout_n:",
    "actor_rollout_ref.ref.rollout_n:",
    "critic.rollout_n:",
    "reward.custom_reward_function.",
    "actor_rollout_ref.rollout.n:",
    "actor_rollout_ref.rollout.val_kwargs.",
)


NEVER = 1_000_000_000
"""A number of steps that no run makes."""


class Meter:
    """Ends a run when its budget is spent, and has it tested whenever another equal part of that is through."""

    def __init__(self, amount: float, unit: str, num_tests: int) -> None:
        self.unit = unit
        self._amount, self._num_tests = amount, num_tests
        self._num_passed = 0

    def note(self, spent: float) -> tuple[bool, bool]:
        """Return whether to test after a step by whose end so much was spent, and whether it is the last step."""
        num_passed = int(spent * self._num_tests // self._amount)
        is_test, self._num_passed = num_passed > self._num_passed, num_passed
        return is_test, num_passed >= self._num_tests


class SharesProcesses(_Trainer):
    """Mixed into a trainer of verl: takes over the processes of the run before, if there was one."""

    predecessor: SharesProcesses | None = None
    meter: Meter | None = None
    """Ends the run before the configuration's number of steps does, and says after which steps it is tested."""
    _seconds = 0.0
    _step_began = 0.0

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        use_own_workers(self.role_worker_mapping)

    def _setup(self) -> None:
        if self.predecessor is None:
            super()._setup()
            return
        self._init_tokenizer()
        self._init_dataloader()
        self._init_dump_executor()
        for name in PROCESSES:
            if hasattr(self.predecessor, name):
                setattr(self, name, getattr(self.predecessor, name))
        self.actor_rollout_wg.gradalign_reset(self.config.actor_rollout_ref.actor.optim.lr)
        self.checkpoint_manager.sleep_replicas()
        self._load_checkpoint()

    def on_step_begin(self) -> None:
        """Begin verl's step, and to count its seconds."""
        self._step_began = time.perf_counter()
        super().on_step_begin()

    def on_step_end(self) -> None:
        """End verl's step, and have it tested and be the last one if the budget says so.

        Between this and the beginning lies what verl logs as timing_s/step; tests come after it.
        """
        super().on_step_end()
        self._seconds += time.perf_counter() - self._step_began
        if self.meter is not None:
            is_test, is_over = self.meter.note(self._spent(self.meter.unit))
            # verl looks at both after a step: whether its number is a multiple of the one, and exceeds the other.
            self.config.trainer.test_freq = 1 if is_test else NEVER
            if is_over:
                self.total_training_steps = self.global_steps

    def _spent(self, unit: str) -> float:
        if unit == SECONDS:
            return self._seconds
        return {RESPONSES: self.agent_loop_manager.num_responses, TOKENS: self.agent_loop_manager.num_tokens}[unit]

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], **kwargs: Any
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, **kwargs)
        rows = tq.kv_batch_get(batch.keys, batch.partition_id, ["data_source", "extra_info"])
        is_corrupted = [bool(info.get("corrupted")) for info in rows["extra_info"]]
        metrics["experiment/share/corrupted"] = sum(is_corrupted) / len(is_corrupted)
        for source, count in Counter(map(str, rows["data_source"])).items():
            metrics[f"experiment/share/{source}"] = count / len(is_corrupted)
        if hasattr(self.agent_loop_manager, "num_tokens"):
            metrics["experiment/num_tokens"] = self.agent_loop_manager.num_tokens
            metrics["experiment/num_responses"] = self.agent_loop_manager.num_responses


@ray.remote
class SeriesRunner:
    """Runs the configurations of a series in turn, as verl's TaskRunnerV1 runs one."""

    def run(self, config: DictConfig) -> None:
        """Run every configuration of `config.series`, and mark each as done when it has ended."""
        tq.init(config.transfer_queue)
        self._ready: SharesProcesses | None = None
        """The newest trainer that has its processes; the next run takes them over."""
        self._shared_manager: Any = None
        try:
            for run in config.series:
                # Where warnings go: Ray forwards the two streams separately, in no common order.
                print(f"{BEGINS}{run.folder}", file=sys.stderr, flush=True)
                try:
                    self._run_one(run)
                except Exception:
                    if not run.get("may_fail") or self._ready is None:
                        raise
                    Path(run.folder, "failed.txt").write_text(traceback.format_exc(), encoding="utf-8")
                Path(run.done).touch()
        finally:
            tq.close()

    def _run_one(self, run: DictConfig) -> None:
        config = run.config
        os.environ["VERL_FILE_LOGGER_PATH"] = str(Path(run.folder) / "metrics.jsonl")
        base = get_trainer_cls(config.trainer.v1.trainer_mode)
        trainer = type(base.__name__, (SharesProcesses, base), {})(config=config)
        trainer.predecessor = self._ready
        trainer.meter = Meter(**run.budget) if run.get("budget") else None
        trainer.init()
        trainer.predecessor = None
        self._ready = trainer
        for replica in trainer.llm_server_manager.get_replicas():
            ray.get([server.reseed.remote(run.seed) for server in replica.servers])
        exit_code = 1
        try:
            trainer.fit(self._manager(trainer, config))
            exit_code = 0
        finally:
            if tracking := getattr(trainer, "logger", None):
                tracking.finish(exit_code=exit_code)
            for partition, keys in (tq.kv_list() or {}).items():
                if keys:
                    tq.kv_clear(keys=list(keys), partition_id=partition)

    def _manager(self, trainer: SharesProcesses, config: DictConfig) -> Any:
        """Return the run's agent loop manager. verl's own starts processes, so it is made once."""
        arguments = {
            "config": config,
            "llm_client": trainer.get_llm_client(),
            "teacher_client": trainer.get_teacher_client(),
            "reward_loop_worker_handles": trainer.get_reward_handles(),
        }
        if name := config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class"):
            return load_class_from_fqn(name, "AgentLoopManager").create(**arguments)
        self._shared_manager = self._shared_manager or AgentLoopManagerTQ.create(**arguments)
        return self._shared_manager


def check_series(configs: Mapping[str, DictConfig]) -> None:
    """Raise ValueError if runs differ in what processes are started with, naming the first key that does."""
    (first, config), *others = configs.items()
    if need_critic(config):
        raise ValueError("algorithm.adv_estimator=gae: a series does not reset a critic; start these runs one by one")
    wanted, allowed = _given_to_processes(config), ", ".join(key.strip(".:") for key in PER_RUN)
    for folder, other in others:
        given = _given_to_processes(other)
        key = min((key for key in wanted.keys() | given.keys() if given.get(key) != wanted.get(key)), default=None)
        if key is not None:
            raise ValueError(
                f"{folder}: {key}={given.get(key)}, in {first} it is {wanted.get(key)}, and it is fixed when "
                f"processes start. Remedy: runs of a series may differ in {allowed} only; start this one by itself."
            )


def _given_to_processes(config: DictConfig) -> dict[str, Any]:
    """Return the values that processes are started with, by dotted key; names of experiments are only labels."""
    has_own_manager = config.actor_rollout_ref.rollout.agent.get("agent_loop_manager_class")
    per_run = PER_RUN + PER_MANAGER if has_own_manager else PER_RUN
    flat = _flat(OmegaConf.to_container(config, resolve=True))
    return {k: v for k, v in flat.items() if not f"{k}:".startswith(per_run) and not k.endswith(".experiment_name")}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{key}.{name}".lstrip(".")).items()}


def run_series(runs: Sequence[Mapping[str, Any]]) -> None:
    """Run what is not done yet; returns when all have ended."""
    todo = [run for run in runs if not Path(run["done"]).exists()]
    if not todo:
        return
    with composing():
        configs = {run["folder"]: validate(compose_run(run["overrides"])) for run in todo}
    check_series(configs)
    for folder in configs:
        Path(folder).mkdir(parents=True, exist_ok=True)
    base = configs[todo[0]["folder"]].copy()
    with open_dict(base):
        base.series = [{**run, "config": configs[run["folder"]]} for run in todo]
    run_ppo(base, task_runner_class=SeriesRunner)


if __name__ == "__main__":
    run_series(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
