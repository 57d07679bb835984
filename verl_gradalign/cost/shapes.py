# SPDX-License-Identifier: Apache-2.0
"""The shape of a decoder-only transformer, as far as its cost depends on it. No weights are loaded.

shape = shape_of("7b")
shape = ModelShape.from_hf_config(json.loads(Path("model/config.json").read_text()))
shape.num_parameters
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PRESETS", "ModelShape", "shape_of"]


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
