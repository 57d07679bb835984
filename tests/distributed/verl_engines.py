# SPDX-License-Identifier: Apache-2.0
"""verl's real FSDP engine around a float64 model, and the row tables it takes.

verl's configuration cannot name float64, so the module is wrapped here, as `_build_fsdp_module` does, without mixed
precision; micro-batching, forward, gradient synchronisation, optimizer and offloading are verl's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from transformers import PreTrainedModel
from verl.trainer.config import CheckpointConfig
from verl.utils.fsdp_utils import apply_fsdp2, get_fsdp_wrap_policy
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.fsdp.utils import get_sharding_strategy

from tests.distributed.problems import build_problems
from tests.numerics.float64_model import build_float64_model
from verl_gradalign.integration.engine import COEFFICIENTS
from verl_gradalign.types import ProblemRows


@dataclass(frozen=True)
class Case:
    """One way to run verl's engine."""

    strategy: str = "fsdp2"
    use_orig_params: bool = False
    checkpointing: bool = True
    architecture: str = "qwen2"
    tied: bool = True
    use_dynamic_bsz: bool = True
    max_token_len: int = 24
    micro_batch_size: int = 2
    use_remove_padding: bool = False
    reshard_after_forward: bool = True
    defers_sync: bool = True
    fsdp_size: int = -1
    param_offload: bool = False
    dtype: torch.dtype = torch.float64


def build_engine(case: Case, model_path: str) -> FSDPEngineWithLMHead:
    """Return an engine with module, AdamW and schedule; `model_path` only supplies a configuration."""
    model = build_float64_model(case.architecture, case.tied)
    model.to(case.dtype).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = FSDPEngineWithLMHead(
        model_config=HFModelConfig(
            path=model_path,
            load_tokenizer=False,
            override_config={"attn_implementation": "sdpa"},
            use_remove_padding=case.use_remove_padding,
            enable_gradient_checkpointing=case.checkpointing,
        ),
        engine_config=FSDPEngineConfig(
            strategy=case.strategy,
            use_orig_params=case.use_orig_params,
            use_dynamic_bsz=case.use_dynamic_bsz,
            max_token_len_per_gpu=case.max_token_len,
            micro_batch_size_per_gpu=case.micro_batch_size,
            use_remove_padding=case.use_remove_padding,
            reshard_after_forward=case.reshard_after_forward,
            use_no_sync_for_gradient_accumulation=case.defers_sync,
            fsdp_size=case.fsdp_size,
            param_offload=case.param_offload,
            use_torch_compile=False,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )
    engine.module = _wrap(model, engine, case)
    engine.optimizer = engine._build_optimizer(engine.module)
    engine.lr_scheduler = engine._build_lr_scheduler(engine.optimizer)
    engine._autocast_dtype = torch.float32  # verl's word for "no autocast"
    return engine


def _wrap(model: PreTrainedModel, engine: FSDPEngineWithLMHead, case: Case) -> torch.nn.Module:
    if case.strategy == "fsdp":
        return FullyShardedDataParallel(
            model,
            auto_wrap_policy=get_fsdp_wrap_policy(model, config=engine.engine_config.wrap_policy),
            sharding_strategy=get_sharding_strategy(engine.device_mesh, case.reshard_after_forward),
            device_id=torch.device("cpu"),
            device_mesh=engine.device_mesh,
            use_orig_params=case.use_orig_params,
        )
    options = {
        "mesh": engine.device_mesh,
        "mp_policy": MixedPrecisionPolicy(),
        "reshard_after_forward": case.reshard_after_forward,
    }
    apply_fsdp2(model, options, engine.engine_config)
    return model


def nested(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


def row_table() -> tuple[TensorDict, list[ProblemRows]]:
    """Return this rank's rows, the spare row last, and the problems. Responses are dealt to ranks in turn."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    responses, problems = [], []
    for index, problem in enumerate(build_problems()):
        mine = problem[(rank + index) % world_size :: world_size]
        problems.append(
            ProblemRows(
                uid=f"p{index}",
                rows=tuple(range(len(responses), len(responses) + len(mine))),
                num_rows=len(problem),
                num_tokens=sum(len(r.prompt) + len(r.response) for r in problem),
            )
        )
        responses += mine
    # A spare row that would not go unnoticed if its coefficients were used.
    responses.append(replace(build_problems()[0][0], coefficient=torch.full((3,), 1e3, dtype=torch.float64)))
    sequences = [torch.cat([r.prompt, r.response]) for r in responses]
    fields = {
        "input_ids": nested(sequences),
        "position_ids": nested([torch.arange(len(sequence)) for sequence in sequences]),
        "prompts": nested([r.prompt for r in responses]),
        "responses": nested([r.response for r in responses]),
        "response_mask": nested([torch.ones_like(r.response) for r in responses]),
        "loss_mask": nested([torch.ones_like(r.response) for r in responses]),
        COEFFICIENTS: nested([r.coefficient for r in responses]),
    }
    return TensorDict(fields, batch_size=len(responses)), problems
