# SPDX-License-Identifier: Apache-2.0
"""What a step costs with selection and without: responses, tokens, operations, memory, and time if speeds are known.

All is an estimate from counts. It leaves out what does not grow with matrix products: elementwise work, communication
between GPUs (which makes `backward` slower than its operations say), verl's log-probs, waiting for the longest
response, weight transfer to the rollout, rewards, validation and checkpoints.

A forward pass takes 2 operations per token and matrix element, a backward pass the same again for activation gradients
and once more for weight gradients; recomputing activations adds a forward pass (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1; Korthikanti et al. 2022, arXiv 2205.05198). Attention adds 2 x row length x features per layer and token,
half of the full square, twice that backwards; it has no weights.

Parameters, gradients, Adam's moments and the direction are float32 shards. What is gathered and kept of a pass is in
the compute dtype; the rollout sleeps. Left out are the allocator's fragmentation, communication buffers and what the
rollout engine keeps while it sleeps; leave a tenth of the GPU for those.
"""

import math
from dataclasses import dataclass, replace

from verl_gradalign.cost.setting import ModelShape, Setting
from verl_gradalign.errors import refuse
from verl_gradalign.probe.sizes import CHUNK_ELEMENTS, MAX_GRADIENT_ELEMENTS, fastest_form

FULL = 4
"""Bytes of a number of the parameters, gradients, moments and the direction."""
FORMED_BYTES = FULL * MAX_GRADIENT_ELEMENTS["cuda"]
CHUNK_BYTES = 2 * FULL * CHUNK_ELEMENTS
"""Logits converted to float32 at a time, and their exponentials."""
SHARDS_WHILE_MADE = 4
"""Shards of the gradient's size while a direction is made of one trusted set: two halves, their sum, and at most one
more for products. Measured: tests/unit/test_cost.py."""
BYTES_PER_ROLLOUT_TOKEN = 48
"""Of the trainer's memory: ids, positions, masks and prompts or responses in int64, log-probs and scores in float32."""


@dataclass(frozen=True)
class Cost:
    """The cost of a mean step, in responses where no other unit is named. Schedule round: a round's, by its steps.

    `others` are generated for training alone (batches of a round after its first step), `unused` for the selection and
    never trained on, `most_at_once` in the step that selects: they take `host_bytes` of the trainer's memory. `plain`
    are the operations of a step of the same batch without selection, by part as `flops`; log-probs are the old ones
    and, with a KL term, the reference's. `memory` is that of `memory_of`.
    """

    setting: Setting
    candidates: float
    trusted: float
    others: float
    trained: float
    unused: float
    generated: float
    generated_tokens: float
    most_at_once: float
    flops: dict[str, float]
    plain: dict[str, float]
    memory: dict[str, float]
    host_bytes: float
    seconds: dict[str, float] | None
    notes: tuple[str, ...]

    @property
    def ratios(self) -> dict[str, float]:
        """Of a plain step's responses and operations, and the update's operations that direction and scores take."""
        flops = self.flops
        return {
            "rollout": self.generated / self.trained,
            "flops": sum(flops.values()) / sum(self.plain.values()),
            "measuring": (flops["direction"] + flops["scores"]) / flops["update"],
        }


def estimate(setting: Setting, tflops: float | None = None, tokens_per_second: float | None = None) -> Cost:
    """Return the cost of a mean step of the setting, with its time if both speeds of one GPU are given.

    Units: achieved (not peak) operations per second of training passes, in 1e12; tokens per second of the rollout.
    """
    per_selection, n = setting.steps_per_selection, setting.rollout_n
    trained = float(setting.train_batch_size * n)
    chosen_from = float(setting.candidates_per_selection * setting.responses_per_candidate)
    at_refresh = float(setting.trusted_problems * (setting.validation_n or n))
    candidates, others = chosen_from / per_selection, trained * (per_selection - 1) / per_selection
    trusted = at_refresh / setting.refresh_steps
    generated = candidates + trusted + others
    flops = _flops(setting, candidates, trusted, trained, generated)
    plain = _flops(setting, 0.0, 0.0, trained, trained)
    most_at_once = chosen_from + at_refresh
    cost = Cost(
        setting=setting,
        candidates=candidates,
        trusted=trusted,
        others=others,
        trained=trained,
        unused=candidates + trusted - trained / per_selection,
        generated=generated,
        generated_tokens=generated * setting.response_tokens,
        most_at_once=most_at_once,
        flops=flops,
        plain=plain,
        memory=memory_of(setting),
        host_bytes=most_at_once * setting.tokens_per_row * BYTES_PER_ROLLOUT_TOKEN,
        seconds=None,
        notes=_notes(setting),
    )
    has_speeds = tflops is not None or tokens_per_second is not None
    return replace(cost, seconds=_seconds(cost, tflops, tokens_per_second)) if has_speeds else cost


def _flops(setting: Setting, candidates: float, trusted: float, trained: float, generated: float) -> dict[str, float]:
    """Return the operations of a step that scores `candidates` responses and makes a direction of `trusted` ones."""
    length, once, whole = setting.tokens_per_row, forward(setting.shape, setting.tokens_per_row), update(setting)
    measured = setting.live_share if setting.estimator is not None else 0.0
    # A prompt is read once for all its responses (the rollout's prefix cache).
    prompts = generated / setting.rollout_n * setting.prompt_tokens
    return {
        "rollout": once * (generated * setting.response_tokens + prompts),
        "direction": whole * trusted * length * measured,
        "scores": score(setting) * candidates * length * measured if measured else 0.0,
        "log_probs": once * trained * length * (2 if setting.has_reference else 1),
        "update": whole * trained * length * setting.ppo_epochs,
    }


def _seconds(cost: Cost, tflops: float | None, tokens_per_second: float | None) -> dict[str, float]:
    if tflops is None or tokens_per_second is None:
        why = "--tflops and --tokens-per-second belong together: time is only estimated from your own speeds"
        raise ValueError(f"{why}. Remedy: give both, or neither for ratios.")
    for option, speed in (("--tflops", tflops), ("--tokens-per-second", tokens_per_second)):
        if not 0 < speed < math.inf:
            refuse(option, speed, "must be above 0", "give what your machine reaches")
    rate = tflops * 1e12 * cost.setting.num_gpus
    token_s = cost.setting.response_tokens / (tokens_per_second * cost.setting.num_gpus)
    return {
        "rollout": cost.generated * token_s,
        "direction": cost.flops["direction"] / rate,
        "scores": cost.flops["scores"] / rate,
        "training": (cost.flops["log_probs"] + cost.flops["update"]) / rate,
        "plain": cost.trained * token_s + (cost.plain["log_probs"] + cost.plain["update"]) / rate,
    }


def _notes(setting: Setting) -> tuple[str, ...]:
    """Return what the numbers do not show."""
    notes, num, most = [], setting.responses_per_candidate, setting.probe_tokens
    mean, longest = num * setting.tokens_per_row, num * setting.longest_row
    if setting.estimator not in (None, "backward") and longest > most:
        which, size = ("a mean problem", mean) if mean > most else ("a problem of the longest responses", longest)
        notes.append(
            f"{which} takes {size:,.0f} positions, more than the {most:,} of a micro-batch: such problems are scored "
            "one at a time on all GPUs, exactly but slowly. Raise gradalign.probe.max_tokens_per_rank if memory allows"
        )
    if setting.estimator == "backward" and setting.num_gpus > 1:
        notes.append(
            "backward gathers all parameters twice and reduces all gradients once for each problem, which is not in "
            "the operations: it measured 3.8 times an update's time on two ranks"
        )
    return tuple(notes)


def matmul_parameters(shape: ModelShape) -> int:
    """Return the elements of all matrices that every token is multiplied with: the output layer's, no embedding's."""
    return sum(o * i for o, i in shape.layer_matrices) * shape.num_layers + shape.head_parameters


def forward(shape: ModelShape, tokens_per_row: float) -> float:
    """Return the operations of a forward pass, per token."""
    return 2.0 * matmul_parameters(shape) + attention(shape, tokens_per_row)


def attention(shape: ModelShape, tokens_per_row: float) -> float:
    """Return the operations of causal attention in a forward pass, per token."""
    return 2.0 * tokens_per_row * shape.attention_features * shape.num_layers


def update(setting: Setting) -> float:
    """Return the operations of a forward and backward pass of the update, per token: 3, with recomputing 4 forwards."""
    return forward(setting.shape, setting.tokens_per_row) + _backward(setting) + 2.0 * matmul_parameters(setting.shape)


def _backward(setting: Setting) -> float:
    """Return the operations of the activations' gradients, recomputing included, per token; without the weights'."""
    shape, length = setting.shape, setting.tokens_per_row
    passes = 2 if setting.has_checkpointing else 1
    return passes * forward(shape, length) + attention(shape, length)


def score(setting: Setting, device: str = "cuda") -> float:
    """Return the operations of scoring a candidate, per token of it. Raises: ValueError without an estimator."""
    shape, once = setting.shape, forward(setting.shape, setting.tokens_per_row)
    match setting.estimator:
        case "backward":
            return update(setting)
        case "finite_difference":
            return 2 * once
        case "output_layer":
            # The graph opens at the output layer: one product back is cut off, its gradient is formed.
            return once + _ghost_products(setting, shape.vocabulary, shape.hidden, device)
        case "low_rank":
            features = sum(o + i for o, i in shape.layer_matrices) * shape.num_layers + shape.vocabulary + shape.hidden
            return once + _backward(setting) + 2.0 * setting.low_rank * features
        case "ghost":
            layers = sum(_ghost_products(setting, o, i, device) for o, i in shape.layer_matrices) * shape.num_layers
            head = _ghost_products(setting, shape.vocabulary, shape.hidden, device)
            return once + _backward(setting) + layers + head
    raise ValueError(f"estimator={setting.estimator}: scores nothing")


def _ghost_products(setting: Setting, outputs: int, inputs: int, device: str) -> float:
    """Return the operations, per token, of one matrix's products with the direction and of its squared norm.

    Of three exact forms the probe takes the fastest. Per row: each row's gradient is formed, 2 O I, as in an update.
    Per problem: the same once, and delta V: 4 O I. Gram: delta V, and delta delta^T and input input^T over the
    problem's T tokens: 2 O I + 2 T (O + I). Without response derivatives a problem counts as two rows, its halves.
    Source: ghost dot product, Wang et al. 2024 (arXiv 2406.11011); Gram form, Li et al. 2022 (arXiv 2110.05679).
    """
    num_tokens = setting.responses_per_candidate * setting.tokens_per_row
    num_rows = setting.responses_per_candidate if setting.has_response_derivatives else 2
    weight = 2.0 * outputs * inputs
    operations = {"per_row": weight, "per_problem": 2 * weight, "gram": weight + 2.0 * num_tokens * (outputs + inputs)}
    return operations[fastest_form(num_tokens, num_rows, outputs, inputs, device)]


def memory_of(setting: Setting) -> dict[str, float]:
    """Return the bytes of one of the setting's GPUs: its parts, and the highest points of each phase and of all."""
    shape, bytes_each = setting.shape, setting.compute_bytes
    shard = FULL * shape.num_parameters / setting.num_gpus
    is_gathered = setting.num_gpus > 1 or bytes_each < FULL
    # Layers put together from shards, two at a time, with embedding and output layer.
    gathered = bytes_each * (2 * shape.layer_parameters + shape.embedding_parameters) if is_gathered else 0
    activations, logits = pass_bytes(setting, setting.micro_batch_tokens)
    measuring = gathered + sum(pass_bytes(setting, setting.probe_tokens))
    selects, base = setting.estimator is not None, 3 * shard
    has_direction = selects and setting.trusted_problems > 0
    kept = shard if has_direction and setting.is_direction_kept and not setting.is_direction_offloaded else 0.0
    making = max(2 * shard + measuring, SHARDS_WHILE_MADE * shard)
    plain = base + shard + gathered + activations + logits
    head = float(FULL * shape.head_parameters)
    largest = max(head, *(FULL * o * i for o, i in shape.layer_matrices))
    beside_pass_and_direction = {
        None: 0.0,
        "backward": shard,
        "finite_difference": shard,  # a copy of the parameters, to restore them bit for bit
        "low_rank": largest,
        "ghost": largest + FORMED_BYTES,
        "output_layer": head + FORMED_BYTES,
    }
    scoring = base + kept + shard + measuring + beside_pass_and_direction[setting.estimator]
    peaks = {
        "update": plain + kept,
        "make_direction": base + kept + making if has_direction else 0.0,
        "score": scoring if selects else 0.0,
    }
    return {
        "parameters": shard,
        "gradients": shard,
        "optimizer": 2 * shard,
        "direction": kept,
        "gathered": gathered,
        "activations": activations,
        "logits": logits,
        **peaks,
        "plain": plain,  # of the update without selection
        "peak": max(peaks.values()),
    }


def pass_bytes(setting: Setting, micro_batch_tokens: int) -> tuple[float, float]:
    """Return the bytes of a micro-batch's activations that autograd keeps, and of its logits.

    Per token and layer 10 hidden + 4 intermediate numbers are kept (measured on transformers' Qwen2 with SDPA: the
    norms' inputs and outputs, queries, keys, values, the attention's and the MLP's products). With checkpointing one
    layer at a time, and each layer's input. Beside the logits lie their gradient and the chunk in float32.
    """
    shape, bytes_each = setting.shape, setting.compute_bytes
    # A longest row, where that is more than a micro-batch, is a separate one.
    tokens = max(micro_batch_tokens, setting.longest_row)
    layer = tokens * (10 * shape.hidden + 4 * shape.intermediate) * bytes_each
    inputs = shape.num_layers * tokens * shape.hidden * bytes_each
    logits = tokens * shape.vocabulary
    activations = layer + inputs if setting.has_checkpointing else shape.num_layers * layer
    return float(activations), float(2 * logits * bytes_each + min(CHUNK_BYTES, 2 * FULL * logits))
