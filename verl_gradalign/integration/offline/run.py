# SPDX-License-Identifier: Apache-2.0
"""An offline scoring from its first check to its files: what `verl-gradalign score` calls.

    summary = run_scoring(task, command=sys.argv, watch=lambda progress: ...)

verl is started as a separate process, by its own entry point; its output goes to state/run.log. The same call
resumes a scoring that was interrupted, and writes the results at once where everything is scored.
"""

import contextlib
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.errors import refuse
from verl_gradalign.files import atomic_folder
from verl_gradalign.integration.checks import check_data, check_verl_config, read_config
from verl_gradalign.integration.compose import compose_run, composing, validate
from verl_gradalign.integration.offline.results import write_results
from verl_gradalign.integration.offline.store import ScoringStore
from verl_gradalign.integration.offline.task import Checkpoint, ScoringTask, check_task, find_checkpoint, verl_overrides
from verl_gradalign.integration.offline.trainer import check_scoring
from verl_gradalign.integration.run_identity import fingerprints, trusted_identity
from verl_gradalign.selection.state_file import flat
from verl_gradalign.versions import version_of

POLL_S = 0.5
TERMINATION_S = 60
"""How long verl may take to end when it is asked to; then it is killed."""

TAIL_LINES = 40
# What Ray puts before a line of another process.
OF_A_WORKER = "\x1b[36m("
AN_ERROR = re.compile(r"[\w.]+(Error|Exception): ")

# What decides rollouts and scores; everything else (devices, memory, micro-batches, loggers) may differ when a scoring
# is resumed.
DECISIVE = {
    "algorithm": "adv_estimator norm_adv_by_std_in_grpo gamma lam",
    "data": "prompt_key reward_fn_key max_prompt_length max_response_length seed train_max_samples truncation "
    "filter_overlong_prompts custom_cls apply_chat_template_kwargs tool_config_path function_tool_path tokenizer",
    "reward": "custom_reward_function reward_manager reward_model.enable reward_model.model_path",
    "actor_rollout_ref.model": "hf_config_path tokenizer_path custom_chat_template external_lib lora_rank lora_alpha "
    "lora_adapter_path",
    "actor_rollout_ref.actor": "loss_agg_mode loss_scale_factor policy_loss.loss_mode fsdp_config.model_dtype "
    "fsdp_config.dtype fsdp_config.mixed_precision",
    "actor_rollout_ref.rollout": "name n temperature top_k top_p dtype seed prompt_length response_length "
    "max_model_len ignore_eos do_sample quantization multi_turn agent.default_agent_loop agent.agent_loop_config_path",
    "gradalign": "score advantage loss_agg_mode estimator success_threshold seed score_options direction validation.n "
    "probe.oversized probe.rank probe.relative_step probe.pool_dots probe.sketch_rank",
}


def run_scoring(
    task: ScoringTask, command: Sequence[str], watch: Callable[[Mapping[str, Any]], None]
) -> dict[str, Any]:
    """Score what is not scored yet, write the results, and return the summary. `watch` receives the progress.

    Raises: ValueError for what cannot be scored, before anything starts; RuntimeError with the end of verl's output if
        it fails. What is done stays done.
    """
    check_task(task)
    datasets.disable_progress_bars()
    checkpoint, store, log_path = find_checkpoint(task.model), ScoringStore(task.state), task.state / "run.log"
    with _folder_lock(task):
        model = task.model.resolve() if checkpoint is None else _whole_model(checkpoint, task)
        overrides = verl_overrides(task, model, checkpoint)
        verl_config = _compose(overrides)
        config = _check(task, verl_config, checkpoint)
        store.require_same_identity(identity_of(task, verl_config))
        if store.measured(config) is None:
            if checkpoint is not None:
                _merge(checkpoint, model, log_path)
            _run(overrides, task.state, watch)
        measured = store.measured(config)
        if measured is None:
            raise RuntimeError(f"verl ended, but not everything is scored; its output is in {log_path}")
        return write_results(task, config, verl_config, measured, command)


def identity_of(task: ScoringTask, verl_config: DictConfig) -> dict[str, Any]:
    """Return everything that must be the same for a scoring to be resumed, by dotted key."""
    config = read_config(verl_config)
    reward = OmegaConf.select(verl_config, "reward.custom_reward_function.path")
    names = [f"{part}.{key}" for part, keys in DECISIVE.items() for key in keys.split()]
    decisive = {name: OmegaConf.select(verl_config, name) for name in names}
    checkpoint = find_checkpoint(task.model)
    if checkpoint is None:
        kinds = (".safetensors", ".bin", ".pt", ".json", ".jinja")
        weights = [path for path in task.model.iterdir() if path.suffix in kinds and path.is_file()]
    else:
        parts = ("model", "optim") if config.direction.metric == "adam" else ("model",)
        weights = [path for part in parts for path in checkpoint.folder.glob(f"{part}_world_size_*.pt")]
    return flat(
        {
            "pool": fingerprints(task.pool),
            "trusted": trusted_identity(config),
            # Size and time: hashing weights would take minutes.
            "model": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(weights)},
            "reward": {"file": fingerprints([reward] if reward else [])},
            "versions": {name: version_of(name) for name in ("verl", "verl-gradalign")},
            "verl": {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in decisive.items()},
        }
    )


@contextlib.contextmanager
def _folder_lock(task: ScoringTask) -> Iterator[None]:
    """Hold the folder's lock, which verl's process takes over: it is free when the last of them has ended."""
    task.state.mkdir(parents=True, exist_ok=True)
    with (task.state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse("--output", task.output, "another process is scoring into it", "wait for it, or end it")
        os.set_inheritable(lock.fileno(), True)
        yield


def _compose(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that verl will run with. Raises ValueError for what it does not take."""
    try:
        # verl prints while it validates; the standard output is for the result.
        with contextlib.redirect_stdout(io.StringIO()), composing():
            return validate(compose_run(overrides))
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        why = f"verl does not take this configuration: {error}. Remedy: mend what stands after --."
        raise ValueError(why) from None


def _check(task: ScoringTask, verl_config: DictConfig, checkpoint: Checkpoint | None) -> GradAlignConfig:
    """Return the `gradalign` block, after the checks that the trainer makes too, when it would cost minutes."""
    config = read_config(verl_config)
    check_scoring(verl_config)
    check_verl_config(config, verl_config)
    check_data(config, verl_config)
    num_ranks = verl_config.trainer.n_gpus_per_node * verl_config.trainer.nnodes
    if checkpoint is not None and checkpoint.num_ranks != num_ranks:
        refuse(
            "--model",
            task.model,
            f"was saved by {checkpoint.num_ranks} ranks, and verl loads it on as many only, not on {num_ranks}",
            f"score on {checkpoint.num_ranks} (trainer.n_gpus_per_node, trainer.nnodes after --), or merge it with "
            f"`python -m verl.model_merger merge --backend fsdp --local_dir {checkpoint.folder} --target_dir FOLDER` "
            "and give that folder: its weights are rounded to bfloat16",
        )
    return config


def _whole_model(checkpoint: Checkpoint, task: ScoringTask) -> Path:
    """Return the folder of a whole model that verl builds its actor from, before it loads the shards into it."""
    saved = checkpoint.folder / "huggingface"
    is_whole = any(saved.glob("*.safetensors")) or any(saved.glob("pytorch_model*.bin"))
    return saved if is_whole else task.state / "model"


def _merge(checkpoint: Checkpoint, model: Path, log_path: Path) -> None:
    """Have verl merge the shards into a whole model, rounded: the actor loads the exact shards afterwards."""
    if not model.exists():
        with atomic_folder(model) as unfinished:
            command = ["-m", "verl.model_merger", "merge", "--backend", "fsdp"]
            _execute([*command, "--local_dir", str(checkpoint.folder), "--target_dir", str(unfinished)], log_path)


def _run(overrides: Sequence[str], state: Path, watch: Callable[[Mapping[str, Any]], None]) -> None:
    """Run verl to its end."""
    progress_path = state / "progress.json"
    progress_path.unlink(missing_ok=True)

    def report() -> None:
        try:
            progress = json.loads(progress_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # absent at first; and as it is for show alone, its damage ends nothing
            return
        watch(progress)

    _execute(["-m", "verl.trainer.main_ppo", *overrides], state / "run.log", report)
    report()


def _execute(arguments: Sequence[str], log_path: Path, on_poll: Callable[[], None] = lambda: None) -> None:
    """Run Python to its end, its output at the end of the log; raise RuntimeError if it fails."""
    with log_path.open("ab") as log:
        # The process takes over the lock (`_folder_lock`); other files are not inherited unless marked.
        process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, close_fds=False)
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            on_poll()
    finally:
        process.terminate()  # without effect where it has ended
        try:
            process.wait(TERMINATION_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _require_success(process.returncode, log_path)


def _require_success(returncode: int, log_path: Path) -> None:
    """Raise RuntimeError with verl's last lines: its own if they tell an error, as workers go on talking after it."""
    if returncode:
        lines = log_path.read_text(errors="replace").splitlines()
        own = [line for line in lines if not line.startswith(OF_A_WORKER)]
        is_told = any(AN_ERROR.match(line) for line in own[-TAIL_LINES:])
        raise RuntimeError(
            f"verl failed (exit {returncode}); its whole output is in {log_path}, and the same command resumes from "
            "what is done\n" + "\n".join((own if is_told else lines)[-TAIL_LINES:])
        )
