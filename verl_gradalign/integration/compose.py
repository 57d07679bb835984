# SPDX-License-Identifier: Apache-2.0
"""verl's configuration from overrides, as `python -m verl.trainer.main_ppo` composes it.

with composing():
    config = validate(compose_run(["+gradalign=cosine", ...]))
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device


def composing() -> AbstractContextManager[Any]:
    """Return a context in which verl's configuration files are found."""
    context: AbstractContextManager[Any] = initialize_config_module("verl.trainer.config", version_base=None)
    return context


def compose_run(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration of a run, with everything resolved, not yet validated by verl.

    Raises: HydraException or OmegaConfBaseException for overrides that do not compose.
    """
    config = compose("ppo_trainer", overrides=list(overrides))
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
