# SPDX-License-Identifier: Apache-2.0
"""What the cost of a training step is computed from. Names are those of the configuration where it has the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ESTIMATORS", "ModelShape", "PRESETS", "SCHEDULES", "Setting", "shape_of"]

ESTIMATORS = ("ghost", "backward", "finite_difference", "low_rank", "output_layer")
SCHEDULES = ("step", "round")


@dataclass(frozen=True)
class Setting:
    """A model, a run and a machine. All parameters are trained with AdamW, fully sharded over the GPUs.

    Raises: ValueError naming the key, the value and the remedy.
    """

    shape: ModelShape
    num_gpus: int = 8
    train_batch_size: int = 128
    """Problems trained on in a step."""
    rollout_n: int = 8
    """Responses per problem."""
    prompt_tokens: float = 200.0
    """Mean tokens of a prompt."""
    response_tokens: float = 1500.0
    """Mean tokens of a response."""
    max_prompt_tokens: int = 1024
    max_response_tokens: int = 4096
    oversample: float = 4.0
    """Candidates per problem trained on."""
    schedule: str = "step"
    steps_per_round: int = 10
    """Schedule round: steps trained on what one selection keeps."""
    num_candidates: int | None = None
    """Schedule round: None is oversample x batch x steps_per_round."""
    candidate_n: int | None = None
    """Schedule round: responses per candidate. None: rollout_n."""
    trusted_problems: int = 64
    """0: no trusted set, as with the score random; nothing is scored if no estimator is named."""
    validation_n: int | None = None
    """Responses per trusted problem. None: rollout_n."""
    refresh_interval: int = 1
    estimator: str | None = "ghost"
    """None: the score needs no gradients."""
    has_response_derivatives: bool = False
    """Whether the score uses them (confident_cosine, correlation, lower_bound do)."""
    live_share: float = 1.0
    """Share of candidates and trusted problems whose rewards differ; the others are not scored. 1 is the most."""
    low_rank: int = 16
    has_checkpointing: bool = True
    """actor_rollout_ref.model.enable_gradient_checkpointing."""
    has_reference: bool = False
    """Whether a reference policy's log-probs are computed (a KL term)."""
    ppo_epochs: int = 1
    micro_batch_tokens: int = 16384
    """Positions of a micro-batch of the update on one GPU (ppo_max_token_len_per_gpu)."""
    max_tokens_per_rank: int | None = None
    """Positions of a micro-batch of direction and scores (probe.max_tokens_per_rank). None: the update's."""
    compute_bytes: int = 2
    """Of a number that is computed with: 2 in bf16, 4 in float32. Master parameters and Adam are float32."""
    is_direction_offloaded: bool = False
    """direction.offload."""
    is_direction_kept: bool = True
    """False where no step needs an earlier direction: refresh_interval=1, ema=0, on_degenerate other than previous."""

    def __post_init__(self) -> None:
        positive = ("num_gpus", "train_batch_size", "rollout_n", "steps_per_round", "refresh_interval", "ppo_epochs")
        for key in (*positive, "micro_batch_tokens", "max_response_tokens", "max_prompt_tokens"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        for key in ("num_candidates", "candidate_n", "validation_n", "max_tokens_per_rank"):
            value = getattr(self, key)
            _require(value is None or value >= 1, key, value, "must be at least 1")
        for key in ("prompt_tokens", "response_tokens"):
            _require(0 < getattr(self, key) < math.inf, key, getattr(self, key), "must be above 0")
        _require(1 <= self.oversample < math.inf, "oversample", self.oversample, "must be 1 or more")
        _require(self.trusted_problems >= 0, "trusted_problems", self.trusted_problems, "must be 0 or more")
        _require(0 < self.live_share <= 1, "live_share", self.live_share, "must be above 0 and at most 1")
        _require(self.compute_bytes in (2, 4), "compute_bytes", self.compute_bytes, "must be 2 (bf16) or 4 (float32)")
        _require_choice("schedule", self.schedule, SCHEDULES)
        if self.estimator is not None:
            _require_choice("estimator", self.estimator, ESTIMATORS)

    @property
    def tokens_per_row(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def steps_per_selection(self) -> int:
        return 1 if self.schedule == "step" else self.steps_per_round

    @property
    def responses_per_candidate(self) -> int:
        return self.rollout_n if self.schedule == "step" else self.candidate_n or self.rollout_n

    @property
    def refresh_steps(self) -> int:
        """Steps between two directions: one is made in a step that selects, if the last is older than the interval."""
        return self.steps_per_selection * math.ceil(self.refresh_interval / self.steps_per_selection)

    @property
    def probe_tokens(self) -> int:
        """Positions of a micro-batch of direction and scores."""
        return self.max_tokens_per_rank or self.micro_batch_tokens

    @property
    def candidates_per_selection(self) -> int:
        """Problems that a selection chooses from."""
        if self.schedule == "round" and self.num_candidates is not None:
            return self.num_candidates
        return math.ceil(round(self.oversample * self.train_batch_size * self.steps_per_selection, 9))


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        option = f"--{key.removeprefix('is_').removeprefix('has_').replace('_', '-')}"
        raise ValueError(f"{option} {value}: {rule}. Remedy: leave it out to use the default, or correct it.")


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, value, f"unknown; known are {', '.join(choices)}")


@dataclass(frozen=True)
class ModelShape:
    """A transformer with gated MLPs, grouped-query attention and RMSNorm, as Qwen2.5, Qwen3 and Llama 3 are."""

    name: str
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate: int
    vocabulary: int
    is_tied: bool = False
    """Whether the output layer is the embedding."""
    has_qkv_bias: bool = False
    head_features: int | None = None
    """None: hidden / num_heads."""
    exact_parameters: int | None = None
    """Where the count is known and the shape is only that of a model of about this size."""

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], name: str = "") -> ModelShape:
        """Return the shape that a Hugging Face config (as a mapping) describes.

        Raises: ValueError naming the keys it lacks; for mixtures of experts, whose cost is another.
        """
        experts = next((key for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), "")
        if experts:
            raise ValueError(f"{experts}={config[experts]}: the cost of mixtures of experts is not known here")
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [key for key in keys if not config.get(key)]
        if missing:
            raise ValueError(f"the model's config has no {', '.join(missing)}. Remedy: give --parameters instead.")
        heads = int(config["num_attention_heads"])
        return cls(
            name=name or str(config.get("model_type", "model")),
            hidden=int(config["hidden_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            is_tied=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
            head_features=config.get("head_dim"),
        )

    @property
    def attention_features(self) -> int:
        """Features of all query heads together."""
        return self.num_heads * (self.head_features or self.hidden // self.num_heads)

    @property
    def kv_features(self) -> int:
        return self.num_kv_heads * (self.head_features or self.hidden // self.num_heads)

    @property
    def layer_matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of every matrix of a layer."""
        attention, kv = self.attention_features, self.kv_features
        return (
            *((attention, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, attention)),
            *((self.intermediate, self.hidden), (self.intermediate, self.hidden), (self.hidden, self.intermediate)),
        )

    @property
    def layer_parameters(self) -> int:
        biases = self.attention_features + 2 * self.kv_features if self.has_qkv_bias else 0
        return sum(outputs * inputs for outputs, inputs in self.layer_matrices) + biases + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        """Of the output layer, and of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def num_parameters(self) -> int:
        """Of which a tied embedding is counted once."""
        whole = self.num_layers * self.layer_parameters + self.hidden
        return self.exact_parameters or whole + self.head_parameters * (1 if self.is_tied else 2)


def _qwen(name: str, hidden: int, layers: int, heads: int, kv: int, intermediate: int, is_tied: bool) -> ModelShape:
    vocabulary = 151936 if is_tied else 152064
    return ModelShape(name, hidden, layers, heads, kv, intermediate, vocabulary, is_tied, has_qkv_bias=True)


PRESETS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _qwen("0.5b", 896, 24, 14, 2, 4864, is_tied=True),
        _qwen("1.5b", 1536, 28, 12, 2, 8960, is_tied=True),
        _qwen("3b", 2048, 36, 16, 2, 11008, is_tied=True),
        _qwen("7b", 3584, 28, 28, 4, 18944, is_tied=False),
        ModelShape("8b", 4096, 32, 32, 8, 14336, 128256),
        _qwen("14b", 5120, 48, 40, 8, 13824, is_tied=False),
        _qwen("32b", 5120, 64, 40, 8, 27648, is_tied=False),
        ModelShape("70b", 8192, 80, 64, 8, 28672, 128256),
    )
}
"""Qwen2.5's shapes, and Llama 3's where the name is 8b or 70b."""


def shape_of(model: str | None, parameters: float | None = None) -> ModelShape:
    """Return a preset, or the preset nearest in size with its count replaced by `parameters`.

    Raises: ValueError for an unknown preset, none or two of the arguments, or fewer parameters than an embedding has.
    """
    if (model is None) == (parameters is None):
        raise ValueError("give either --model or --parameters, for example --model 7b or --parameters 8e9")
    if model is not None:
        if model.lower() not in PRESETS:
            raise ValueError(f"--model {model}: unknown. Remedy: use one of {', '.join(PRESETS)}, or --parameters 8e9.")
        return PRESETS[model.lower()]
    assert parameters is not None
    if not 1e8 <= parameters < math.inf:
        raise ValueError(f"--parameters {parameters}: must be at least 1e8. Remedy: write for example 8e9.")
    nearest = min(PRESETS.values(), key=lambda shape: abs(math.log(shape.num_parameters / parameters)))
    return _scaled(nearest, int(parameters))


def _scaled(shape: ModelShape, parameters: int) -> ModelShape:
    """Return the shape with as many layers as come nearest to the count, and the count itself."""
    rest = parameters - shape.hidden - shape.head_parameters * (1 if shape.is_tied else 2)
    layers = max(1, round(rest / shape.layer_parameters))
    values = {**vars(shape), "name": f"{parameters / 1e9:.3g}b", "num_layers": layers, "exact_parameters": parameters}
    return ModelShape(**values)
