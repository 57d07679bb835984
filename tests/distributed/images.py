# SPDX-License-Identifier: Apache-2.0
"""Rows with images, as verl's agent loop makes them, scored on tiny vision-language models in verl's FSDP2 engine.

The reference is verl's own pass over rows that this package has not touched, with a loss written here.

Shape legend: R rows, T response tokens, L tokens of a row.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tensordict import NonTensorStack, TensorDict
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding

from tests.distributed.engines import build_engine
from tests.distributed.scoring import report
from tests.distributed.setups import WIDE, Setup
from tests.numerics.problems import TEMPERATURE
from verl_gradalign.cpu.engines import CpuFSDPEngineWithLMHead
from verl_gradalign.integration import engine as engine_module
from verl_gradalign.integration.engine import COEFFICIENTS, VerlEngine, scoring_mode
from verl_gradalign.probe.audit import audited_scores
from verl_gradalign.probe.direction import Direction, compute_direction
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.types import ProblemRows

IMAGE, VIDEO, IMAGE_BEGINS, IMAGE_ENDS, NUM_WORDS = 60, 61, 62, 63, 50
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 1.0,
    },
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
PATCH_SIZE = 3 * 2 * 2 * 2
MODELS = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, {}, {"deepstack_visual_indexes": [0]}),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration, LINEAR_ATTENTION, {}),
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_BEGINS,
    "vision_end_token_id": IMAGE_ENDS,
    "tie_word_embeddings": False,
}
# Width of each row's image (0: none) and length of its response; two rows a problem.
PROBLEMS = {"trusted": ((1, 4), (2, 3)), "c0": ((1, 6), (1, 2)), "c1": ((2, 5), (0, 4)), "c2": ((0, 3), (0, 5))}


def build_vision_model(name: str) -> PreTrainedModel:
    """Return a tiny model with random weights, large enough that images matter."""
    config_class, model_class, text, vision = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class(text_config={**TEXT, **text}, vision_config={**VISION, **vision}, **TOKENS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2 if parameter.dim() > 1 else 0.1)
    return model


def make_rows(model: PreTrainedModel) -> dict[str, list[dict[str, Any]]]:
    """Return each problem's rows, as the fields that verl's agent loop puts into TransferQueue."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, shapes in PROBLEMS.items():
        draws = torch.Generator().manual_seed(len(rows))
        advantages = torch.randn(2, generator=draws, dtype=torch.float32)
        rows[name] = [make_row(model, *shape, a, draws) for shape, a in zip(shapes, advantages, strict=True)]
    return rows


def make_row(
    model: PreTrainedModel, image_width: int, num_tokens: int, advantage: Tensor, draws: torch.Generator
) -> dict[str, Any]:
    words = torch.randint(1, NUM_WORDS, (3 + num_tokens,), generator=draws)
    prompt, response, images = words[:3], words[3:], {}
    if image_width:
        grid = torch.tensor([[1, 4, 4 * image_width]])
        place_holders = torch.full((int(grid.prod()) // 4,), IMAGE)
        prompt = torch.cat([words[:2], torch.tensor([IMAGE_BEGINS]), place_holders, torch.tensor([IMAGE_ENDS, 7])])
        pixels = torch.randn(int(grid.prod()), PATCH_SIZE, generator=draws, dtype=torch.float32)
        images = {"pixel_values": pixels, "image_grid_thw": grid}
    ids = torch.cat([prompt, response])
    mask, coefficient = torch.ones_like(response), advantage.expand(num_tokens).clone()
    return {
        "prompts": prompt,
        "responses": response,
        "response_mask": mask,
        "loss_mask": mask,
        "input_ids": ids,
        "position_ids": positions(model, ids, images.get("image_grid_thw")),
        "multi_modal_inputs": images,
        COEFFICIENTS: coefficient,
        "advantage": coefficient,  # for the reference, which knows nothing of the other name
        "raw_prompt": "what is to be seen?",
    }


def table_of(rows: list[dict[str, Any]]) -> TensorDict:
    """Return the rows as TransferQueue hands them out: every tensor ragged, everything else a stack."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return TensorDict(
        {
            name: torch.nested.as_nested_tensor(parts, layout=torch.jagged)
            if isinstance(parts[0], Tensor)
            else NonTensorStack(*parts)
            for name, parts in columns.items()
        },
        batch_size=len(rows),
    )


def positions(model: PreTrainedModel, ids_L: Tensor, grid: Tensor | None) -> Tensor:
    """Return (4, L): the text's positions, and the three axes of the model's own."""
    of_images = {"mm_token_type_ids": (ids_L == IMAGE).int()[None], "image_grid_thw": grid}
    known = inspect.signature(model.model.get_rope_index).parameters
    axes_31L, _ = model.model.get_rope_index(
        ids_L[None],
        attention_mask=torch.ones_like(ids_L)[None],
        **{name: value for name, value in of_images.items() if name in known},
    )
    return torch.cat([torch.arange(len(ids_L))[None], axes_31L[:, 0]])


def measure_images(root: Path, name: str, part: str) -> dict[str, Any]:
    """Return what verl's own pass and the estimators make of the rows; `part`: whole, text (LoRA), or all (LoRA)."""
    folder = f"{name}-{part}-{dist.get_world_size()}"
    if dist.get_rank() == 0:
        build_vision_model(name).save_pretrained(root / folder)
    dist.barrier()
    excluded = ".*visual.*" if part == "text" else None
    # In float32: both models normalise in it, whatever they are given.
    engine = build_engine(
        root, Setup("fsdp2", model=folder, has_adapters=part != "whole", excluded=excluded, dtype="fp32")
    )
    try:
        ESTIMATORS["ghost"](None).check(engine.module)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    if part == "all":
        return {"refusal": refusal}
    rows = make_rows(build_vision_model(name))
    measured: dict[str, Any] = {"refusal": refusal, "reference": reference(engine, rows)}
    for estimator in ("backward", "finite_difference", *(() if refusal else ("ghost",))):
        measured[estimator] = report(scores_of(engine, rows, estimator))
    if not refusal:
        measured["canary"] = canary(engine, rows)
        with mock.patch.object(engine_module, "MODEL_INPUTS", ("input_ids", "position_ids")):
            measured["blind_canary"] = canary(engine, rows)
    return measured


def canary(engine: CpuFSDPEngineWithLMHead, rows: dict[str, list[dict[str, Any]]]) -> float:
    """Return the error of ghost's scores that verl's own pass over the same rows finds."""
    with scored(engine, rows, "ghost") as (on_rank, candidates, direction):
        scores = audited_scores(on_rank, candidates, direction, ESTIMATORS["ghost"](), audited=(0, 1))
    return scores.diagnostics["canary/relative_error"]


def reference(engine: CpuFSDPEngineWithLMHead, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return norms and dot products of the problems' gradients, from verl's own pass over rows that are its own."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    gradients = {}
    for name, mine in rows.items():
        data = table_of(mine[rank::world_size])
        settings = {"use_remove_padding": False, "use_fused_kernels": False, "use_dynamic_bsz": True}
        tu.assign_non_tensor(data, temperature=TEMPERATURE, max_token_len_per_gpu=WIDE, **settings)
        with engine.train_mode(zero_grad_on_exit=False):
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(data, ratio_loss)
        parts = {n: p.grad.full_tensor().flatten() for n, p in engine.module.named_parameters() if p.grad is not None}
        gradients[name] = torch.cat(list(parts.values()))
        in_vision = [part for n, part in parts.items() if "visual" in n]
        engine.optimizer_zero_grad()
    direction = gradients.pop("trusted")
    return {
        "dot": [(g @ direction / direction.norm()).item() for g in gradients.values()],
        "norm": [g.norm().item() for g in gradients.values()],
        "direction_norm": direction.norm().item(),
        "has_vision": bool(in_vision),
    }


def ratio_loss(model_output: dict[str, Any], data: TensorDict, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """Return sum of advantage times ratio, whose gradient is that of the policy at ratio 1."""
    log_prob_RT = no_padding_2_padding(model_output["log_probs"], data)
    advantage_RT = data["advantage"].to_padded_tensor(0.0)
    return (advantage_RT * (log_prob_RT - log_prob_RT.detach()).exp()).sum() * data["dp_size"], {}


def scores_of(engine: CpuFSDPEngineWithLMHead, rows: dict[str, list[dict[str, Any]]], estimator: str) -> Any:
    """Return the scores of the candidates along the trusted problem's gradient."""
    with scored(engine, rows, estimator) as (on_rank, candidates, direction):
        return ESTIMATORS[estimator](None).score(on_rank, candidates, direction)


@contextmanager
def scored(
    engine: CpuFSDPEngineWithLMHead, rows: dict[str, list[dict[str, Any]]], estimator: str
) -> Iterator[tuple[VerlEngine, list[ProblemRows], Direction]]:
    """Yield the engine in scoring mode, the candidates as dealt by the trainer, and the trusted gradient."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    table: list[dict[str, Any]] = []
    problems = {}
    for place, (name, of_problem) in enumerate(rows.items()):
        is_whole = ESTIMATORS[estimator].needs_whole_problems and name != "trusted"
        mine = of_problem[rank::world_size] if not is_whole else of_problem if place % world_size == rank else []
        lengths = [len(row["input_ids"]) for row in of_problem]
        places = tuple(range(len(table), len(table) + len(mine)))
        problems[name] = ProblemRows(name, places, len(of_problem), sum(lengths), max(lengths))
        table += mine
    # As the rows reach a worker: the transport forgets which dimension of the positions is the ragged one.
    sent: TensorDict = pickle.loads(pickle.dumps(table_of([*table, rows["c2"][0]])))
    with scoring_mode(engine):
        rows_of_rank = VerlEngine(engine, sent, TEMPERATURE, TokenBudget(WIDE, is_padded=True))
        direction = compute_direction(rows_of_rank, [problems.pop("trusted")])
        yield rows_of_rank, list(problems.values()), direction
