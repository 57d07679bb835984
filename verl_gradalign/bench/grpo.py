# SPDX-License-Identifier: Apache-2.0
"""Ten steps of real GRPO with and without selection: verl's own entry point, started as a user would start it.

The model is a tiny untrained one, or a model folder of the user's; the reward is made up, so that groups are live
whatever the model can do: it is for the times, and no weights are saved. On a GPU responses come from vLLM. On a CPU
both runs are started at once.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from verl_gradalign.bench.options import Options, Record, Skipped
from verl_gradalign.data.tasks import write_task_files
from verl_gradalign.experiments.launches import Launch, cpu_environment, start
from verl_gradalign.experiments.metrics_file import metrics_by_step

ENTRY_POINT = "verl.trainer.main_ppo"
NUM_STEPS = 10
NUM_DRY_STEPS = 3
WARM_UP = 2
"""Steps that are not timed, where there are more: kernels are chosen and caches filled in them."""
POLL_S = 0.5
PORT_TAKEN = "EADDRINUSE"
"""verl looks for a free port and binds it seconds later: the launch beside it may be faster. It is then repeated."""
LINES_OF_LOG = 30
OVERSAMPLE = 2
WITH, WITHOUT = "with selection", "without"


@dataclass(frozen=True)
class Problems:
    """What a model is asked, and how long it may answer."""

    model: Path
    reward: str
    """Of `made_up_rewards`."""
    max_prompt: int
    max_response: int
    is_small: bool
    """Whether nothing need be done for the GPU's memory, and little is to be gained from compiled kernels."""


def tiny_model(options: Options) -> Iterator[Record]:
    """Train a tiny model: whether the whole chain runs here."""
    from verl_gradalign.toy.model import build_tiny_model

    # Heads of 64 features, which every attention kernel knows. Untied: at random weights a tied one repeats itself.
    sizes: dict[str, Any] = {"hidden_size": 256, "num_layers": 4, "intermediate_size": 768}
    sizes = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 128} if options.is_dry_run else sizes
    model = build_tiny_model(options.folder / "tiny-model", tie_word_embeddings=False, **sizes)
    longest = 12 if options.is_dry_run else 256
    yield from _with_and_without(options, "tiny", Problems(model, "first_byte", 64, longest, True))


def own_model(options: Options) -> Iterator[Record]:
    """Train the user's model."""
    if options.model is None:
        raise Skipped("no --model FOLDER was given")
    longest = 12 if options.is_dry_run else 512
    yield from _with_and_without(options, "own", Problems(options.model, "even_length", 256, longest, False))


def _with_and_without(options: Options, name: str, problems: Problems) -> Iterator[Record]:
    """Yield what both runs took, and their ratio."""
    folder = options.folder / f"grpo-{name}"
    files = write_task_files(folder / "data", num_pool=640, num_trusted=16, num_test=16)
    num_steps = NUM_DRY_STEPS if options.is_dry_run else NUM_STEPS
    folders, words = {WITH: folder / "with", WITHOUT: folder / "without"}, {WITH: selection(files), WITHOUT: []}
    measured: dict[str, Record] = {}
    # Side by side on a CPU, where starting takes longest and on one core; GPUs belong to one run at a time.
    for together in [[WITH, WITHOUT]] if options.is_dry_run else [[WITH], [WITHOUT]]:

        def launch(which: str) -> Launch:
            plain = overrides_of(options, problems, files, folders[which], num_steps)
            return _launch([*plain, *words[which]], folders[which], options)

        seconds = _wait(together, launch)
        for which in together:
            measured[which] = summary(folders[which] / "metrics.jsonl", num_steps)
            yield {"table": "runs", "run": which, "seconds_in_all": seconds[which], **measured[which]}
    slower = measured[WITH]["step_s"] / measured[WITHOUT]["step_s"]
    yield {"table": "ratio", "step_with_over_without": slower, "oversample": OVERSAMPLE}


def selection(files: Mapping[str, Path]) -> list[str]:
    """Return the words that turn selection on."""
    trusted = f"gradalign.validation.files={files['trusted']}"
    return ["+gradalign=cosine", trusted, f"gradalign.oversample={OVERSAMPLE}", "gradalign.poll_interval_s=0.05"]


def overrides_of(
    options: Options, problems: Problems, files: Mapping[str, Path], run_dir: Path, num_steps: int
) -> list[str]:
    """Return what verl's entry point is given for a run without selection."""
    is_cpu, actor, rollout = options.is_dry_run, "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        *(ON_A_CPU if is_cpu else on_gpus(options.num_devices, problems.is_small)),
        f"data.train_files={files['pool']}",
        f"data.val_files={files['test']}",
        "data.train_batch_size=8",
        f"data.max_prompt_length={problems.max_prompt}",
        f"data.max_response_length={problems.max_response}",
        "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.model.path={problems.model}",
        f"{actor}.ppo_mini_batch_size=8",
        f"{actor}.use_dynamic_bsz=true",
        f"{actor}.ppo_max_token_len_per_gpu={16384 if not is_cpu else 4096}",
        f"{rollout}.n=8",
        "reward.custom_reward_function.path=pkg://verl_gradalign.bench.made_up_rewards",
        f"reward.custom_reward_function.name={problems.reward}",
        "trainer.logger=[console,file]",
        "trainer.project_name=verl-gradalign",
        f"trainer.experiment_name=bench-{run_dir.name}",
        f"trainer.default_local_dir={run_dir}",
        f"hydra.run.dir={run_dir / 'hydra'}",
        f"trainer.total_training_steps={num_steps}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
    ]


ON_A_CPU = (
    "+platform=cpu",
    "actor_rollout_ref.model.enable_gradient_checkpointing=false",
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl_gradalign.cpu.batched_rollout.BatchedRollout",
    "reward.num_workers=0",
)


OFFLOADED = ("param", "optimizer")


def on_gpus(num_devices: int, is_small: bool) -> tuple[str, ...]:
    """Return the overrides that a machine with GPUs needs; models of any size lie in CPU memory in between."""
    # A power of two, and 8 at most, divides every batch.
    num_used = min(8, 1 << (num_devices.bit_length() - 1))
    fsdp, rollout = "actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.rollout"
    has_flash = find_spec("flash_attn") is not None
    return (
        f"actor_rollout_ref.model.use_remove_padding={str(has_flash).lower()}",
        # verl asks for flash attention unless it is told otherwise.
        *(() if has_flash else ("+actor_rollout_ref.model.override_config.attn_implementation=sdpa",)),
        "actor_rollout_ref.model.enable_gradient_checkpointing=true",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.ref.strategy=fsdp2",
        f"{rollout}.name=vllm",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.gpu_memory_utilization=0.4",
        *((f"{rollout}.enforce_eager=true",) if is_small else (f"{fsdp}.{each}_offload=true" for each in OFFLOADED)),
        f"trainer.n_gpus_per_node={num_used}",
        "trainer.nnodes=1",
    )


def _launch(overrides: list[str], run_dir: Path, options: Options) -> Launch:
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics = run_dir / "metrics.jsonl"
    metrics.unlink(missing_ok=True)  # verl appends
    environment = {**(cpu_environment() if options.is_dry_run else {}), "VERL_FILE_LOGGER_PATH": str(metrics)}
    return start([sys.executable, "-m", ENTRY_POINT, *overrides], run_dir / "run.log", run_dir, environment)


def _wait(together: Sequence[str], launch: Callable[[str], Launch]) -> dict[str, float]:
    """Launch all, and return the seconds that each took. Raises: RuntimeError with the end of what a failure said."""
    started, seconds, repeated = time.monotonic(), dict[str, float](), set[str]()
    launches = {which: launch(which) for which in together}
    while len(seconds) < len(launches):
        time.sleep(POLL_S)
        for which, (process, log) in list(launches.items()):
            if process.poll() is None or which in seconds:
                continue
            if process.returncode and which not in repeated and PORT_TAKEN in log.read_text(errors="replace"):
                repeated.add(which)
                launches[which] = launch(which)
                continue
            seconds[which] = time.monotonic() - started
            if process.returncode:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-LINES_OF_LOG:])
                raise RuntimeError(f"verl, {which}, ended with {process.returncode}; all it said is in {log}\n{tail}")
    return seconds


def summary(path: Path, num_steps: int) -> Record:
    """Return what a run's metrics say. Raises: RuntimeError if it made fewer steps than it was asked for."""
    steps = [metrics for metrics in metrics_by_step(path).values() if "timing_s/step" in metrics]
    if len(steps) != num_steps:
        raise RuntimeError(f"{path} holds {len(steps)} steps of {num_steps}")
    timed = steps[WARM_UP:] or steps[-1:]

    def median(name: str) -> float | None:
        values = [metrics[name] for metrics in timed if name in metrics]
        return statistics.median(values) if values else None

    return {
        "steps": len(steps),
        "step_s": median("timing_s/step"),
        "update_s": median("timing_s/update_actor"),
        "old_log_probs_s": median("timing_s/old_log_prob"),
        # Of plain verl it is not known: its v1 trainer rolls out beside the step.
        "rollout_s": median("gradalign/seconds/rollout"),
        "scores_s": median("gradalign/seconds/scores"),
        "direction_s": median("gradalign/seconds/direction"),
        "selection_share": median("gradalign/seconds/share_of_step"),
        "kept": median("gradalign/kept"),
        "reward": median("critic/score/mean"),
    }
