# SPDX-License-Identifier: Apache-2.0
"""A small model of an architecture, run once through an estimator: what only a pass can show, before any worker starts.

    trouble = try_estimator(build(shrunk(hf_config)), "ghost", ProbeConfig())

A config is shrunk in its widths and its number of layers, so that the trial takes about a second whatever the size of
the model. Every kind of layer that the config names stays.
"""

import copy
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.responses import Response
from verl_gradalign.probe.score_problems import score_problems
from verl_gradalign.types import ProblemScores

MAX_PARAMETERS = 120e6
"""Of a model that is tried: 0.5 GB in float32."""
HEADS, HEAD_SIZE, VOCABULARY = 4, 16, 160
SMALL: Mapping[str, int] = {
    "num_attention_heads": HEADS,
    "head_dim": HEAD_SIZE,
    "rotary_dim": HEAD_SIZE,
    "hidden_size": HEADS * HEAD_SIZE,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "max_position_embeddings": 128,
}
"""Widths, by the names that most configs give them. What a config lacks is not set."""
MAX_EXPERTS = 8
RELATIVE_TOLERANCE = 1e-2
"""Between an exact estimator and autograd, as a share of the gradient's norm, in float32: rounding is below 1e-4."""


def shrunk(hf_config: Any) -> Any:
    """Return a copy of a transformers config with few narrow layers."""
    small = copy.deepcopy(hf_config)
    text = small.get_text_config()
    keys = text.num_key_value_heads if isinstance(getattr(text, "num_key_value_heads", None), int) else None
    heads = getattr(text, "num_attention_heads", HEADS)
    for key, value in SMALL.items():
        _narrow(text, key, value)
    if keys is not None:
        text.num_key_value_heads = HEADS if keys == heads else 1 if keys == 1 else HEADS // 2
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        _narrow(text, key, max(MAX_EXPERTS, getattr(text, "num_experts_per_tok", 0) or 0))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for owner in (small, text):
            # One that the vocabulary holds: a padding index changes what an embedding's gradient is.
            if getattr(owner, key, None) is not None:
                setattr(owner, key, VOCABULARY - 1)
    _keep_layers(text)
    if (vision := getattr(small, "vision_config", None)) is not None:
        for key, value in {"depth": 1, "num_hidden_layers": 1, "out_hidden_size": HEADS * HEAD_SIZE}.items():
            _narrow(vision, key, value)
    return small


def _narrow(config: Any, key: str, value: int) -> None:
    """Set a width that the config has; some have a property of that name, which follows from the others."""
    if isinstance(getattr(config, key, None), int):
        with suppress(AttributeError):
            setattr(config, key, value)


def _keep_layers(text: Any) -> None:
    """Leave two layers, or as many as it takes for one of each kind to be there."""
    kinds = getattr(text, "layer_types", None)
    num = 2
    if isinstance(kinds, list | tuple):
        num = max(num, 1 + max(list(kinds).index(kind) for kind in set(kinds)))
        with suppress(AttributeError):
            text.layer_types = list(kinds)[:num]
    text.num_hidden_layers = min(num, text.num_hidden_layers)


def try_estimator(model: nn.Module, estimator: str, probe: ProbeConfig) -> str:
    """Return "" if the model was scored, or why it cannot be tried: the model itself fails on text alone.

    An exact estimator is compared with autograd, problem by problem.
    Raises: ValueError that says what is wrong with the estimator on this model.
    """
    trusted, candidates = _problems(0, 2), _problems(2, 3)
    if trouble := _failure_of_model(model, trusted):
        return trouble
    if _depends_on_chance(model):
        raise ValueError(f"two passes over the same tokens differ: {_remedy_for_dropout(model)}")
    try:
        scores = score_problems(model, trusted, candidates, estimator=estimator, config=probe)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if estimator != "backward" and ESTIMATORS[estimator].is_exact:
        exact = score_problems(model, trusted, candidates, estimator="backward")
        _require_equal(estimator, scores, exact)
    return ""


def _remedy_for_dropout(model: nn.Module) -> str:
    """Return what to set to 0: dropout that a model's code applies by itself, and no layer shows."""
    config: Any = model.config
    active = {k: v for k, v in config.get_text_config().to_dict().items() if "drop" in k and isinstance(v, float) and v}
    shown = ", ".join(f"{key}={value}" for key, value in active.items()) or "dropout"
    settings = " ".join(f"+actor_rollout_ref.model.override_config.{key}=0" for key in active)
    return f"gradients would depend on chance ({shown} in its config). Remedy: set {settings or 'every dropout to 0'}."


def _require_equal(estimator: str, scores: ProblemScores, exact: ProblemScores) -> None:
    """Raise ValueError if an exact estimator's scores are not those of autograd."""
    assert scores.norm_P is not None and exact.norm_P is not None
    error_P = torch.maximum((scores.dot_P - exact.dot_P).abs(), (scores.norm_P - exact.norm_P).abs()) / exact.norm_P
    largest = float(error_P.max())
    if math.isfinite(float(exact.norm_P.sum())) and not largest < RELATIVE_TOLERANCE:
        raise ValueError(
            f"gradalign.estimator={estimator} and autograd differ by {largest:.2g} of the gradient's norm. "
            "Remedy: set gradalign.estimator=backward."
        )


def _problems(first: int, num: int) -> list[list[Response]]:
    """Return problems of random tokens, of different lengths, with advantages of both signs."""
    problems = []
    for seed in range(first, first + num):
        generator = torch.Generator().manual_seed(seed)
        # Lengths that are no width of the small model: a wrong shape is then not taken for a right one.
        lengths = [5 + seed, 7 + seed]
        ids = [torch.randint(1, VOCABULARY - 8, (6 + length,), generator=generator).tolist() for length in lengths]
        problems.append([Response(i[:6], i[6:], sign) for i, sign in zip(ids, (1.0, -0.5), strict=True)])
    return problems


def _failure_of_model(model: nn.Module, problems: list[list[Response]]) -> str:
    """Return why the model alone cannot make a pass and its gradient, "" if it can."""
    try:
        score_problems(model, problems[:1], problems[1:], estimator="backward")
    except Exception as error:  # whatever a model's code raises says nothing of the estimator
        return f"{type(error).__name__}: {error}"
    return ""


@torch.no_grad()
def _depends_on_chance(model: nn.Module) -> bool:
    """Return whether two passes in train mode differ, as dropout that no layer shows makes them."""
    ids_RS = torch.arange(1, 17).reshape(2, 8)
    model.train()
    first, second = (model(input_ids=ids_RS, use_cache=False).logits for _ in range(2))
    return not torch.equal(first, second)
