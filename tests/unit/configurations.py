# SPDX-License-Identifier: Apache-2.0
"""verl's configuration as a launch composes it, changed key by key, and checked as the trainer does."""

import verl  # noqa: F401  (loads the plugin, which makes +gradalign known)
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf, open_dict

from verl_gradalign.integration.checks import check_verl_config, read_config


def composed_of(overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def change(verl_config, changes):
    with open_dict(verl_config):
        for key, value in changes.items():
            OmegaConf.update(verl_config, key, value, force_add=True)


def check(verl_config):
    check_verl_config(read_config(verl_config), verl_config)
