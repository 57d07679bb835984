# SPDX-License-Identifier: Apache-2.0
"""verl's FSDP engines on gloo, in float64 too, and their training steps.

engine = build_engine(root, Setup("fsdp2"))
train(engine, step=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

from tests.distributed.setups import LEARNING_RATE, LORA, STRATEGIES, TRAINED, ULYSSES, Setup, randomise_adapters
from tests.numerics.problems import TEMPERATURE, make_float64
from verl_gradalign.cpu.engines import CpuFSDPEngineWithLMHead
from verl_gradalign.integration.engine import COEFFICIENTS, coefficient_loss
from verl_gradalign.types import TokenRow

BATCHINGS = {
    True: {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2},
    False: {"use_dynamic_bsz": True, "max_token_len_per_gpu": 40},
}
"""Whether batches have a fixed number of rows -> fields of verl's FSDPEngineConfig."""


class Float64Engine(CpuFSDPEngineWithLMHead):
    """verl's engine with a float64 model, which its configuration has no name for."""

    def _build_module(self) -> nn.Module:
        return make_float64(super()._build_module())

    def _build_lora_module(self, module: nn.Module) -> nn.Module:
        module = super()._build_lora_module(module).double()
        randomise_adapters(module)
        return module


def build_engine(root: Path, setup: Setup) -> CpuFSDPEngineWithLMHead:
    """Return a new engine as a worker builds it, on the model in `root`."""
    is_float64 = setup.dtype == "fp64"
    reduce_dtype = setup.dtype if is_float64 else "fp32"
    options = {**STRATEGIES[setup.strategy], **BATCHINGS[setup.has_fixed_batches]}
    if setup.is_kept:
        options["reshard_after_forward"] = False
    adapters = {"lora_rank": LORA["r"], "lora_alpha": LORA["lora_alpha"], "target_modules": LORA["target_modules"]}
    adapters["exclude_modules"] = setup.excluded
    engine = (Float64Engine if is_float64 else CpuFSDPEngineWithLMHead)(
        model_config=HFModelConfig(
            path=str(root / setup.model),
            load_tokenizer=False,
            override_config={"attn_implementation": "sdpa" if setup.num_slices == 1 else ULYSSES},
            enable_gradient_checkpointing=setup.is_checkpointed,
            use_remove_padding=setup.is_packed,
            use_fused_kernels=setup.is_fused,
            fused_kernel_options={"impl_backend": "torch"},
            **(adapters if setup.has_adapters else {}),
        ),
        engine_config=FSDPEngineConfig(
            use_remove_padding=setup.is_packed,
            use_fused_kernels=setup.is_fused,
            use_torch_compile=False,
            ulysses_sequence_parallel_size=setup.num_slices,
            param_offload=setup.is_offloaded,
            fsdp_size=1 if setup.is_replicated else -1,
            use_no_sync_for_gradient_accumulation=setup.defers_sync,
            mixed_precision={"param_dtype": setup.dtype, "reduce_dtype": reduce_dtype, "buffer_dtype": reduce_dtype},
            **options,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=LEARNING_RATE, total_training_steps=20),
        checkpoint_config=CheckpointConfig(),
    )
    # Only the name of the dtype is replaced; wrapping, sharding and reduction are verl's.
    names = mock.patch.object(PrecisionType, "to_dtype", return_value=torch.float64) if is_float64 else nullcontext()
    with names:
        engine.initialize()
    if is_float64:
        engine._autocast_dtype = torch.float32  # verl's sign for "no autocast"
    return engine


def make_row_table(responses: Sequence[TokenRow]) -> TensorDict:
    """Return the responses as verl's workers receive them."""

    def nest(parts: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(parts, layout=torch.jagged)

    mask = [torch.ones_like(response.response) for response in responses]
    fields = {
        "input_ids": nest([torch.cat([response.prompt, response.response]) for response in responses]),
        "position_ids": nest([torch.arange(response.num_tokens) for response in responses]),
        "prompts": nest([response.prompt for response in responses]),
        "responses": nest([response.response for response in responses]),
        "response_mask": nest(mask),
        "loss_mask": nest(mask),
        COEFFICIENTS: nest([response.coefficient for response in responses]),
    }
    return TensorDict(fields, batch_size=len(responses))


def train_data(engine: CpuFSDPEngineWithLMHead, step: int) -> TensorDict:
    """Return this rank's share of a training step's rows."""
    config = engine.engine_config
    rows = make_row_table(TRAINED[step][engine.get_data_parallel_rank() :: engine.get_data_parallel_size()])
    tu.assign_non_tensor(
        rows,
        temperature=TEMPERATURE,
        use_remove_padding=config.use_remove_padding,
        use_fused_kernels=False,
        use_dynamic_bsz=config.use_dynamic_bsz,
        max_token_len_per_gpu=config.max_token_len_per_gpu,
        # Two micro-batches, so that gradients are accumulated.
        micro_batch_size_per_gpu=len(rows) // 2,
    )
    return rows


def train(engine: CpuFSDPEngineWithLMHead, step: int) -> None:
    with engine.train_mode():
        engine.train_batch(train_data(engine, step), coefficient_loss)


def accumulate(engine: CpuFSDPEngineWithLMHead, step: int) -> None:
    """Run a training pass and keep its gradient."""
    with engine.train_mode(zero_grad_on_exit=False):
        engine.forward_backward_batch(train_data(engine, step), coefficient_loss)


def infer(engine: CpuFSDPEngineWithLMHead) -> None:
    """Compute log-probs as verl does before an update."""
    with engine.eval_mode():
        engine.infer_batch(train_data(engine, step=0))


def finish_step(engine: CpuFSDPEngineWithLMHead) -> None:
    with engine.train_mode():
        engine.optimizer_step()


def train_without_clipping(engine: CpuFSDPEngineWithLMHead, step: int) -> None:
    """Take a step in float64, in which FSDP1 cannot clip."""
    accumulate(engine, step)
    engine.optimizer.step()
    engine.optimizer.zero_grad()
