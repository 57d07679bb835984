# SPDX-License-Identifier: Apache-2.0
"""Every launch of verl that the end-to-end tests read, in the order in which they are started.

A launch is a function of the workplace; a test receives what it returns by the fixture of the same name. Most runs
share the processes of one series; a launch of its own is for what processes are started with, or for what kills them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import GptOssConfig

from tests.distributed.setups import ULYSSES
from tests.e2e import comparisons, offline
from tests.e2e.runs import (
    OWN_LOOP,
    REPOSITORY,
    SEPARATE,
    TIMEOUT_S,
    Run,
    Workplace,
    cpu_environment,
    gradalign,
    kill_at_marker,
)
from tests.e2e.series_runs import (
    FLOAT64,
    KILLS,
    MAY_FAIL,
    SCHEDULES,
    TWO_STEPS,
    odd_reward,
    scheduled,
    series_runs,
)

LAUNCHES: dict[str, Callable[[Workplace], Any]] = {}

DEMO = REPOSITORY / "recipes" / "quickstart" / "demo.py"
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k"


def launch(function: Callable[[Workplace], Any]) -> Callable[[Workplace], Any]:
    """Register a launch under its name."""
    LAUNCHES[function.__name__] = function
    return function


@launch
def series(workplace: Workplace) -> dict[str, Run]:
    """Return every run that can share its processes with others."""
    return workplace.series("series", series_runs(workplace), MAY_FAIL)


@launch
def killed_step(workplace: Workplace) -> Run:
    """Return a run of the step schedule that was killed twice, with kill -9, and resumed."""
    return killed(workplace, "step", ["update 2", "checkpoint 5"])


@launch
def scored(workplace: Workplace) -> offline.Resumed:
    """Return a pool scored offline: killed, deprived of some rollouts, and resumed."""
    return offline.killed_and_resumed(workplace)


@launch
def compared(workplace: Workplace) -> Path:
    """Return the folder of a comparison of two methods, in one set of processes; cosine comes second."""
    folder = workplace.root / "comparison"
    comparisons.compare(folder, workplace.model, "random,cosine")
    return folder


@launch
def demonstration(workplace: Workplace) -> tuple[str, Path]:
    """Return what the README's first command printed, with fewer steps, and its folder."""
    folder = workplace.root / "demonstration"
    folder.mkdir()
    options = ["--steps", "2", "--warm-up-steps", "80", "--scores", "cosine"]
    done = subprocess.run(
        [sys.executable, str(DEMO), "--output", "made here", *options, "--", "trainer.test_freq=2"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout, folder / "made here"


@launch
def two_ranks(workplace: Workplace) -> Run:
    """Return a run turned on by the single keys, on FSDP1, with groups too large for a micro-batch."""
    return workplace.run(
        "two_ranks",
        "trainer.v1.trainer_mode=gradalign",
        "trainer.v1.sampler.custom_sampler.path=pkg://verl_gradalign.integration.sampler",
        "trainer.v1.sampler.custom_sampler.name=GradAlignSampler",
        f"+gradalign.validation.files=[{workplace.files['trusted']}]",
        "+gradalign.probe.max_tokens_per_rank=165",
        "actor_rollout_ref.actor.strategy=fsdp",
        FLOAT64,
        TWO_STEPS,
        num_ranks=2,
    )


@launch
def sliced(workplace: Workplace) -> Run:
    """Return a run whose two ranks have slices of packed rows (Ulysses), with fused kernels and GSPO's loss."""
    model = "actor_rollout_ref.model"
    return workplace.run(
        "sliced",
        *gradalign("cosine", workplace.files),
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=2",
        "actor_rollout_ref.actor.policy_loss.loss_mode=gspo",
        f"{model}.use_remove_padding=true",
        f"{model}.use_fused_kernels=true",
        f"{model}.fused_kernel_options.impl_backend=torch",
        f"{model}.external_lib=tests.e2e.sliced_rows",
        f"++{model}.override_config.attn_implementation={ULYSSES}",
        FLOAT64,
        TWO_STEPS,
        num_ranks=2,
    )


@launch
def asynchronous(workplace: Workplace) -> Run:
    """Return a run of the asynchronous trainer, on verl's own agent loop: its rollouts overlap with training.

    Its reward function gives some problems nan, and others none.
    """
    return workplace.run(
        "async",
        odd_reward(workplace, "missing"),
        *gradalign("cosine", workplace.files, oversample=2),
        "trainer.v1.trainer_mode=gradalign_colocate_async",
        "trainer.v1.colocate_async.num_warmup_batches=2",
        "trainer.total_training_steps=4",
        batched=False,
    )


@launch
def separate(workplace: Workplace) -> Run:
    """Return a run of verl's own separate_async, all of whose responses are of the weights that were pushed last."""
    mode = ["trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.num_warmup_batches=0"]
    return workplace.run("separate", *SEPARATE, *mode, "trainer.test_freq=2", TWO_STEPS, batched=False)


@launch
def separate_forecast(workplace: Workplace) -> tuple[Run, Run]:
    """Return a run that chooses by forecast beside a rollout of its own, and what went on from its checkpoint."""
    overrides = [
        *gradalign("forecast", workplace.files, estimator="ghost", direction__train_on_trusted="false"),
        "gradalign.direction.refresh_interval=4",
        *SEPARATE,
        "trainer.v1.trainer_mode=gradalign_separate_async",
        "trainer.v1.separate_async.num_warmup_batches=1",
        "trainer.save_freq=3",
    ]
    first = workplace.run("separate_forecast", *overrides, "trainer.total_training_steps=3", batched=False)
    goes_on = [f"trainer.default_local_dir={first.folder}", "trainer.total_training_steps=4"]
    return first, workplace.run("separate_forecast_resumed", *overrides, *goes_on, batched=False)


@launch
def asynchronous_forecast(workplace: Workplace) -> Run:
    """Return a run that chooses by forecast while earlier choices are still being answered."""
    return workplace.run(
        "async_forecast",
        *gradalign("forecast", workplace.files, direction__train_on_trusted="false"),
        "gradalign.direction.refresh_interval=4",
        "trainer.v1.trainer_mode=gradalign_colocate_async",
        "trainer.v1.colocate_async.num_warmup_batches=1",
        "trainer.total_training_steps=4",
        batched=False,
    )


@launch
def ppo(workplace: Workplace) -> Run:
    """Return a run with a critic."""
    return workplace.run(
        "ppo",
        *gradalign("cosine", workplace.files, oversample=2),
        "algorithm.adv_estimator=gae",
        f"critic.model.path={workplace.model}",
        "critic.ppo_micro_batch_size_per_gpu=32",
        TWO_STEPS,
    )


@launch
def lora(workplace: Workplace) -> Run:
    """Return a run of an adapter, with a KL term and a sketch of the pool's dot products."""
    return workplace.run(
        "lora",
        *gradalign("pool_cosine", workplace.files, oversample=2),
        "gradalign.probe.pool_dots=sketch",
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora_alpha=16",
        "actor_rollout_ref.model.lora.merge=true",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.kl_loss_coef=0.01",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32",
        TWO_STEPS,
    )


@launch
def differences(workplace: Workplace) -> Run:
    """Return a run on packed rows, scored by finite differences, with Adam's metric on a direction in CPU memory."""
    return workplace.run(
        "differences",
        *gradalign("dot", workplace.files, estimator="finite_difference", oversample=3),
        "gradalign.direction.metric=adam",
        "gradalign.direction.offload=true",
        "actor_rollout_ref.model.use_remove_padding=true",
        TWO_STEPS,
    )


@launch
def two_outputs(workplace: Workplace) -> Run:
    """Return a run on verl's own agent loop, of sessions with several outputs."""
    loops = workplace.root / "loops.yaml"
    loops.write_text("- name: two_outputs\n  _target_: tests.e2e.two_outputs.TwoOutputsAgentLoop\n")
    return workplace.run(
        "two_outputs",
        *gradalign("lower_bound", workplace.files, oversample=2),
        "actor_rollout_ref.rollout.agent.default_agent_loop=two_outputs",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={loops}",
        TWO_STEPS,
        batched=False,
    )


@launch
def stock(workplace: Workplace) -> Run:
    """Return a run of verl without the word."""
    return workplace.run("stock", FLOAT64, TWO_STEPS)


@launch
def alone(workplace: Workplace) -> Path:
    """Return the folder of the comparison's second run, made alone and with verl's own agent loop."""
    return comparisons.run_alone(workplace, OWN_LOOP)


@launch
def bad_configuration(workplace: Workplace) -> Run:
    """Return a launch that names a trusted set that is not there, and a model without rules, by its config alone."""
    missing = gradalign("cosine", {"trusted": workplace.root / "no_such_file.parquet"})
    folder = workplace.root / "experts"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    kind = {"architectures": ["GptOssForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    experts = GptOssConfig(**sizes, **heads, **kind)
    shutil.copytree(workplace.model, folder)
    experts.save_pretrained(folder)
    model = f"actor_rollout_ref.model.path={folder}"
    return workplace.run("bad_configuration", *missing, model, TWO_STEPS, may_fail=True)


@launch
def bench_dry_run(workplace: Workplace) -> Path:
    """Return the folder that a dry run of the kit has written to."""
    return benched(workplace, "bench_dry_run")


# What only `make test-all` starts.


@launch
def bench_own_model(workplace: Workplace) -> Path:
    """Return the same of the part that trains a model of the user's."""
    return benched(workplace, "bench_own_model", "--only", "model", "--model", str(workplace.model))


@launch
def reversed_series(workplace: Workplace) -> dict[str, Run]:
    """Return the runs of the series in another order: what one run leaves behind would show in others."""
    runs = series_runs(workplace)
    blocks: dict[str, list[str]] = {}
    for name in runs:
        blocks.setdefault(name.partition("@")[0], []).append(name)
    order = [name for block in ("random", *reversed(blocks)) for name in blocks.pop(block, [])]
    return workplace.series("reversed", {name: runs[name] for name in order}, MAY_FAIL)


def _kill_everywhere(schedule: str) -> None:
    def everywhere(workplace: Workplace) -> Run:
        return killed(workplace, schedule, KILLS[schedule])

    LAUNCHES[f"killed_everywhere_{schedule}"] = everywhere


for _schedule in SCHEDULES:
    _kill_everywhere(_schedule)


@launch
def scored_from_shards(workplace: Workplace) -> tuple[offline.Scoring, Path]:
    """Return LearnAlign's scores of a policy that verl saved as shards, and the folder of the whole policy."""
    return offline.from_shards(workplace)


@launch
def gsm8k(workplace: Workplace) -> Run:
    """Return one step on real prompts and answers."""
    from verl_gradalign.data.prepare import write_gsm8k

    data = workplace.root / "gsm8k_data"
    pool = write_gsm8k(GSM8K / "train.jsonl", data / "pool.parquet", "pool", max_rows=64)
    trusted = write_gsm8k(GSM8K / "test.jsonl", data / "trusted.parquet", "trusted", max_rows=4)
    return workplace.run(
        "gsm8k",
        *gradalign("cosine", {"trusted": trusted}, oversample=2),
        f"data.train_files={pool}",
        "data.max_prompt_length=896",
        "data.filter_overlong_prompts=true",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
        "trainer.total_training_steps=1",
    )


def benched(workplace: Workplace, name: str, *options: str) -> Path:
    """Run `verl-gradalign bench --dry-run`, and return its folder."""
    folder = workplace.root / name
    command = [sys.executable, "-m", "verl_gradalign.cli", "bench", "--dry-run", "--output", str(folder), *options]
    environment = cpu_environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return folder


def killed(workplace: Workplace, schedule: str, moments: list[str]) -> Run:
    """Return a run that was killed at each of the moments, with kill -9, and resumed after each."""
    name = f"killed{len(moments)}_{schedule}"
    folder, log = workplace.root / name, workplace.root / name / "run.log"
    folder.mkdir()
    for number, moment in enumerate([*moments, ""]):
        marker = folder / f"marker-{number}"
        command, environment = workplace.command(folder, FLOAT64, *scheduled(workplace, schedule))
        # verl begins the file anew whenever it is started.
        environment["VERL_FILE_LOGGER_PATH"] = str(workplace.root / f"{name}@{number}.jsonl")
        if moment:
            environment["VERL_USE_EXTERNAL_MODULES"] = "tests.e2e.interruption"
            environment["INTERRUPT_AT"] = f"{moment} {marker}"
        with log.open("ab") as output:
            process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        if moment:
            kill_at_marker(process, marker, log)
        else:
            assert process.wait(TIMEOUT_S) == 0, log.read_text(errors="replace")[-5000:]
    return Run(folder, 0, log.read_text(errors="replace"))
