# SPDX-License-Identifier: Apache-2.0
"""What verl loads by name, loaded: sampler, agent loops, tools, loggers, callbacks; and keys that nothing reads.

    examine_named(verl_config, findings)

Reward function and manager are loaded with the rewards.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from verl.experimental.agent_loop import agent_loop
from verl.tools.tool_registry import load_all_tools
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.dataset.rl_dataset import get_dataset_class
from verl.utils.import_utils import load_class_from_fqn, load_extern_object, resolve_config_path
from verl.utils.tracking import Tracking
from verl.workers.rollout.replica import RolloutReplicaRegistry

from verl_gradalign.errors import refuse
from verl_gradalign.findings import Findings

AREA = "loaded by name"
SAMPLER = "trainer.v1.sampler.custom_sampler"
AGENT = "actor_rollout_ref.rollout.agent"
MODULE_OF_LOGGER = {
    "wandb": "wandb",
    "tracking": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "vemlp_wandb": "volcengine_ml_platform",
    "tensorboard": "torch.utils.tensorboard",
    "clearml": "clearml",
    "trackio": "trackio",
    "rl_insight": "rl_insight",
}
"""What verl imports for a logger."""
LEGACY = {
    "custom_reward_function": "reward.custom_reward_function",
    "reward_model": "reward.reward_model, reward.reward_manager and reward.num_workers",
    "sandbox_fusion": "reward.sandbox_fusion",
}
"""Blocks that earlier versions of verl read, and what this one reads."""


def examine_named(verl_config: DictConfig, findings: Findings) -> bool:
    """Add findings on what cannot be loaded; return whether the data set's class, if it is the user's, can be."""
    num_errors = findings.num_errors
    with findings.refusals(AREA):
        _data_set(verl_config)
    has_data_set = findings.num_errors == num_errors
    checks = (_sampler, _agent_loops, _tools, _callback, _external_lib, _rollout, _loggers)
    for check in checks:
        with findings.refusals(AREA, "correct the name"):
            check(verl_config)
    _legacy(verl_config, findings)
    return has_data_set


def _loading(key: str, value: Any, load: Callable[[], Any], remedy: str) -> Any:
    """Return what `load` gives. Raises: ValueError that names key and value instead of what it raises."""
    try:
        return load()
    except Exception as error:
        cause = f" <- {type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else ""
        refuse(key, value, f"cannot be loaded ({type(error).__name__}: {error}{cause})", remedy)


def _data_set(verl_config: DictConfig) -> None:
    own: Any = verl_config.data.get("custom_cls") or {}
    if own.get("path"):
        remedy = "give path and name of a class derived from verl.utils.dataset.rl_dataset.RLHFDataset"
        load = partial(get_dataset_class, verl_config.data)
        _loading("data.custom_cls", f"{own['path']} {own.get('name')}", load, remedy)


def _sampler(verl_config: DictConfig) -> None:
    """As the trainer: a sampler of the user's must be derived from the one of the trainer mode."""
    sampler, mode = OmegaConf.select(verl_config, SAMPLER), verl_config.trainer.v1.trainer_mode
    trainer = _loading("trainer.v1.trainer_mode", mode, lambda: get_trainer_cls(mode), "set it to gradalign")
    own = getattr(trainer, "sampler_class", None)
    if own is None or not (sampler and sampler.get("path") and sampler.get("name")):
        return
    if (sampler.path, sampler.name) == (f"pkg://{own.__module__}", "GradAlignSampler"):  # what +gradalign= sets
        return
    key, shown = SAMPLER, f"{sampler.path} {sampler.name}"
    remedy = f"leave {SAMPLER}.path and .name out, or derive the class from {own.__module__}.{own.__name__}"
    loaded = _loading(key, shown, lambda: load_extern_object(sampler.path, sampler.name), remedy)
    if not (isinstance(loaded, type) and issubclass(loaded, own)):
        refuse(key, shown, f"trainer.v1.trainer_mode={mode} needs a {own.__name__}", remedy)


def _agent_loops(verl_config: DictConfig) -> None:
    agent = OmegaConf.select(verl_config, AGENT)
    if manager := agent.get("agent_loop_manager_class"):
        key, remedy = f"{AGENT}.agent_loop_manager_class", "give module.Class of a module that can be imported"
        _loading(key, manager, lambda: load_class_from_fqn(manager, "AgentLoopManager"), remedy)
    known = known_agent_loops(verl_config)
    if agent.default_agent_loop not in known:
        key, why = f"{AGENT}.default_agent_loop", f"no such agent loop; there are {', '.join(sorted(known))}"
        refuse(key, agent.default_agent_loop, why, f"set {key}=single_turn_agent, or name its file in {AGENT_FILE}")


AGENT_FILE = f"{AGENT}.agent_loop_config_path"


def known_agent_loops(verl_config: DictConfig) -> set[str]:
    """Return the names of verl's agent loops and the user's. Raises: ValueError if a class cannot be loaded."""
    known, path = set(agent_loop._agent_loop_registry), OmegaConf.select(verl_config, AGENT_FILE)
    if not path:
        return known
    remedy = "give a YAML list of entries with name and _target_"
    entries: Any = _loading(AGENT_FILE, path, lambda: list(OmegaConf.load(resolve_config_path(path))), remedy)
    for entry in entries:
        name = _loading(AGENT_FILE, path, partial(entry.__getitem__, "name"), remedy)
        _loading(AGENT_FILE, path, partial(get_object, entry.get("_target_")), f"correct _target_ of {name}")
        known.add(str(name))
    return known


def _tools(verl_config: DictConfig) -> None:
    for key in ("tool_config_path", "function_tool_path"):
        name = f"actor_rollout_ref.rollout.multi_turn.{key}"
        if path := OmegaConf.select(verl_config, name):
            file = _loading(name, path, partial(resolve_config_path, path), "give the path of an existing file")
            remedy = "give a file with the tools' definitions, as verl's examples have them"
            _loading(name, path, partial(load_all_tools, **{key: file}), remedy)


def _callback(verl_config: DictConfig) -> None:
    key = "trainer.checkpoint_callback_class"
    if name := OmegaConf.select(verl_config, key):
        _loading(key, name, lambda: load_class_from_fqn(name, key), "give module.Class, or leave it out")


def _external_lib(verl_config: DictConfig) -> None:
    key = "actor_rollout_ref.model.external_lib"
    value = OmegaConf.select(verl_config, key)
    for module in [value] if isinstance(value, str) else value or ():
        _loading(key, module, partial(importlib.import_module, module), "name a module that is installed")


def _rollout(verl_config: DictConfig) -> None:
    key = "actor_rollout_ref.rollout.name"
    name, known = OmegaConf.select(verl_config, key), sorted(RolloutReplicaRegistry._registry)
    # Without the CPU platform `hf` is refused with the remedy that is its own (`configuration._check_machine`).
    if name not in known and name != "hf":
        refuse(key, name, f"unknown; known are {', '.join(known)}", f"set {key}=vllm")


def _loggers(verl_config: DictConfig) -> None:
    value = verl_config.trainer.logger
    for name in [value] if isinstance(value, str) else value or ():
        if name not in (*Tracking.supported_backend, "tracking"):
            known = ", ".join(Tracking.supported_backend)
            refuse("trainer.logger", name, f"unknown; known are {known}", "set trainer.logger='[console,file]'")
        module = MODULE_OF_LOGGER.get(name)
        if module and not _is_there(module):
            package = "tensorboard" if name == "tensorboard" else module
            remedy = f"pip install {package}, or trainer.logger='[console,file]'"
            refuse("trainer.logger", name, f"{package} is not installed", remedy)
        if name == "vemlp_wandb":
            for variable in ("VOLC_ACCESS_KEY_ID", "VOLC_SECRET_ACCESS_KEY", "MLP_TRACKING_REGION"):
                if variable not in os.environ:
                    refuse("trainer.logger", name, f"{variable} is not set", f"set {variable} in the environment")


def _is_there(module: str) -> bool:
    if module == "torch.utils.tensorboard":
        module = "tensorboard"
    return importlib.util.find_spec(module) is not None


def _legacy(verl_config: DictConfig, findings: Findings) -> None:
    """Say which keys nothing reads: verl's trainer takes rewards from the block `reward` alone."""
    for block, instead in LEGACY.items():
        values = OmegaConf.select(verl_config, block)
        for key, value in _leaves(block, {} if values is None else OmegaConf.to_container(values, resolve=True)):
            text = f"{key}={value} is read by nothing: this version of verl reads {instead}"
            level = "error" if key == "custom_reward_function.path" else "warning"
            remedy = f"set reward.{key} instead" if block != "reward_model" else f"set the key of {instead}"
            if key == "reward_model.reward_manager":
                remedy = f"set reward.reward_manager.name={value} instead"
            findings.add("reward", level, text, remedy)


def _leaves(prefix: str, value: Any) -> list[tuple[str, Any]]:
    """Return every key below a block that has a value."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(f"{prefix}.{key}", item)]
    return [] if value is None else [(prefix, value)]
