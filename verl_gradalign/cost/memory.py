# SPDX-License-Identifier: Apache-2.0
"""Memory of one GPU while it trains and scores, and of the trainer's process for the rollouts. The rollout sleeps.

Parameters, gradients, Adam's moments and the direction are float32 shards. What is gathered and kept of a pass is in
the compute dtype. It leaves out the allocator's fragmentation, communication buffers and what the rollout engine keeps
while it sleeps; leave a tenth of the GPU for those.
"""

from __future__ import annotations

from dataclasses import dataclass

from verl_gradalign.cost.setting import Setting

__all__ = ["Memory", "activation_bytes", "logits_bytes", "memory_of", "rollout_bytes"]

FULL = 4
"""Bytes of a number of the parameters, gradients, moments and the direction."""
FORMED_BYTES = 4 * 2**26
"""Gradients that ghost forms at a time on a GPU, in float32: probe.matrix_scores.MAX_GRADIENT_ELEMENTS."""
CHUNK_BYTES = 2 * 4 * 2**26
"""Logits converted to float32 at a time, and their exponentials: probe.objective.CHUNK_ELEMENTS."""
SHARDS_WHILE_MADE = 4
"""Shards of the gradient's size while a direction is made of one trusted set: two halves, their sum, and at most one
more for products. Measured: tests/unit/test_cost.py."""
BYTES_PER_ROLLOUT_TOKEN = 48
"""Of the trainer's host memory: ids, positions, masks and prompts or responses in int64, log-probs and scores in
float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the highest point of each phase, and its parts."""

    parameters: float
    gradients: float
    optimizer: float
    direction: float
    """Kept on the GPU beside training: 0 where it is offloaded or there is none."""
    gathered: float
    """Layers put together from shards, two at a time, and the embedding and output layer."""
    activations: float
    logits: float
    """Of a micro-batch of the update, as the activations, with their gradient."""
    update: float
    """Peak of the update, selection included: the direction that is kept."""
    make_direction: float
    score: float
    plain: float
    """Peak of the update without selection."""

    @property
    def peak(self) -> float:
        return max(self.update, self.make_direction, self.score)


def memory_of(setting: Setting) -> Memory:
    """Return the memory of one of the setting's GPUs."""
    shape, bytes_each = setting.shape, setting.compute_bytes
    shard = FULL * shape.num_parameters / setting.num_gpus
    is_sharded = setting.num_gpus > 1
    embeddings = shape.head_parameters * (1 if shape.is_tied else 2)
    gathered = bytes_each * (2 * shape.layer_parameters + embeddings) if is_sharded or bytes_each < FULL else 0
    activations, logits = (of(setting, setting.micro_batch_tokens) for of in (activation_bytes, logits_bytes))
    measuring = gathered + sum(of(setting, setting.probe_tokens) for of in (activation_bytes, logits_bytes))
    base = 3 * shard
    selects = setting.estimator is not None
    has_direction = selects and setting.trusted_problems > 0
    kept = shard if has_direction and setting.is_direction_kept and not setting.is_direction_offloaded else 0.0
    plain = base + shard + gathered + activations + logits
    making = max(2 * shard + measuring, SHARDS_WHILE_MADE * shard) if has_direction else 0.0
    return Memory(
        parameters=shard,
        gradients=shard,
        optimizer=2 * shard,
        direction=kept,
        gathered=gathered,
        activations=activations,
        logits=logits,
        update=plain + kept,
        make_direction=base + kept + making if has_direction else 0.0,
        score=base + kept + shard + measuring + _scoring_extra(setting) if selects else 0.0,
        plain=plain,
    )


def _scoring_extra(setting: Setting) -> float:
    """Bytes that an estimator holds besides a pass and the direction's shard."""
    shape = setting.shape
    shard = FULL * shape.num_parameters / setting.num_gpus
    largest = FULL * max(shape.head_parameters, *(o * i for o, i in shape.layer_matrices))
    extra = {
        "backward": shard,
        "finite_difference": shard,  # a copy of the parameters, to restore them bit for bit
        "low_rank": largest,
        "ghost": largest + FORMED_BYTES,
        "output_layer": FULL * shape.head_parameters + FORMED_BYTES,
    }
    return float(extra[setting.estimator or "ghost"])


def activation_bytes(setting: Setting, micro_batch_tokens: int) -> float:
    """Return the bytes that autograd keeps of a micro-batch's layers.

    Per token and layer 10 hidden + 4 intermediate numbers are kept (measured on transformers' Qwen2 with SDPA: the
    norms' inputs and outputs, queries, keys, values, the attention's and the MLP's products). With checkpointing one
    layer at a time, and each layer's input.
    """
    shape, tokens = setting.shape, _positions(setting, micro_batch_tokens)
    layer = tokens * (10 * shape.hidden + 4 * shape.intermediate) * setting.compute_bytes
    if not setting.has_checkpointing:
        return float(shape.num_layers * layer)
    return float(layer + shape.num_layers * tokens * shape.hidden * setting.compute_bytes)


def logits_bytes(setting: Setting, micro_batch_tokens: int) -> float:
    """Return the bytes of a micro-batch's logits, their gradient, and the chunk that is converted to float32."""
    logits = _positions(setting, micro_batch_tokens) * setting.shape.vocabulary
    return float(2 * logits * setting.compute_bytes + min(CHUNK_BYTES, 2 * FULL * logits))


def _positions(setting: Setting, micro_batch_tokens: int) -> int:
    """Return the positions of a micro-batch; a longest row, where that is more, is one of its own."""
    return max(micro_batch_tokens, setting.max_prompt_tokens + setting.max_response_tokens)


def rollout_bytes(setting: Setting, num_responses: float) -> float:
    """Return the bytes of so many responses of mean length in the trainer's process and its queue."""
    return num_responses * setting.tokens_per_row * BYTES_PER_ROLLOUT_TOKEN
