# SPDX-License-Identifier: Apache-2.0
"""A composed configuration, examined as verl's entry point and our trainer will, before anything is started.

    findings = Findings()
    cost = examine_configuration(["+gradalign=cosine", ...], machine, findings)

Every refusal becomes a finding, so that one look shows all that is wrong. No Ray, no worker, no weights.
"""

import logging
import math
import netrc
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import verl  # noqa: F401  (loads the plugin, which makes +gradalign known)
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_gradalign.config import GradAlignConfig
from verl_gradalign.cost import Cost
from verl_gradalign.doctor.data import examine_data
from verl_gradalign.doctor.machine import Machine, asks_for_cpu
from verl_gradalign.doctor.model import examine_cost, examine_model, examine_positions, total_steps
from verl_gradalign.doctor.named import examine_named
from verl_gradalign.doctor.prompts import read_tokenizer
from verl_gradalign.doctor.script import Primary
from verl_gradalign.errors import refuse
from verl_gradalign.findings import Findings
from verl_gradalign.integration.checks import check_data, read_config, verl_checks
from verl_gradalign.integration.compose import compose_run, composing, validate
from verl_gradalign.integration.requests import sequence_parallel
from verl_gradalign.integration.run_identity import check_resume, identity, resume_folder
from verl_gradalign.selection.curriculum import check_schedule
from verl_gradalign.selection.scores import score_of
from verl_gradalign.versions import version_of

AREA = "configuration"


def examine_trainer_mode(findings: Findings) -> None:
    """Say whether verl, once loaded, knows the trainer mode."""
    with findings.refusals("plugin", "pip install --force-reinstall verl-gradalign; look at the log above"):
        from verl.trainer.ppo.v1 import get_trainer_cls

        get_trainer_cls("gradalign")
        findings.add("plugin", "ok", "verl has loaded the plugin and knows trainer_mode=gradalign")


def examine_configuration(
    overrides: Sequence[str],
    machine: Machine,
    findings: Findings,
    response_tokens: float | None = None,
    primary: Primary | None = None,
) -> Cost | None:
    """Add findings on what verl's entry point would be given; return the cost of a step, where it is known."""
    verl_config = _composed(overrides, primary or Primary(), findings)
    return None if verl_config is None else examine_composed(verl_config, machine, findings, response_tokens)


def examine_composed(
    verl_config: DictConfig, machine: Machine, findings: Findings, response_tokens: float | None = None
) -> Cost | None:
    """As `examine_configuration`, of a configuration with everything resolved."""
    if _lacks_values(verl_config, findings):
        return None
    if _has_wrong_sizes(verl_config, findings):
        return None
    is_elsewhere = _check_machine(verl_config, machine, findings)
    _check_verl(verl_config, is_elsewhere, findings)
    has_data_set = examine_named(verl_config, findings)
    _check_logging(verl_config, findings)
    can_resume = _check_folders(verl_config, findings)
    config = _own_config(verl_config, findings)
    if config is None:
        return None
    num_before = findings.num_errors
    with _warnings_of_checks(findings):
        for check in verl_checks(config):
            with findings.refusals(AREA):
                check(config, verl_config)
    tokenizer = read_tokenizer(verl_config, findings)
    model = examine_model(config, verl_config, findings)
    if model is not None:
        examine_positions(model.hf_config, None if tokenizer is None else len(tokenizer), verl_config, findings)
    num_of_data = findings.num_errors
    data = examine_data(config, verl_config, tokenizer, findings) if has_data_set else None
    if has_data_set and findings.num_errors == num_of_data:  # else what is wrong with the files is said already
        with findings.refusals("data"), _warnings_of_checks(findings):
            check_data(config, verl_config)
    if data is not None and findings.num_errors == num_of_data:
        _check_left(verl_config, config, data.num_problems, findings)
    if findings.num_errors == num_before:
        findings.add(AREA, "ok", f"score {config.score} with schedule {config.schedule} can be measured and planned")
    if can_resume:
        with findings.refusals("folders"):
            check_resume(identity(config, verl_config), verl_config)
    if data is not None:
        _check_steps(verl_config, config, data.num_problems, findings)
    if model is not None and data is not None:
        with findings.refusals("cost"):
            return examine_cost(config, verl_config, model, data, machine, findings, response_tokens)
    return None


def _check_verl(verl_config: DictConfig, is_elsewhere: bool, findings: Findings) -> None:
    """Ask verl's own validation. What it says of an engine that is missing here is no fault if it runs elsewhere."""
    try:
        validate(verl_config)
    except Exception as error:
        if is_elsewhere and "vllm version None" in str(error):
            findings.add(AREA, "note", "verl's validation asks for vllm, which is not installed here")
            return
        text = " ".join(str(error).split()) or type(error).__name__
        remedy = "set the keys that it names"
        if "full_key: critic.model" in text:
            remedy = f"set critic.model.path={verl_config.actor_rollout_ref.model.path}, or another model"
        findings.add(AREA, "error", f"verl refuses the configuration: {text}", remedy)
        return
    findings.add(AREA, "ok", "verl accepts the configuration")


def _composed(overrides: Sequence[str], primary: Primary, findings: Findings) -> DictConfig | None:
    """Return the configuration with everything resolved, as verl's entry point composes it."""
    try:
        with composing(primary.path):
            config = compose_run(overrides, primary.name, primary.folder)
    except (HydraException, OmegaConfBaseException) as error:
        remedy = "correct the override; keys that verl lacks need a + before them"
        findings.refusal(AREA, ValueError(str(error)), remedy)
        return None
    return config


def _lacks_values(verl_config: DictConfig, findings: Findings) -> bool:
    """Return whether the actor's mandatory keys lack values; elsewhere some matter only where they are switched on."""
    missing = sorted(OmegaConf.missing_keys(verl_config.actor_rollout_ref))
    for key in missing:
        remedy = f"set {key}" + ("=vllm" if key == "actor_rollout_ref.rollout.name" else "")
        findings.add(AREA, "error", f"{key} has no value, and verl has no default for it", remedy)
    return bool(missing)


def _has_wrong_sizes(verl_config: DictConfig, findings: Findings) -> bool:
    """Return whether a size leaves nothing to train on; say where the update's batches do not suit the ranks."""
    actor_rollout = verl_config.actor_rollout_ref
    of_data = ("data.train_batch_size", "data.max_prompt_length", "data.max_response_length")
    wrong = False
    for key in (*of_data, "actor_rollout_ref.rollout.n", "trainer.n_gpus_per_node", "trainer.nnodes"):
        value = OmegaConf.select(verl_config, key)
        if not isinstance(value, int) or value < 1:
            findings.add(AREA, "error", f"{key}={value}: must be a whole number from 1 on", f"set {key} to 1 or more")
            wrong = True
    if wrong:
        return True
    key, mini = "actor_rollout_ref.actor.ppo_mini_batch_size", actor_rollout.actor.ppo_mini_batch_size
    batch = verl_config.data.train_batch_size
    num_ranks = verl_config.trainer.n_gpus_per_node * verl_config.trainer.nnodes
    num_ranks = max(1, num_ranks // sequence_parallel(verl_config)[1])
    if actor_rollout.actor.strategy in ("fsdp", "fsdp2") and mini * actor_rollout.rollout.n % num_ranks:
        rows = f"{mini} x {actor_rollout.rollout.n} (actor_rollout_ref.rollout.n) rows"
        text = f"{key}={mini}: {rows} cannot be divided among {num_ranks} data-parallel ranks, so verl's update stops"
        findings.add(AREA, "error", text, f"set {key}={num_ranks * max(1, mini // num_ranks)}")
    elif mini > batch:
        text = f"{key}={mini} is more than data.train_batch_size={batch}: verl fills every update up with padding"
        findings.add(AREA, "warning", text, f"set {key}={batch}")
    return False


def _own_config(verl_config: DictConfig, findings: Findings) -> GradAlignConfig | None:
    """Return the `gradalign` block, or None with a finding if selection is off or the block is wrong."""
    remedy = "add +gradalign=cosine gradalign.validation.files=<file>"
    if OmegaConf.select(verl_config, "gradalign") is None:
        findings.add(AREA, "error", "selection is not switched on: there is no gradalign block", remedy)
        return None
    try:
        return read_config(verl_config)
    except Exception as error:
        findings.refusal(AREA, error)
        return None


@contextmanager
def _warnings_of_checks(findings: Findings) -> Iterator[None]:
    """Turn what the checks only log into findings, and keep it from the log."""

    def keep(record: logging.LogRecord) -> bool:
        findings.add(AREA, "warning", record.getMessage())
        return False

    names = ("advantages", "checks", "forecast_checks")
    loggers = [logging.getLogger(f"verl_gradalign.integration.{name}") for name in names]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def _check_machine(verl_config: DictConfig, machine: Machine, findings: Findings) -> bool:
    """Whether the devices, the rollout engine and the kernels that are asked for are here.

    Returns whether this is another machine than the one that trains, such as a login node: GPUs are asked for, and
    none is here. What is missing then says nothing.
    """
    trainer, rollout = verl_config.trainer, verl_config.actor_rollout_ref.rollout.name
    is_elsewhere = trainer.device != "cpu" and machine.num_gpus == 0
    if trainer.device == "cpu" and not asks_for_cpu():
        text = "trainer.device=cpu, but VERL_PLATFORM is not cpu: verl will look for GPUs"
        findings.add("hardware", "error", text, "run with VERL_PLATFORM=cpu in the environment")
    if is_elsewhere:
        text = f"trainer.device={trainer.device}, and no GPU is seen here"
        findings.add("hardware", "warning", text, "run this where training runs, or add +platform=cpu")
    elif trainer.device != "cpu" and trainer.n_gpus_per_node > machine.num_gpus:
        text = f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}, and {machine.num_gpus} GPUs are seen here"
        findings.add("hardware", "error", text, f"set trainer.n_gpus_per_node={machine.num_gpus}")
    if rollout in ("vllm", "sglang") and version_of(rollout) is None:
        text = f"actor_rollout_ref.rollout.name={rollout}, and {rollout} is not installed here"
        level, remedy = ("note", "") if is_elsewhere else ("error", f"pip install 'verl[{rollout}]'")
        if trainer.device == "cpu":
            remedy += ", or set actor_rollout_ref.rollout.name=hf"
        findings.add("environment", level, text, remedy)
    if rollout == "hf" and not asks_for_cpu():
        text = "actor_rollout_ref.rollout.name=hf is only there with VERL_PLATFORM=cpu"
        findings.add("environment", "error", text, "set VERL_PLATFORM=cpu, or actor_rollout_ref.rollout.name=vllm")
    if verl_config.actor_rollout_ref.model.use_remove_padding and version_of("flash-attn") is None:
        text = "actor_rollout_ref.model.use_remove_padding=True needs flash-attn, which is not installed here"
        remedy = "pip install flash-attn, or set actor_rollout_ref.model.use_remove_padding=False"
        findings.add("environment", "note" if is_elsewhere else "warning", text, "" if is_elsewhere else remedy)
    return is_elsewhere


def _check_logging(verl_config: DictConfig, findings: Findings) -> None:
    loggers = verl_config.trainer.logger
    if "wandb" not in ([loggers] if isinstance(loggers, str) else loggers):
        return
    mode = os.environ.get("WANDB_MODE", "").lower()
    if version_of("wandb") is None:
        return  # said among what is loaded by name
    if mode in ("offline", "disabled", "dryrun"):
        findings.add("logging", "note", f"WANDB_MODE={mode}: upload later with `wandb sync`")
    elif os.environ.get("WANDB_API_KEY") or _has_wandb_login():
        findings.add("logging", "ok", "wandb has a login")
    else:
        text = "trainer.logger names wandb, and there is no login: the run would ask for one, or stop"
        remedy = "wandb login, or WANDB_MODE=offline, or trainer.logger='[console,file]'"
        findings.add("logging", "warning", text, remedy)


def _has_wandb_login() -> bool:
    try:
        return "api.wandb.ai" in netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _check_folders(verl_config: DictConfig, findings: Findings) -> bool:
    """Whether checkpoints and log can be written. Returns whether what the run would go on from is in order."""
    for key in ("trainer.default_local_dir", "gradalign.log.dir"):
        folder = OmegaConf.select(verl_config, key)
        if folder is None:
            continue
        path = Path(str(folder)).expanduser().absolute()
        there = next(each for each in (path, *path.parents) if each.exists())
        try:
            # Asked by writing, as permissions say nothing of read-only mounts.
            with tempfile.TemporaryFile(dir=there):
                findings.add("folders", "ok", f"{key}={folder} can be written")
        except OSError as error:
            text = f"{key}={folder}: {there} cannot be written ({error.strerror})"
            findings.add("folders", "error", text, f"set {key} to another folder")
    num_errors = findings.num_errors
    with findings.refusals("folders", "set trainer.resume_mode=disable"):
        _check_resumed(verl_config, findings)
    return findings.num_errors == num_errors


def _check_resumed(verl_config: DictConfig, findings: Findings) -> None:
    """Whether the checkpoint that verl would go on from is there, and of so many ranks.

    Raises: ValueError that names the key.
    """
    trainer, key = verl_config.trainer, "trainer.resume_from_path"
    anew = "set trainer.resume_mode=disable to start anew"
    if trainer.resume_mode not in ("disable", "auto", "resume_path"):
        refuse("trainer.resume_mode", trainer.resume_mode, "unknown; known are disable, auto and resume_path", anew)
    if trainer.resume_mode == "resume_path":
        path = trainer.resume_from_path
        if not isinstance(path, str) or "global_step_" not in path:
            refuse(key, path, "verl wants the path of a folder global_step_<number>", f"name it, or {anew}")
        if not Path(path).is_dir():
            refuse(key, path, "no such folder", f"give the path of a checkpoint, or {anew}")
        if not path.split("global_step_")[-1].isdigit():
            refuse(key, path, "verl reads the step from what follows global_step_", "end the path there, without a /")
    tracker = Path(trainer.default_local_dir) / "latest_checkpointed_iteration.txt"
    if trainer.resume_mode == "auto" and tracker.exists():
        written = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if not written.isdigit():
            why = f"{tracker} holds {written[:40]!r}, which verl reads as the number of the newest checkpoint"
            refuse("trainer.resume_mode", "auto", why, f"write the number of a checkpoint into it, or {anew}")
        if not (tracker.parent / f"global_step_{written}").is_dir():
            text = f"{tracker} names global_step_{written}, which is not there: verl would start from scratch"
            findings.add("folders", "warning", text, f"write the number of a checkpoint into it, or {anew}")
    folder = resume_folder(verl_config)
    if folder is None:
        return
    findings.add("folders", "note", f"the run would go on from {folder}", anew)
    num_ranks = trainer.n_gpus_per_node * trainer.nnodes
    sizes = {path.name.split("_")[3] for path in (folder / "actor").glob("model_world_size_*_rank_*.pt")}
    if verl_config.actor_rollout_ref.actor.strategy in ("fsdp", "fsdp2") and sizes and str(num_ranks) not in sizes:
        why = f"{folder} was written by {', '.join(sorted(sizes))} ranks; verl resumes FSDP's weights on as many only"
        refuse("trainer.n_gpus_per_node", trainer.n_gpus_per_node, why, f"train on as many GPUs, or {anew}")
    if not (folder / "actor").is_dir():
        key, value = ("trainer.resume_mode", "auto") if trainer.resume_mode == "auto" else (key, folder)
        refuse(key, value, f"{folder} has no folder actor with the weights", f"give a whole checkpoint, or {anew}")


def _check_left(verl_config: DictConfig, config: GradAlignConfig, num_left: int, findings: Findings) -> None:
    """Whether what the length filter leaves lasts for the schedule, as the trainer asks once it has filtered."""
    chooses = score_of(config.score).rank is not None
    if config.schedule == "step" and not chooses:
        return
    with findings.refusals("data"):
        check_schedule(config, num_left, verl_config.data.train_batch_size, chooses=chooses)


def _check_steps(verl_config: DictConfig, config: GradAlignConfig, num_problems: int, findings: Findings) -> None:
    """Say how many steps the problems make, or that they make none."""
    trainer, batch = verl_config.trainer, verl_config.data.train_batch_size
    steps = total_steps(verl_config, num_problems)
    for key in ("total_training_steps", "total_epochs"):
        value = trainer[key]
        if value is not None and value < 1:
            findings.add("train files", "error", f"trainer.{key}={value}: no step is trained", f"set trainer.{key}=1")
            return
    if steps < 1:
        text = f"{num_problems} problems make no batch of data.train_batch_size={batch}"
        findings.add("train files", "error", text, "lower data.train_batch_size")
        return
    asked = "trainer.total_training_steps" if trainer.total_training_steps else f"{trainer.total_epochs} epochs"
    text = f"{num_problems} problems, {steps} steps of {batch} ({asked})"
    if config.schedule == "step" and score_of(config.score).rank is not None:
        text += f"; as candidates they are gone through {steps * batch * config.oversample / num_problems:.3g} times"
    if config.is_forecast:
        text += f"; {min(num_problems, math.ceil(batch * config.oversample))} are forecast in a step"
    findings.add("train files", "note", text)
