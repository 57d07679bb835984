# SPDX-License-Identifier: Apache-2.0
"""Scores without verl: a transformers model, some trusted problems, some candidates.

from verl_gradalign import Response, score_problems

trusted = [[Response(prompt_ids, response_ids, advantage=0.5), ...], ...]     # problems, each with its responses
scores = score_problems(model, trusted, candidates, temperature=1.0)
best = scores.cosine_P.argsort(descending=True)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import nn

from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import Direction, compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.fsdp import compute_device, data_parallel_group
from verl_gradalign.probe.gradient import leave_no_trace, require_no_dropout, trainable_parameters
from verl_gradalign.probe.objective import LOSS_AGG_MODES
from verl_gradalign.probe.passes import assign
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.responses import Response, is_number, tabulate
from verl_gradalign.types import ProblemRows, ProblemScores, TokenRow

MODES = tuple(mode for mode in LOSS_AGG_MODES if mode != "seq-mean-token-sum-norm")
"""verl's, without the one that needs a factor of its configuration."""


def score_problems(
    model: torch.nn.Module,
    trusted: Iterable[Iterable[Response]],
    candidates: Iterable[Iterable[Response]],
    temperature: float = 1.0,
    estimator: str = "ghost",
    loss_agg_mode: str = "token-mean",
    max_tokens: int = 16384,
    autocast_dtype: torch.dtype | None = None,
    config: ProbeConfig | None = None,
) -> ProblemScores:
    """Return the candidates' alignment with the policy gradient of the trusted problems. Collective under FSDP.

    `model` is a causal language model of transformers, plain, or wrapped by FSDP1 or FSDP2 over one group of ranks;
    under FSDP every rank gives the same problems. It is left as it was found, bit for bit. A problem is the sequence
    of its responses, and scores 0 without any; `estimator` is a name of `ESTIMATORS`; `max_tokens` bounds a
    micro-batch, padding included. The caller's no_grad, inference_mode and autocast have no effect on it.

    Units: gradients of each problem's loss as `loss_agg_mode` weighs its tokens; the direction is normalised. A problem
        whose gradient overflows, in float16 alone, gets nan or inf.
    Raises: ValueError if the model, a response or an option does not fit, with its place and the remedy; if the
        trusted problems have no gradient. TypeError if the model, a problem or a response is something else.
    """
    _require_options(temperature, estimator, loss_agg_mode, max_tokens, autocast_dtype, config)
    _require_model(model)
    no_autocast = torch.autocast(compute_device(model).type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), no_autocast:
        vocabulary = _vocabulary(model)
        table = tabulate("trusted", trusted, loss_agg_mode, vocabulary)
        num_trusted = len(table)
        table += tabulate("candidates", candidates, loss_agg_mode, vocabulary)
        rows = [row for problem in table for row in problem]
        engine = PlainEngine(model, rows, temperature, max_tokens, autocast_dtype)
        shares, method = _shares(table, model), ESTIMATORS[estimator](config)
        with leave_no_trace(model):
            method.check(model)
            model.train()  # gradient checkpointing is active in train mode only
            direction = compute_direction(engine, shares[:num_trusted])
            _require_direction(direction)
            return method.score(engine, shares[num_trusted:], direction)


def _shares(table: Sequence[Sequence[TokenRow]], model: nn.Module) -> list[ProblemRows]:
    """Return this rank's share of each problem: the whole of some, and of others the size alone.

    By the sizes every rank plans the same passes.
    """
    group = data_parallel_group(model)
    rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    problems, first = [], 0
    for index, rows in enumerate(table):
        lengths, numbers = [row.num_tokens for row in rows], tuple(range(first, first + len(rows)))
        problems.append(ProblemRows(str(index), numbers, len(rows), sum(lengths), max(lengths, default=0)))
        first += len(rows)
    owners = assign([problem.num_tokens for problem in problems], num_ranks)
    return [p if owner == rank else replace(p, rows=()) for p, owner in zip(problems, owners, strict=True)]


def _require_direction(direction: Direction) -> None:
    if direction.is_degenerate:
        trouble = f"the trusted problems have a gradient of norm {direction.norm}: there is no direction"
        remedy = "Give problems whose responses differ in advantage."
        if direction.norm != 0:
            remedy = "Look for parameters that are not finite, or compute in float32 or bfloat16."
        raise ValueError(f"{trouble}. {remedy}")


def _require_options(
    temperature: Any, estimator: Any, loss_agg_mode: Any, max_tokens: Any, autocast_dtype: Any, config: Any
) -> None:
    """Raise ValueError, with the name, the value and the remedy, for an option that cannot be."""
    for name, value, known in (("estimator", estimator, tuple(ESTIMATORS)), ("loss_agg_mode", loss_agg_mode, MODES)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: unknown; known are {', '.join(known)}")
    if not is_number(temperature) or not 0 < temperature < math.inf:
        rule = "must be a finite number above 0: the one that the responses were sampled at"
        remedy = "give 1.0 for responses that were sampled greedily"
        raise ValueError(f"temperature={temperature!r}: {rule}. Remedy: {remedy}.")
    if not (isinstance(max_tokens, Integral) and is_number(max_tokens)) or max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens!r}: must be a whole number above 0. Remedy: leave it out.")
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        rule = "must be None, torch.bfloat16 or torch.float16"
        raise ValueError(f"autocast_dtype={autocast_dtype!r}: {rule}. Remedy: leave it out for the model's own dtype.")
    if not isinstance(config, ProbeConfig | None):
        raise ValueError(
            f"config={config!r}: must be None or a verl_gradalign.config.ProbeConfig. Remedy: leave it out."
        )


def _require_model(model: Any) -> None:
    """Raise ValueError, naming the parameter, if the model has no gradient to be compared."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; give a causal language model, a torch.nn.Module")
    require_no_dropout(model)
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameter. Remedy: model.requires_grad_(True), or parts of it.")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device, without values. Remedy: load the weights first.")
        if parameter.is_inference():
            remedy = "load the model outside of it"
            raise ValueError(f"{name} was made under torch.inference_mode and gets no gradient. Remedy: {remedy}.")
    for name, parameter in parameters:
        if parameter._post_accumulate_grad_hooks:
            trouble = "has a hook that runs once it has a gradient, as of an optimizer inside the backward pass"
            raise ValueError(f"{name} {trouble}: scoring would train the model. Remedy: remove the hook.")


def _vocabulary(model: Any) -> int | None:
    """Return how many token ids the model knows, None if it does not say."""
    sizes = []
    for get, attribute in (("get_input_embeddings", "num_embeddings"), ("get_output_embeddings", "out_features")):
        try:
            sizes.append(getattr(getattr(model, get)(), attribute))
        except (AttributeError, NotImplementedError):  # not every model has them, or modules that say
            continue
    return min((size for size in sizes if isinstance(size, int)), default=None)
