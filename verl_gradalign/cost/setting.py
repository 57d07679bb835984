# SPDX-License-Identifier: Apache-2.0
"""What the cost of a training step is computed from. Names are those of the configuration where it has the key."""

from __future__ import annotations

import math
from dataclasses import dataclass

from verl_gradalign.cost.shapes import ModelShape

__all__ = ["ESTIMATORS", "SCHEDULES", "Setting"]

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
