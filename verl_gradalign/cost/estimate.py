# SPDX-License-Identifier: Apache-2.0
"""What a step costs with selection and without: responses, tokens, operations, memory, and time if speeds are known.

All is an estimate from counts. It leaves out what does not grow with matrix products: elementwise work, communication
between GPUs (which makes `backward` slower than its operations say), verl's log-probs, waiting for the longest
response, weight transfer to the rollout, rewards, validation and checkpoints.

A forward pass takes 2 operations per token and matrix element, a backward pass the same again for activation gradients
and once more for weight gradients; recomputing activations adds a forward pass (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1; Korthikanti et al. 2022, arXiv 2205.05198). Attention adds 2 x row length x features per layer and token,
half of the full square, twice that backwards; it has no weights.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from verl_gradalign.cost.memory import BYTES_PER_ROLLOUT_TOKEN, FULL, kept_bytes, memory_of
from verl_gradalign.cost.setting import AUTO, ModelShape, Setting
from verl_gradalign.errors import refuse
from verl_gradalign.probe.sizes import fastest_form


@dataclass(frozen=True)
class Cost:
    """The cost of a mean step, in responses where no other unit is named. Schedule round: a round's, by its steps.

    `others` are generated for training alone (batches of a round after its first step), `unused` for the selection and
    never trained on, `most_at_once` in the step that selects: they take `host_bytes` of the trainer's memory, and
    `kept_bytes` what is kept between steps (trusted responses, what a forecast knows of the pool). `plain` are the
    operations of a step of the same batch without selection, by part as `flops`; `features` are those of an epoch in
    which the problems are new, `scores` where the update measures what that adds to it; log-probs are the old ones and,
    with a KL term, the reference's. `memory` is that of `memory_of`.
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
    kept_bytes: float
    seconds: dict[str, float] | None
    notes: tuple[str, ...]

    @property
    def ratios(self) -> dict[str, float]:
        """Of a plain step's responses, operations and time, and the update's operations that the measuring takes."""
        flops = self.flops
        measuring = flops["features"] + flops["direction"] + flops["scores"]
        ratios = {
            "rollout": self.generated / self.trained,
            "flops": sum(flops.values()) / sum(self.plain.values()),
            "measuring": measuring / flops["update"],
        }
        return ratios | ({"seconds": self.step_s / self.seconds["plain"]} if self.seconds else {})

    @property
    def step_s(self) -> float:
        """The seconds of a step, where the speeds are known. Raises: ValueError where they are not."""
        if self.seconds is None:
            raise ValueError("no speeds were given, so there is no time")
        return sum(seconds for part, seconds in self.seconds.items() if part != "plain")


def estimate(setting: Setting, tflops: float | None = None, tokens_per_second: float | None = None) -> Cost:
    """Return the cost of a mean step of the setting, with its time if both speeds of one GPU are given.

    Units: achieved (not peak) operations per second of training passes, in 1e12; tokens per second of the rollout.
    """
    per_selection = setting.steps_per_selection
    trained = float(setting.train_batch_size * setting.rollout_n)
    trusted = setting.trusted_responses / setting.refresh_steps
    at_once = trusted if setting.keeps_responses else float(setting.trusted_responses)
    chosen_from = float(setting.candidates_per_selection * setting.responses_per_candidate)
    replaced = trusted * (1 - setting.audit) if setting.train_on_trusted else 0.0
    if setting.is_forecast:
        chosen_from = max(0.0, trained - replaced)
    candidates, others = chosen_from / per_selection, trained * (per_selection - 1) / per_selection
    generated = candidates + trusted + others
    cost = Cost(
        setting=setting,
        candidates=candidates,
        trusted=trusted,
        others=others,
        trained=trained,
        unused=generated - trained,
        generated=generated,
        generated_tokens=generated * setting.response_tokens,
        most_at_once=chosen_from + at_once,
        flops=_training(setting, trained, generated) | _measuring(setting, candidates, trusted, trained),
        plain=_training(setting, trained, trained),
        memory=memory_of(setting),
        host_bytes=(chosen_from + at_once) * setting.tokens_per_row * BYTES_PER_ROLLOUT_TOKEN,
        kept_bytes=kept_bytes(setting),
        seconds=None,
        notes=_notes(setting),
    )
    has_speeds = tflops is not None or tokens_per_second is not None
    return replace(cost, seconds=_seconds(cost, tflops, tokens_per_second)) if has_speeds else cost


def alternatives(
    setting: Setting, tflops: float | None = None, tokens_per_second: float | None = None
) -> dict[str, Cost]:
    """Return the costs of the schedules step and forecast, and of the setting's own, by name.

    Those that are not the setting's have the defaults of what depends on the schedule.
    """
    estimator = None if setting.estimator is None else AUTO
    anew: dict[str, Any] = {"measure": None, "refresh_interval": None, "keeps_responses": None, "replay": None}
    anew |= {"estimator": estimator, "train_on_trusted": False}
    settings = {name: replace(setting, schedule=name, **anew) for name in ("step", "forecast")}
    settings[setting.schedule] = setting
    return {name: estimate(each, tflops, tokens_per_second) for name, each in settings.items()}


def _training(setting: Setting, trained: float, generated: float) -> dict[str, float]:
    """Return the operations of a step that generates and trains on so many responses, by part."""
    length, once = setting.tokens_per_row, forward(setting.shape, setting.tokens_per_row)
    # A prompt is read once for all its responses (the rollout's prefix cache).
    prompts = generated / setting.rollout_n * setting.prompt_tokens
    return {
        "rollout": once * (generated * setting.response_tokens + prompts),
        "features": 0.0,
        "direction": 0.0,
        "scores": 0.0,
        "log_probs": once * trained * length * (2 if setting.has_reference else 1),
        "update": update(setting) * trained * length * setting.ppo_epochs,
    }


def _measuring(setting: Setting, candidates: float, trusted: float, trained: float) -> dict[str, float]:
    """Return the operations, by part, of features, of directions and of scores, in a mean step.

    Where responses are kept, v is made in every step from a part of them, and only the fresh ones' log-probs are added.
    What its factors take (a few products of v with r columns, per step) is less than a thousandth of an update.
    """
    length, shape, live = setting.tokens_per_row, setting.shape, setting.live_share
    features = 0.0
    if setting.is_forecast and setting.has_prompt_features:
        shortlist = setting.candidates_per_selection * setting.prompt_tokens
        features = shortlist * (forward(shape, setting.prompt_tokens) - 2.0 * shape.head_parameters)
    if setting.estimator is None:
        return {"features": features}
    read, log_probs = trusted * live, 0.0
    if setting.keeps_responses:
        stored = setting.trusted_responses * (setting.replay or 1) * live
        log_probs = forward(shape, length) * read * length
        read = min(stored, setting.part * trained) / setting.steps_per_selection
    if setting.measures_in_update:
        scores = taps(setting) * trained * length
    else:
        scores = score(setting) * candidates * length * live
    return {"features": features, "direction": update(setting) * read * length + log_probs, "scores": scores}


def taps(setting: Setting) -> float:
    """Return the operations that measuring adds to the update, per token of it.

    `ghost`: one product with the whole direction for each matrix, which is a forward pass without its attention.
    `low_rank`: input and output gradient times the r factors of their side.
    """
    if setting.estimator == "low_rank":
        return 2.0 * setting.low_rank * setting.shape.matrix_features
    return 2.0 * matmul_parameters(setting.shape)


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
        "features": cost.flops["features"] / rate,
        "direction": cost.flops["direction"] / rate,
        "scores": cost.flops["scores"] / rate,
        "training": (cost.flops["log_probs"] + cost.flops["update"]) / rate,
        "plain": cost.trained * token_s + (cost.plain["log_probs"] + cost.plain["update"]) / rate,
    }


def _notes(setting: Setting) -> tuple[str, ...]:
    """Return what the numbers do not show."""
    notes, num, most = [], setting.responses_per_candidate, setting.positions_together
    mean, longest = num * setting.tokens_per_row, num * setting.longest_row
    is_apart = not setting.measures_in_update and setting.estimator not in (None, "backward")
    if is_apart and longest > most:
        which, size = ("a mean problem", mean) if mean > most else ("a problem of the longest responses", longest)
        notes.append(
            f"{which} takes {size:,.0f} positions, more than the {most:,} of a micro-batch: such problems take several "
            f"of them, and for norms {FULL * setting.shape.num_parameters / 1e9:,.1f} GB of one GPU for their gradient"
        )
    if setting.estimator == "backward" and setting.num_gpus > 1:
        notes.append(
            "backward gathers all parameters twice and reduces all gradients once for each problem, which is not in "
            "the operations: it measured 3.8 times an update's time on two ranks"
        )
    if setting.is_forecast and setting.has_prompt_features:
        notes.append(
            "prompts are read once each for their features, so that part falls to nothing once the pool has been seen"
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
            return once + _backward(setting) + 2.0 * setting.low_rank * shape.matrix_features
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
