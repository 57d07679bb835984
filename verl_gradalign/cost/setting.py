# SPDX-License-Identifier: Apache-2.0
"""What the cost of a training step is computed from. Names are those of the configuration where it has the key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from verl_gradalign.config import ESTIMATORS
from verl_gradalign.errors import refuse

T = TypeVar("T")
Rule = tuple[Callable[[Any], bool], str]
AT_LEAST_0: Rule = (lambda value: value >= 0, "must be 0 or more")
AT_LEAST_1: Rule = (lambda value: value >= 1, "must be at least 1")
POSITIVE: Rule = (lambda value: 0 < value < math.inf, "must be above 0")
FACTOR: Rule = (lambda value: 1 <= value < math.inf, "must be 1 or more")
SHARE: Rule = (lambda value: 0 < value <= 1, "must be above 0 and at most 1")
BYTES: Rule = (lambda value: value in (2, 4), "must be 2 (bf16) or 4 (float32)")


AUTO = "auto"
AUTO_HELP = "auto: ghost, or low_rank in the update. none: for scores without gradients."
OF_UPDATE = ("low_rank", "ghost")
"""What the update itself can measure with."""


def one_of(*choices: str) -> Rule:
    return (lambda value: value in choices), f"unknown; known are {', '.join(choices)}"


def entry(default: T, rule: Rule | None, help: str | None = None) -> T:
    """Return a field whose values but None keep to the rule. With a help it is an option of `verl-gradalign cost`."""
    return field(default=default, metadata={"rule": rule, "help": help})


def option_of(name: str) -> str:
    """Return the option that sets a field, as the command line has it."""
    return f"--{name.removeprefix('is_').removeprefix('has_').replace('_', '-').replace('offloaded', 'offload')}"


@dataclass(frozen=True)
class Setting:
    """A model, a run and a machine. All parameters are trained with AdamW, fully sharded over the GPUs.

    Raises: ValueError naming the key, the value and the remedy.
    """

    shape: ModelShape
    num_gpus: int = entry(8, AT_LEAST_1)
    train_batch_size: int = entry(128, AT_LEAST_1, "Problems trained on in a step.")
    rollout_n: int = entry(8, AT_LEAST_1, "Responses per problem.")
    prompt_tokens: float = entry(200.0, POSITIVE, "On average.")
    response_tokens: float = entry(1500.0, POSITIVE, "On average.")
    max_prompt_tokens: int = entry(1024, AT_LEAST_1, "data.max_prompt_length.")
    max_response_tokens: int = entry(4096, AT_LEAST_1, "data.max_response_length.")
    oversample: float = entry(4.0, FACTOR, "Candidates per problem trained on.")
    schedule: str = entry("step", one_of("step", "round", "forecast"), "step, round or forecast.")
    measure: str | None = entry(None, one_of("before", "update"), "before or update. Schedule forecast: update.")
    steps_per_round: int = entry(10, AT_LEAST_1, "Of schedule round.")
    num_candidates: int | None = entry(None, AT_LEAST_1, "Of a round. Oversample x batch x steps.")
    candidate_n: int | None = entry(None, AT_LEAST_1, "Responses per candidate of a round (curriculum.n).")
    trusted_problems: int = entry(64, AT_LEAST_0, "0 for a score without a trusted set.")
    validation_n: int | None = entry(None, AT_LEAST_1, "Responses per trusted problem. As --rollout-n.")
    refresh_interval: int | None = entry(None, AT_LEAST_1, "Steps per rollout of the trusted set. 1; forecast: 10.")
    keeps_responses: bool | None = None
    """Whether v is made in every step, from trusted responses that are kept. None: with schedule forecast."""
    replay: int | None = entry(None, AT_LEAST_1, "Turns of the trusted set whose responses are kept. 1; forecast: 5.")
    part: float = entry(0.25, POSITIVE, "Of an update's rows, that v is made from where responses are kept.")
    train_on_trusted: bool = entry(False, None, "Schedule forecast: trusted responses replace others in the update.")
    audit: float = 0.1
    """train_on_trusted: share of the trusted problems that is not trained on."""
    has_prompt_features: bool = entry(True, None, "Schedule forecast reads prompts' hidden states.")
    num_problems: int = entry(10_000, AT_LEAST_1, "Of the pool, which schedule forecast remembers one by one.")
    num_features: int = 32
    estimator: str | None = entry(AUTO, one_of(AUTO, *ESTIMATORS), AUTO_HELP)
    has_response_derivatives: bool = entry(False, None, "The score uses them, as confident_cosine does.")
    live_share: float = entry(1.0, SHARE, "Share of problems whose responses differ in reward.")
    low_rank: int = 16
    has_checkpointing: bool = entry(True, None, "")
    has_reference: bool = entry(False, None, "A reference policy is computed.")
    ppo_epochs: int = entry(1, AT_LEAST_1)
    micro_batch_tokens: int = entry(16384, AT_LEAST_1, "Positions of an update's micro-batch of a GPU.")
    max_tokens_per_rank: int | None = entry(None, AT_LEAST_1, "The same of scoring (probe). As many.")
    compute_bytes: int = entry(2, BYTES)
    """Of a number that is computed with; master parameters and Adam are float32."""
    ranks_per_row: int = entry(1, AT_LEAST_1)
    """GPUs that have slices of the same rows (Ulysses)."""
    unreduced_bytes: int = 0
    """Of a number of the gradient that each GPU keeps whole between micro-batches, where verl puts off their reduction
    (`use_no_sync_for_gradient_accumulation`): 4 under FSDP2, 2 under FSDP1."""
    is_direction_offloaded: bool = entry(True, None, "")
    adds_gradients_up: bool = True
    """Of problems larger than a micro-batch, for their norms (probe.oversized)."""
    is_direction_kept: bool = True
    """False where no step needs an earlier direction: refresh_interval=1, ema=0, on_degenerate other than previous."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, rule = getattr(self, each.name), each.metadata.get("rule")
            if rule is not None and value is not None and not rule[0](value):
                refuse(option_of(each.name), value, rule[1], "leave it out to use the default, or correct it")
        self._fill_in()
        if not self.measures_in_update:
            return
        if not self.is_forecast:
            why = f"schedule {self.schedule} chooses by what is measured, which the update would be too late for"
            refuse("--measure", "update", why, "use --schedule forecast, or leave it out")
        if self.estimator not in OF_UPDATE:
            why = "the update's own backward pass gives dot products only, with the whole direction or with its factors"
            refuse("--estimator", self.estimator, why, f"use {' or '.join(OF_UPDATE)}, or --measure before")

    def _fill_in(self) -> None:
        """Fill in what depends on the schedule, as the configuration does, and `+gradalign=forecast`."""
        measure = self.measure or ("update" if self.is_forecast and self.estimator is not None else "before")
        interval, replay = (10, 5) if self.is_forecast else (1, 1)
        values: dict[str, Any] = {
            "measure": measure,
            "refresh_interval": self.refresh_interval or interval,
            "replay": self.replay or replay,
            "keeps_responses": self.is_forecast if self.keeps_responses is None else self.keeps_responses,
        }
        if self.estimator == AUTO:
            values["estimator"] = "low_rank" if measure == "update" else "ghost"
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def is_forecast(self) -> bool:
        return self.schedule == "forecast"

    @property
    def measures_in_update(self) -> bool:
        return self.estimator is not None and self.measure == "update"

    @property
    def tokens_per_row(self) -> float:
        return self.prompt_tokens + self.response_tokens

    @property
    def longest_row(self) -> int:
        return self.max_prompt_tokens + self.max_response_tokens

    @property
    def steps_per_selection(self) -> int:
        return self.steps_per_round if self.schedule == "round" else 1

    @property
    def responses_per_candidate(self) -> int:
        return self.candidate_n or self.rollout_n if self.schedule == "round" else self.rollout_n

    @property
    def refresh_steps(self) -> int:
        """Steps in which the trusted set is rolled out once: in a step that selects, if the interval is over.

        Where responses are kept, a share of it in every step.
        """
        interval = self.refresh_interval or 1
        return self.steps_per_selection * math.ceil(interval / self.steps_per_selection)

    @property
    def trusted_responses(self) -> int:
        """Of the whole trusted set."""
        return self.trusted_problems * (self.validation_n or self.rollout_n)

    @property
    def probe_tokens(self) -> int:
        """Positions of a GPU's micro-batch of scores."""
        return self.max_tokens_per_rank or self.micro_batch_tokens

    @property
    def positions_together(self) -> int:
        """Positions of a micro-batch of scores, on all GPUs that share its rows."""
        return self.probe_tokens * self.ranks_per_row

    @property
    def candidates_per_selection(self) -> int:
        """Problems that a selection chooses from; schedule forecast only forecasts them."""
        if self.schedule == "round" and self.num_candidates is not None:
            return self.num_candidates
        return math.ceil(round(self.oversample * self.train_batch_size * self.steps_per_selection, 9))


HF_KEYS = {
    "hidden": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
}
"""Sizes that every Hugging Face config has."""


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
        for experts in ("num_experts", "num_local_experts", "n_routed_experts"):
            if config.get(experts):
                raise ValueError(f"{experts}={config[experts]}: the cost of mixtures of experts is not known here")
        missing = [key for key in HF_KEYS.values() if not config.get(key)]
        if missing:
            raise ValueError(f"the model's config has no {', '.join(missing)}. Remedy: give --parameters instead.")
        return cls(
            name=name or str(config.get("model_type", "model")),
            num_kv_heads=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
            is_tied=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
            head_features=config.get("head_dim"),
            **{field: int(config[key]) for field, key in HF_KEYS.items()},
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
    def matrix_features(self) -> int:
        """Outputs and inputs of all matrices together: the numbers of a pair of vectors for each of them."""
        of_layer = sum(outputs + inputs for outputs, inputs in self.layer_matrices)
        return of_layer * self.num_layers + self.vocabulary + self.hidden

    @property
    def layer_parameters(self) -> int:
        biases = self.attention_features + 2 * self.kv_features if self.has_qkv_bias else 0
        return sum(outputs * inputs for outputs, inputs in self.layer_matrices) + biases + 2 * self.hidden

    @property
    def head_parameters(self) -> int:
        """Of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Of the output layer and the embedding, which are one if they are tied."""
        return self.head_parameters * (1 if self.is_tied else 2)

    @property
    def num_parameters(self) -> int:
        whole = self.num_layers * self.layer_parameters + self.hidden + self.embedding_parameters
        return self.exact_parameters or whole


PRESETS: dict[str, ModelShape] = {
    sizes[0]: ModelShape(*sizes)
    for sizes in (
        ("0.5b", 896, 24, 14, 2, 4864, 151936, True, True),
        ("1.5b", 1536, 28, 12, 2, 8960, 151936, True, True),
        ("3b", 2048, 36, 16, 2, 11008, 151936, True, True),
        ("7b", 3584, 28, 28, 4, 18944, 152064, False, True),
        ("8b", 4096, 32, 32, 8, 14336, 128256, False, False),
        ("14b", 5120, 48, 40, 8, 13824, 152064, False, True),
        ("32b", 5120, 64, 40, 8, 27648, 152064, False, True),
        ("70b", 8192, 80, 64, 8, 28672, 128256, False, False),
    )
}
"""Qwen2.5's shapes, and Llama 3's where the name is 8b or 70b."""


def shape_of(model: str | None, parameters: float | None = None) -> ModelShape:
    """Return a preset, or the preset nearest in size with its count replaced by `parameters`.

    Raises: ValueError for an unknown preset, none or two of the arguments, or fewer parameters than an embedding has.
    """
    if model is not None and parameters is None:
        if model.lower() not in PRESETS:
            refuse("--model", model, "unknown", f"use one of {', '.join(PRESETS)}, or --parameters 8e9")
        return PRESETS[model.lower()]
    if model is not None or parameters is None:
        raise ValueError("give either --model or --parameters, for example --model 7b or --parameters 8e9")
    if not 1e8 <= parameters < math.inf:
        refuse("--parameters", parameters, "must be at least 1e8", "write for example 8e9")
    nearest = min(PRESETS.values(), key=lambda shape: abs(math.log(shape.num_parameters / parameters)))
    # As many layers as come nearest to the count, and the count itself.
    rest = parameters - nearest.hidden - nearest.embedding_parameters
    layers, name = max(1, round(rest / nearest.layer_parameters)), f"{parameters / 1e9:.3g}b"
    return replace(nearest, name=name, num_layers=layers, exact_parameters=int(parameters))
