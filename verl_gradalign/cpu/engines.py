# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engines on a CPU. FSDP2 runs as it is; FSDP1 needs one check of torch out of its way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import _init_utils
from transformers import AutoModelForTokenClassification
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

CHECK = "_check_module_states_for_sync_module_states"


@contextmanager
def cpu_weights_may_be_synced() -> Iterator[None]:
    """Let FSDP1 broadcast weights that are on the CPU.

    verl builds FSDP1 with sync_module_states=True, which torch refuses for CPU weights because NCCL could not send
    them; gloo can. There is no argument for it. tests/unit/test_plugin.py fails when torch renames the check.
    """
    check = getattr(_init_utils, CHECK)
    setattr(_init_utils, CHECK, lambda states: None)
    try:
        yield
    finally:
        setattr(_init_utils, CHECK, check)


@contextmanager
def critics_need_no_flash_attention() -> Iterator[None]:
    """Let verl build a critic with torch's own attention.

    verl names flash attention, which no CPU has, as an argument where it loads a critic, whatever the configuration
    says. tests/unit/test_plugin.py fails when verl stops doing so.
    """
    original = AutoModelForTokenClassification.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "attn_implementation": "sdpa"})

    AutoModelForTokenClassification.from_pretrained = from_pretrained
    try:
        yield
    finally:
        AutoModelForTokenClassification.from_pretrained = original


class CpuFSDPEngineWithLMHead(FSDPEngineWithLMHead):
    """verl's policy engine."""

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        with cpu_weights_may_be_synced():
            return super()._build_fsdp_module(module)


class CpuFSDPEngineWithValueHead(FSDPEngineWithValueHead):
    """verl's critic engine."""

    def _build_module(self) -> torch.nn.Module:
        with critics_need_no_flash_attention():
            return super()._build_module()

    def _build_fsdp_module(self, module: torch.nn.Module) -> torch.nn.Module:
        with cpu_weights_may_be_synced():
            return super()._build_fsdp_module(module)
