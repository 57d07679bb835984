# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engines on a CPU. FSDP2 runs as it is; FSDP1 needs one check of torch out of its way."""

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import _init_utils
from transformers import AutoModelForTokenClassification
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead


def cpu_weights_may_be_synced() -> AbstractContextManager[Any]:
    """Let FSDP1 broadcast weights that are on the CPU.

    verl builds FSDP1 with sync_module_states=True, which torch refuses for CPU weights because NCCL could not send
    them; gloo can. There is no argument for it. tests/unit/test_plugin.py fails when torch renames the check.
    """
    return patch.object(_init_utils, "_check_module_states_for_sync_module_states", lambda _: None)


def critics_need_no_flash_attention() -> AbstractContextManager[Any]:
    """Let verl build a critic with torch's own attention.

    verl names flash attention, which no CPU has, as an argument where it loads a critic, whatever the configuration
    says. tests/unit/test_plugin.py fails when verl stops doing so.
    """
    original = AutoModelForTokenClassification.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "attn_implementation": "sdpa"})

    return patch.object(AutoModelForTokenClassification, "from_pretrained", from_pretrained)


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
