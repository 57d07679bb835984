# SPDX-License-Identifier: Apache-2.0
"""verl's configuration from overrides, as `python -m verl.trainer.main_ppo` composes it.

with composing():
    config = validate(compose_run(["+gradalign=cosine", ...]))
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import verl.trainer
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

PRIMARY, FOLDER = "ppo_trainer", "config"
"""verl's own configuration, as its entry point names it."""


def composing(path: str = FOLDER) -> AbstractContextManager[Any]:
    """Return a context in which the configuration files of a folder are found, verl's unless told otherwise.

    `path` is what Hydra's --config-path takes: absolute, from the folder of verl's entry point on, or pkg://module.
    """
    module = path.removeprefix("pkg://").replace("/", ".") if path.startswith("pkg://") else None
    folder = Path(verl.trainer.__file__ or "").parent / path
    if path == FOLDER:
        module = "verl.trainer.config"
    context: AbstractContextManager[Any]
    if module is not None:
        context = initialize_config_module(module, version_base=None)
    else:
        context = initialize_config_dir(str(folder.resolve()), version_base=None)
    return context


def compose_run(overrides: Sequence[str], name: str = PRIMARY, folder: str | None = None) -> DictConfig:
    """Return the configuration of a run, with everything resolved, not yet validated by verl.

    `name` and `folder` are what Hydra's --config-name and --config-dir take.
    Raises: HydraException or OmegaConfBaseException for overrides that do not compose.
    """
    searched = [f"hydra.searchpath=[file://{Path(folder).absolute()}]"] if folder else []
    config = compose(name, overrides=[*overrides, *searched])
    if config.trainer.device != "cpu":  # which verl leaves alone only where VERL_PLATFORM=cpu
        auto_set_device(config)
    with open_dict(config):
        config.transfer_queue.enable = True
    # Now, as a part that is given on is looked up in another configuration later.
    OmegaConf.resolve(config)
    return config


def validate(config: DictConfig) -> DictConfig:
    """Return the configuration once verl accepts it. Raises what verl raises."""
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    return config
