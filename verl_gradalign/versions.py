# SPDX-License-Identifier: Apache-2.0
"""Versions of installed packages, without loading them."""

import importlib.metadata

NOTED_PACKAGES = ("verl", "verl-gradalign", "torch", "transformers", "ray", "TransferQueue", "numpy", "vllm", "sglang")


def version_of(package: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that a run notes, of those that are installed."""
    return {package: version for package in NOTED_PACKAGES if (version := version_of(package)) is not None}
