# SPDX-License-Identifier: Apache-2.0
"""Scores without verl: a transformers model, some trusted problems, some candidates.

from verl_gradalign import Response, score_problems

trusted = [[Response(prompt_ids, response_ids, advantage=0.5), ...], ...]     # problems, each with its responses
scores = score_problems(model, trusted, candidates, temperature=1.0)
best = scores.cosine_P.argsort(descending=True)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.fsdp import data_parallel_group
from verl_gradalign.probe.gradient import leave_no_trace, require_no_dropout
from verl_gradalign.probe.objective import token_coefficients
from verl_gradalign.probe.passes import assign
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import ProblemRows, ProblemScores, TokenRow


@dataclass(frozen=True)
class Response:
    """One response to a problem."""

    prompt_ids: Sequence[int]
    """At least one token."""
    response_ids: Sequence[int]
    """As sampled, end-of-sequence token included."""
    advantage: float
    """For instance the reward minus the mean reward of the problem's responses."""


def score_problems(
    model: torch.nn.Module,
    trusted: Sequence[Sequence[Response]],
    candidates: Sequence[Sequence[Response]],
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
    of its responses; `estimator` is a name of `ESTIMATORS`; `max_tokens` bounds a micro-batch, padding included.

    Units: gradients of each problem's loss as `loss_agg_mode` weighs its tokens; the direction is normalised.
    Raises: ValueError if a model, a problem or an option does not fit, with the remedy; if the trusted problems have
        no gradient.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: unknown; known are {', '.join(ESTIMATORS)}")
    require_no_dropout(model)
    method = ESTIMATORS[estimator](config)
    group = data_parallel_group(model)
    rank, num_ranks = (0, 1) if group is None else (group.rank(), group.size())
    rows, problems = _tabulate([*trusted, *candidates], loss_agg_mode)
    owners = assign([problem.num_tokens for problem in problems], num_ranks)
    # Of others' problems a rank knows the size alone: every rank plans the same passes.
    shares = [p if owner == rank else replace(p, rows=()) for p, owner in zip(problems, owners, strict=True)]
    engine = PlainEngine(model, rows, temperature, max_tokens, autocast_dtype)
    with leave_no_trace(model):
        method.check(model)
        model.train()  # gradient checkpointing is active in train mode only
        direction = compute_direction(engine, shares[: len(trusted)])
        if direction.is_degenerate:
            trouble = f"the trusted problems have a gradient of norm {direction.norm}: there is no direction"
            raise ValueError(f"{trouble}. Give problems whose responses differ in advantage.")
        return method.score(engine, shares[len(trusted) :], direction)


def _tabulate(problems: Sequence[Sequence[Response]], loss_agg_mode: str) -> tuple[list[TokenRow], list[ProblemRows]]:
    """Return the rows of all problems, coefficients filled in, and each problem's share, as if on one rank."""
    rows: list[TokenRow] = []
    shares = []
    for index, responses in enumerate(problems):
        lengths = [len(response.response_ids) for response in responses]
        mask_RT = (torch.arange(max(lengths, default=0)) < torch.tensor(lengths).unsqueeze(1)).double()
        advantage_R1 = torch.tensor([response.advantage for response in responses], dtype=torch.float64).unsqueeze(1)
        coefficient_RT = token_coefficients(advantage_R1 * mask_RT, mask_RT, loss_agg_mode)
        first = len(rows)
        for place, response in enumerate(responses):
            if not len(response.prompt_ids):
                raise ValueError(f"problem {index}, response {place} has an empty prompt; give at least one token")
            both = (response.prompt_ids, response.response_ids)
            prompt, sampled = (torch.as_tensor(ids, dtype=torch.int64) for ids in both)
            rows.append(TokenRow(prompt, sampled, coefficient_RT[place, : len(sampled)]))
        tokens = [row.num_tokens for row in rows[first:]]
        numbers = tuple(range(first, len(rows)))
        shares.append(ProblemRows(str(index), numbers, len(numbers), sum(tokens), max(tokens, default=0)))
    return rows, shares
