# SPDX-License-Identifier: Apache-2.0
"""What a run is: the configuration it was given and the versions it runs on, for the selection log's metadata."""

from __future__ import annotations

import importlib.metadata
from datetime import datetime, timezone
from typing import Any

from omegaconf import DictConfig, OmegaConf

__all__ = ["PACKAGES", "about_run", "installed_versions"]

PACKAGES = ("verl", "verl-gradalign", "torch", "transformers", "ray", "TransferQueue", "numpy", "vllm", "sglang")


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def about_run(verl_config: DictConfig) -> dict[str, Any]:
    """Return the versions, verl's whole configuration, resolved, and the time."""
    return {
        "versions": installed_versions(),
        "config": OmegaConf.to_container(verl_config, resolve=True),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
