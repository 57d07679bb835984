# SPDX-License-Identifier: Apache-2.0
"""The rows that measured updates train on, and what each must contribute: by plain autograd in float64, row by row.

Unsharded, unpadded, the PPO loss written out. No verl in here.

Shape legend: R rows, T response tokens, V vocabulary, G all trainable numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed.setups import TRUSTED, Setup
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, VOCABULARY

LEARNING_RATE = 0.05
"""Of plain gradient descent: Adam would divide rounding by rounding where a gradient vanishes."""
MAX_NORM = 1.0
SHUFFLE_SEED = 3
"""Of verl's shuffle of a rank's rows, to which it adds the rank."""
CLIP_RATIO, DUAL_CLIP = 0.2, 3.0


@dataclass(frozen=True)
class Row:
    """One response as verl's update receives it."""

    prompt: Tensor
    response: Tensor
    mask_T: Tensor
    advantage: float
    old_log_prob_T: Tensor
    ref_log_prob_T: Tensor


@dataclass(frozen=True)
class Update:
    """What verl's update is asked for."""

    loss: Mapping[str, Any] = field(default_factory=dict)
    """Fields of verl's ActorConfig."""
    num_mini_batches: int = 1
    epochs: int = 1
    shuffles: bool = False

    @property
    def takes_entropy(self) -> bool:
        return self.loss.get("entropy_coeff", 0) != 0


UPDATES = {
    "plain": Update(),
    "kl": Update({"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k3"}),
    "entropy": Update({"entropy_coeff": 0.2}),
    "mini-batches": Update(num_mini_batches=2),
    "epochs": Update({"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k3"}, num_mini_batches=2, epochs=2),
    "shuffled": Update(num_mini_batches=2, shuffles=True),
    "sequences": Update({"loss_agg_mode": "seq-mean-token-mean"}),
}
LENGTHS = ((3, 6, 2, 5), (4, 1, 7, 3), (5, 5, 2, 8), (1, 4, 3, 6))
OFF_POLICY, WITHOUT_ADVANTAGE, HOLED = (5, 12), (6,), (3, 10)
"""Rows that another policy sampled, rows whose advantage is zero, and rows with a token that is not the policy's."""


def draw_rows(model: nn.Module) -> list[Row]:
    """Return four problems of four rows each, sampled by `model` as far as its log-probs say."""
    generator = torch.Generator().manual_seed(7)
    rows: list[Row] = []
    for problem, lengths in enumerate(LENGTHS):
        prompt = torch.randint(VOCABULARY, (2 + problem,), generator=generator)
        for length in lengths:
            response, place = torch.randint(VOCABULARY, (length,), generator=generator), len(rows)
            mask_T = torch.ones(length, dtype=torch.int64)
            if place in HOLED:
                mask_T[1] = 0
            with torch.no_grad():
                log_prob_T, _ = response_log_probs(model, prompt, response)
            noise_2T = torch.randn(2, length, generator=generator, dtype=torch.float64)
            old_log_prob_T = log_prob_T + (0.3 * noise_2T[0] if place in OFF_POLICY else 0.0)
            advantage = torch.randn(1, generator=generator, dtype=torch.float64).item()
            advantage = 0.0 if place in WITHOUT_ADVANTAGE else 2 * advantage
            rows.append(Row(prompt, response, mask_T, advantage, old_log_prob_T, log_prob_T + 0.2 * noise_2T[1]))
    return rows


def response_log_probs(model: nn.Module, prompt: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each response token, and the entropy of what it was drawn from, (tokens,) each."""
    ids = torch.cat([prompt, response])
    logits_TV = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
    log_prob_TV = logits_TV.log_softmax(dim=-1)
    chosen_T = log_prob_TV.gather(-1, response.unsqueeze(-1)).squeeze(-1)
    return chosen_T, -(log_prob_TV.exp() * log_prob_TV).sum(dim=-1)


def row_loss(row: Row, update: Update, log_prob_T: Tensor, entropy_T: Tensor, batch: Sequence[Row]) -> Tensor:
    """Return the row's part of its mini-batch's loss."""
    ratio_T = (log_prob_T - row.old_log_prob_T).exp()
    advantage = row.advantage
    loss_T = torch.maximum(-advantage * ratio_T, -advantage * ratio_T.clamp(1 - CLIP_RATIO, 1 + CLIP_RATIO))
    if advantage < 0:
        loss_T = torch.clamp(loss_T, max=-advantage * DUAL_CLIP)
    loss_T = loss_T - update.loss.get("entropy_coeff", 0) * entropy_T
    if update.loss.get("use_kl_loss"):
        gap_T = row.ref_log_prob_T - log_prob_T
        loss_T = loss_T + update.loss["kl_loss_coef"] * (gap_T.exp() - gap_T - 1)
    mask_T = row.mask_T.double()
    if update.loss.get("loss_agg_mode") == "seq-mean-token-mean":
        return (loss_T * mask_T).sum() / mask_T.sum() / len(batch)
    return (loss_T * mask_T).sum() / sum(int(each.mask_T.sum()) for each in batch)


def expected_update(model: nn.Module, update: Update, order: Sequence[Sequence[int]], clips: bool) -> dict[str, Any]:
    """Return what each row contributes, and its derivative where its tokens have one coefficient, else nan.

    `order` holds the rows of each mini-batch, of all epochs. `model` is moved as the update moves it.
    """
    direction_G = torch.stack(problem_gradients_float64(model, TRUSTED, TEMPERATURE)).sum(dim=0)
    direction_G = direction_G / direction_G.norm()
    rows = draw_rows(model)
    contribution, derivative = [math.nan] * len(rows), [math.nan] * len(rows)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for members in order:
        batch, total_G = [rows[index] for index in members], torch.zeros_like(direction_G)
        for index, row in zip(members, batch, strict=True):
            log_prob_T, entropy_T = response_log_probs(model, row.prompt, row.response)
            loss = row_loss(row, update, log_prob_T, entropy_T, batch)
            grad_G = _flat(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True), leaves)
            total_G += grad_G
            if not math.isnan(contribution[index]):
                continue
            contribution[index] = (grad_G @ direction_G).item()
            plain = (log_prob_T * row.mask_T).sum()
            if _has_one_coefficient(row, update, log_prob_T, entropy_T, batch):
                grad_G = _flat(torch.autograd.grad(plain, leaves, allow_unused=True), leaves)
                derivative[index] = (grad_G @ direction_G).item()
        scale = min(1.0, MAX_NORM / (total_G.norm().item() + 1e-6)) if clips else 1.0
        with torch.no_grad():
            for leaf, part in zip(leaves, total_G.split([leaf.numel() for leaf in leaves]), strict=True):
                leaf -= LEARNING_RATE * scale * part.view_as(leaf)
    return {"contribution": contribution, "derivative": derivative}


def _has_one_coefficient(row: Row, update: Update, log_prob_T: Tensor, entropy_T: Tensor, batch: Sequence[Row]) -> bool:
    leaf_T = log_prob_T.detach().requires_grad_()
    coefficient_T = torch.autograd.grad(row_loss(row, update, leaf_T, entropy_T.detach(), batch), leaf_T)[0]
    chosen = coefficient_T[row.mask_T.bool()]
    is_one = bool((chosen - chosen.mean()).abs().max() <= 1e-3 * chosen.mean().abs()) and bool(chosen.mean() != 0)
    return is_one and not update.takes_entropy


def _flat(grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> Tensor:
    pairs = zip(grads, leaves, strict=True)
    return torch.cat([torch.zeros(leaf.numel()).double() if g is None else g.flatten() for g, leaf in pairs])


def update_setups(world_size: int) -> dict[str, tuple[Setup, str]]:
    """Return engines and updates: every strategy, batching, kind of model and term of the loss occurs."""
    packed = {"is_packed": True}
    cases = {
        "fsdp2-padded-kl": (Setup("fsdp2", "qwen2"), "kl"),
        "fsdp2-packed-entropy-checkpointed": (Setup("fsdp2", "qwen2", is_checkpointed=True, **packed), "entropy"),
        "fsdp2-packed-mini-batches": (Setup("fsdp2", "qwen3", has_fixed_batches=True, **packed), "mini-batches"),
        "fsdp2-padded-epochs": (Setup("fsdp2", "qwen3", has_fixed_batches=True, is_checkpointed=True), "epochs"),
        "fsdp2-packed-shuffled": (Setup("fsdp2", "qwen2", defers_sync=False, **packed), "shuffled"),
        "fsdp2-padded-sequences-offloaded": (Setup("fsdp2", "qwen2", is_offloaded=True), "sequences"),
        "fsdp2-packed-adapters": (Setup("fsdp2", "qwen2", has_adapters=True, is_checkpointed=True, **packed), "plain"),
        "fsdp-packed-kl-checkpointed": (Setup("fsdp", "qwen3", is_checkpointed=True, **packed), "kl"),
        "fsdp-padded-mini-batches": (Setup("fsdp", "qwen2", has_fixed_batches=True), "mini-batches"),
        "fsdp-adapters": (Setup("fsdp", "qwen2", has_adapters=True), "mini-batches"),
        "fsdp-offloaded": (Setup("fsdp", "qwen3", is_offloaded=True, is_checkpointed=True), "plain"),
        "fsdp-orig-padded-plain": (Setup("fsdp-orig", "qwen3", has_fixed_batches=True), "plain"),
        "fsdp-orig-packed-mini-batches": (Setup("fsdp-orig", "qwen2", **packed), "mini-batches"),
    }
    if world_size > 1:
        cases["fsdp2-kept"] = (Setup("fsdp2-kept", "qwen2", is_checkpointed=True, **packed), "mini-batches")
        cases["fsdp2-replicated"] = (Setup("fsdp2", "qwen2", is_replicated=True), "kl")
    return cases
