# SPDX-License-Identifier: Apache-2.0
"""Kept responses of an earlier policy on verl's engine: known ratios, and the direction that is made of them.

Known to the processes and to the tests. Shape legend: T response tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.distributed.engines import build_engine
from tests.distributed.scoring import deal_rows, gather, report
from tests.distributed.setups import CANDIDATES, TRUSTED, WIDE, Setup, reference_model
from tests.numerics.oracle import log_probs
from tests.numerics.problems import TEMPERATURE, Problem
from verl_gradalign.config import DirectionConfig
from verl_gradalign.integration.engine import STORED_LOG_PROBS, VerlEngine, scoring_mode
from verl_gradalign.probe.call import DirectionRequest, make_direction
from verl_gradalign.probe.direction import no_direction
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.types import TokenRow

OUTLIER = 40.0
"""A ratio that leaves a response next to no effective sample."""


def log_ratios(response: Tensor, is_moved: bool) -> Tensor:
    """Return log pi_now / pi_then of a response's tokens: zeros unless the policy has moved since."""
    if not is_moved:
        return torch.zeros(len(response), dtype=torch.float64)
    seed = int(response.sum())
    delta_T = 0.6 * torch.randn(len(response), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if seed % 3 == 0:
        delta_T[0] = math.log(OUTLIER)
    return delta_T


def weighed(problem: Problem, is_moved: bool) -> tuple[Problem, list[tuple[float, list[float]]]]:
    """Return the problem with the coefficients that replay gives it, and each row's effective share and ratios."""
    rows, found = [], []
    for row in problem:
        ratios = [math.exp(delta) for delta in log_ratios(row.response, is_moved).tolist()]
        share = sum(ratios) ** 2 / (len(ratios) * sum(ratio * ratio for ratio in ratios))
        weights = [min(ratio, 2.0) if share >= 0.5 else 0.0 for ratio in ratios]
        rows.append(replace(row, coefficient=row.coefficient * torch.tensor(weights, dtype=torch.float64)))
        found.append((share, ratios))
    return rows, found


def stored_log_probs(model: nn.Module, prompt: Tensor, response: Tensor, is_moved: bool) -> Tensor:
    """Return the log-probs of a policy that the present one has these ratios to."""
    row = TokenRow(prompt, response, torch.zeros(len(response)))
    with torch.no_grad():
        return log_probs(model, row, TEMPERATURE) - log_ratios(response, is_moved)


def measure_replay(root: Path, strategy: str) -> dict[str, Any]:
    """Return scores along directions of kept responses, and what was found of these; and with the stored one."""
    engine = build_engine(root, Setup(strategy, "qwen2", is_checkpointed=True))
    model = reference_model(root, "qwen2", has_adapters=False)
    budget = TokenBudget(WIDE, is_padded=True)
    measured: dict[str, Any] = {}
    for name, is_moved in {"same-policy": False, "moved-policy": True}.items():
        rows, trusted, candidates = deal_rows(TRUSTED, CANDIDATES, "ghost", budget)
        pairs = zip(rows["prompts"].unbind(), rows["responses"].unbind(), strict=True)
        stored = [stored_log_probs(model, *pair, is_moved) for pair in pairs]
        rows[STORED_LOG_PROBS] = torch.nested.as_nested_tensor(stored, layout=torch.jagged)
        request = DirectionRequest(DirectionConfig(), budget, TEMPERATURE, {"trusted": 1.0}, {"trusted": trusted})
        with scoring_mode(engine):
            replaying = VerlEngine(engine, rows, TEMPERATURE, budget, is_replayed=True)
            reply, fresh = make_direction(replaying, request, None)
            shares = replaying.replay_shares()
            _, again = make_direction(replaying, replace(request, trusted={"trusted": ()}), fresh)
            plain = VerlEngine(engine, rows, TEMPERATURE, budget)
            assert fresh is not None and again is None and plain.replay_shares() == {}
            measured[name] = report(ESTIMATORS["ghost"]().score(plain, candidates, fresh))
            _, unweighed = make_direction(plain, request, no_direction(plain.module))
            assert unweighed is not None
            measured[f"{name}-unweighed"] = report(ESTIMATORS["ghost"]().score(plain, candidates, unweighed))
        measured[name] |= {"shares": shares, "reports": {k: asdict(v) for k, v in reply.reports.items()}}
        measured[name]["ranks_agree"] &= len(set(gather(repr(shares)))) == 1
    return measured
