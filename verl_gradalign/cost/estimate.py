# SPDX-License-Identifier: Apache-2.0
"""What a step costs with selection and without: responses, tokens, operations, memory, and time if speeds are known.

    cost = estimate(Setting(shape_of("7b"), num_gpus=8))
    cost.flops_ratio, cost.memory.peak / 1e9

All is an estimate from counts. It leaves out what does not grow with matrix products: elementwise work, communication
between GPUs (which makes `backward` slower than its operations say), verl's log-probs, waiting for the longest
response, weight transfer to the rollout, rewards, validation and checkpoints.
"""

import math
from dataclasses import dataclass, replace

from verl_gradalign.cost.passes import forward, memory_of, score, update
from verl_gradalign.cost.setting import Setting
from verl_gradalign.errors import refuse

BYTES_PER_ROLLOUT_TOKEN = 48
"""Of the trainer's memory: ids, positions, masks and prompts or responses in int64, log-probs and scores in float32."""


@dataclass(frozen=True)
class Cost:
    """The cost of a mean step, in responses where no other unit is named. Schedule round: a round's, by its steps.

    `others` are generated for training alone (batches of a round after its first step), `unused` for the selection and
    never trained on, `most_at_once` in the step that selects: they take `host_bytes` of the trainer's memory. `plain`
    are the operations of a step of the same batch without selection, by part as `flops`; log-probs are the old ones
    and, with a KL term, the reference's. `memory` is that of `passes.memory_of`.
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
        raise ValueError(
            "--tflops and --tokens-per-second belong together: time is only estimated from your own speeds. Remedy: "
            "give both, or neither for ratios."
        )
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
    notes = []
    mean = setting.responses_per_candidate * setting.tokens_per_row
    longest = setting.responses_per_candidate * (setting.max_prompt_tokens + setting.max_response_tokens)
    if setting.estimator not in (None, "backward") and longest > setting.probe_tokens:
        is_common = mean > setting.probe_tokens
        which = "a mean problem" if is_common else "a problem of the longest responses"
        notes.append(
            f"{which} takes {mean if is_common else longest:,.0f} positions, more than the {setting.probe_tokens:,} "
            "of a micro-batch: such problems are scored one at a time on all GPUs, exactly but slowly. Raise "
            "gradalign.probe.max_tokens_per_rank if memory allows"
        )
    if setting.estimator == "backward" and setting.num_gpus > 1:
        notes.append(
            "backward gathers all parameters twice and reduces all gradients once for each problem, which is not in "
            "the operations: it measured 3.8 times an update's time on two ranks"
        )
    return tuple(notes)
