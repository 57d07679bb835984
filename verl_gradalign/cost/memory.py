# SPDX-License-Identifier: Apache-2.0
"""What training with selection holds in the memory of a GPU, and of the trainer's machine. An estimate from counts.

Parameters, gradients, Adam's moments and the direction are float32 shards. What is gathered and kept of a pass is in
the compute dtype; the rollout sleeps. Left out are the allocator's fragmentation, communication buffers and what the
rollout engine keeps while it sleeps; leave a tenth of the GPU for those. Left out too is the whole direction that
`ghost` gathers once for all its passes: it does so only where that takes a quarter of what is free at most.
"""

import math

from verl_gradalign.cost.setting import Setting
from verl_gradalign.probe.sizes import CHUNK_ELEMENTS, MAX_GRADIENT_ELEMENTS

FULL = 4
"""Bytes of a number of the parameters, gradients, moments and the direction."""
FORMED_BYTES = FULL * MAX_GRADIENT_ELEMENTS["cuda"]
CHUNK_BYTES = 2 * FULL * CHUNK_ELEMENTS
"""Logits converted to float32 at a time, and their exponentials."""
SHARDS_WHILE_MADE = 3
"""Shards of the gradient's size while a direction is made, of however many trusted sets: two halves, and at most one
more for products. Measured: tests/unit/test_cost.py."""
BYTES_PER_ROLLOUT_TOKEN = 48
"""Of the trainer's memory: ids, positions, masks and prompts or responses in int64, log-probs and scores in float32."""
BYTES_PER_PROBLEM = 24
"""That a forecast remembers of a problem: its own part, how sure that is, visits, and the step that last took it."""


def memory_of(setting: Setting) -> dict[str, float]:
    """Return the bytes of one of the setting's GPUs: its parts, and the highest points of each phase and of all."""
    shape, bytes_each = setting.shape, setting.compute_bytes
    shard = FULL * shape.num_parameters / setting.num_gpus
    is_gathered = setting.num_gpus > 1 or bytes_each < FULL
    # Layers put together from shards, two at a time, with embedding and output layer.
    gathered = bytes_each * (2 * shape.layer_parameters + shape.embedding_parameters) if is_gathered else 0
    activations, logits = pass_bytes(setting, setting.micro_batch_tokens)
    whole = float(setting.unreduced_bytes * shape.num_parameters) if setting.num_gpus > 1 else 0.0
    # Put off, a reduction turns whole gradients into shards one unit at a time: there are never all of both.
    gradient = max(shard, whole)
    # Directions, `backward` and checks by it are verl's own pass, with its micro-batches and logits; scores form none.
    measuring = gathered + activations + logits
    reading = gathered + sum(pass_bytes(setting, setting.probe_tokens, forms_logits=False))
    if setting.estimator == "backward":
        reading = measuring
    elif setting.estimator == "finite_difference":  # verl's too, and no gradient
        reading = gathered + activations + logits
    selects, base = setting.estimator is not None, 3 * shard
    has_direction = selects and setting.trusted_problems > 0
    kept = shard if has_direction and setting.is_direction_kept and not setting.is_direction_offloaded else 0.0
    making = max(shard + gradient + measuring, SHARDS_WHILE_MADE * shard)
    plain = base + gradient + measuring
    head = float(FULL * shape.head_parameters)
    largest = max(head, *(FULL * o * i for o, i in shape.layer_matrices))
    beside_pass_and_direction = {
        None: 0.0,
        "backward": gradient,
        "finite_difference": shard,  # a copy of the parameters, to restore them bit for bit
        "low_rank": largest,
        "ghost": largest + FORMED_BYTES + accumulated_bytes(setting),
        "output_layer": head + FORMED_BYTES,
    }
    scoring = base + kept + shard + reading + beside_pass_and_direction[setting.estimator]
    # The gradient of a checked problem, or of all candidates where v is theirs, beside v.
    scoring = max(scoring, base + kept + shard + gradient + measuring)
    scores_apart, replicated = selects and not setting.measures_in_update, _replicated_bytes(setting)
    peaks = {
        "update": plain + kept + replicated,
        "make_direction": base + kept + making if has_direction else 0.0,
        "score": scoring if scores_apart else 0.0,
    }
    return {
        "parameters": shard,
        "gradients": shard,
        "optimizer": 2 * shard,
        "direction": kept,
        "replicated": replicated,
        "gathered": gathered,
        "activations": activations,
        "logits": logits,
        "unreduced": gradient - shard,
        **peaks,
        "plain": plain,  # of the update without selection
        "peak": max(peaks.values()),
    }


def _replicated_bytes(setting: Setting) -> float:
    """Return the bytes of what the update measures with, on every GPU: v whole or its factors, in the compute dtype."""
    if not setting.measures_in_update:
        return 0.0
    factors = setting.low_rank * setting.shape.matrix_features
    return float(setting.compute_bytes * (factors if setting.estimator == "low_rank" else setting.shape.num_parameters))


def accumulated_bytes(setting: Setting) -> float:
    """Return the bytes of a gradient that is added up on one GPU, where a mean problem takes several micro-batches."""
    mean = setting.responses_per_candidate * setting.tokens_per_row
    is_cut = mean > setting.positions_together
    return float(FULL * setting.shape.num_parameters) if is_cut and setting.adds_gradients_up else 0.0


def pass_bytes(setting: Setting, micro_batch_tokens: int, forms_logits: bool = True) -> tuple[float, float]:
    """Return the bytes of a micro-batch's activations that autograd keeps, and of its logits, or of a chunk of them.

    Per token and layer 10 hidden + 4 intermediate numbers are kept (measured on transformers' Qwen2 with SDPA: the
    norms' inputs and outputs, queries, keys, values, the attention's and the MLP's products). With checkpointing one
    layer at a time, and each layer's input. Beside the logits lie their gradient and the chunk in float32.
    """
    shape, bytes_each = setting.shape, setting.compute_bytes
    # A longest row, where that is more than a micro-batch, is a separate one.
    tokens = max(micro_batch_tokens, math.ceil(setting.longest_row / setting.ranks_per_row))
    layer = tokens * (10 * shape.hidden + 4 * shape.intermediate) * bytes_each
    inputs = shape.num_layers * tokens * shape.hidden * bytes_each
    logits = tokens * shape.vocabulary
    if not forms_logits:
        logits = min(logits, CHUNK_ELEMENTS)
    activations = layer + inputs if setting.has_checkpointing else shape.num_layers * layer
    return float(activations), float(2 * logits * bytes_each + min(CHUNK_BYTES, 2 * FULL * logits))


def kept_bytes(setting: Setting) -> float:
    """Return the bytes of host memory that outlive a step."""
    rows = setting.trusted_responses * (setting.replay or 1) if setting.keeps_responses else 0
    of_problem = BYTES_PER_PROBLEM + (FULL * setting.num_features if setting.has_prompt_features else 0)
    forecast = setting.num_problems * of_problem if setting.is_forecast else 0
    return rows * setting.tokens_per_row * BYTES_PER_ROLLOUT_TOKEN + forecast
