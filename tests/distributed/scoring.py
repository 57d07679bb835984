# SPDX-License-Identifier: Apache-2.0
"""Problems assigned to ranks as the trainer assigns them, and scored on verl's engine.

with scoring(engine, CANDIDATES, "ghost", budget) as call:
    scores = call.score(call.direction())
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from tensordict import TensorDict
from verl.workers.engine.base import BaseEngine

from tests.distributed.engines import make_row_table
from tests.distributed.setups import CANDIDATES, TRUSTED, WIDE
from tests.numerics.problems import TEMPERATURE, Problem
from verl_gradalign.config import ProbeConfig
from verl_gradalign.cpu.engines import CpuFSDPEngineWithLMHead
from verl_gradalign.integration.engine import VerlEngine, scoring_mode
from verl_gradalign.integration.prompt_states import PromptStates, read_prompts
from verl_gradalign.integration.requests import ProblemKeys, Shares, build_shares, keys_by_rank, owners_of
from verl_gradalign.probe.direction import Direction, compute_direction
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.types import ProblemScores, TokenRow


@dataclass(frozen=True)
class ScoringCall:
    """One rank's side of a scoring call."""

    engine: VerlEngine
    trusted: Shares
    candidates: Shares
    estimator: str

    def direction(self) -> Direction:
        return compute_direction(self.engine, self.trusted)

    def score(self, direction: Direction, config: ProbeConfig | None = None) -> ProblemScores:
        return ESTIMATORS[self.estimator](config).score(self.engine, self.candidates, direction)


@contextmanager
def scoring(
    engine: BaseEngine,
    candidates: Sequence[Problem],
    estimator: str,
    max_tokens: int,
    oversized: str = "accumulate",
) -> Iterator[ScoringCall]:
    """Deal the problems, and put the engine into scoring mode."""
    budget = TokenBudget(max_tokens, is_padded=not engine.engine_config.use_remove_padding)
    place = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
    rows, trusted, candidates_ = deal_rows(TRUSTED, candidates, estimator, budget, oversized, place)
    with scoring_mode(engine):
        yield ScoringCall(VerlEngine(engine, rows, TEMPERATURE, budget), trusted, candidates_, estimator)


def score(
    engine: CpuFSDPEngineWithLMHead,
    estimator: str,
    max_tokens: int = WIDE,
    config: ProbeConfig | None = None,
    candidates: Sequence[Problem] = CANDIDATES,
) -> dict[str, Any]:
    """Return the scores of `candidates` along the direction of TRUSTED, and whether all ranks found the same."""
    with scoring(engine, candidates, estimator, max_tokens) as call:
        return report(call.score(call.direction(), config))


def read(
    engine: CpuFSDPEngineWithLMHead, prompts: Sequence[Sequence[int]], max_tokens: int = WIDE
) -> list[list[float]]:
    """Return the hidden states of the prompts, dealt as the driver deals them. Collective."""
    states = PromptStates(list, Ranks(engine), TokenBudget(max_tokens, not engine.engine_config.use_remove_padding))
    return states(prompts).tolist()


class Ranks:
    """What the driver sees of the workers: here every rank is its own driver, and answers for itself."""

    def __init__(self, engine: CpuFSDPEngineWithLMHead) -> None:
        self._engine = engine

    def _query_dispatch_info(self, _mesh: str) -> list[int]:
        return list(range(dist.get_world_size()))

    def gradalign_prompt_features(self, prompts: list[Any], budgets: list[TokenBudget]) -> list[np.ndarray]:
        rank = dist.get_rank()
        return gather(read_prompts(self._engine, prompts[rank], budgets[rank]))


def report(scores: ProblemScores) -> dict[str, Any]:
    """Return the scores as lists, and whether all ranks found the same. Collective."""
    mine = {
        "dot": scores.dot_P.tolist(),
        "norm": None if scores.norm_P is None else scores.norm_P.tolist(),
        "derivative": None if scores.response_derivative_PR is None else scores.response_derivative_PR.tolist(),
        "half_dot": None if scores.half_dot_P2 is None else scores.half_dot_P2.tolist(),
        "num_tokens": scores.num_tokens_P.tolist(),
        "direction_norm": scores.direction_norm,
        "diagnostics": dict(scores.diagnostics),
    }
    # As text, because nan equals nan there.
    return {**mine, "ranks_agree": len(set(gather(repr(mine)))) == 1}


def tight_budget(engine: CpuFSDPEngineWithLMHead, problems: Sequence[Problem] = CANDIDATES) -> int:
    """Return the smallest budget that holds every problem."""
    budget = TokenBudget(0, is_padded=not engine.engine_config.use_remove_padding)
    return max(budget.positions([keys_of("", 0, problem).size]) for problem in problems)


def keys_of(kind: str, index: int, problem: Problem) -> ProblemKeys:
    """Problems are split: their first rows are one half, so that rows keep the order of the problem."""
    keys = tuple(f"{kind}{index}_{k}_0" for k in range(len(problem)))
    halves = tuple(int(k >= (len(problem) + 1) // 2) for k in range(len(problem)))
    return ProblemKeys(f"{kind}{index}", keys, tuple(row.num_tokens for row in problem), halves)


def deal_rows(
    trusted: Sequence[Problem],
    candidates: Sequence[Problem],
    estimator: str,
    budget: TokenBudget,
    oversized: str = "accumulate",
    place: tuple[int, int] | None = None,
) -> tuple[TensorDict, Shares, Shares]:
    """Return this rank's row table, spare row last, and its shares, assigned as the trainer assigns them.

    `place`: its number among the ranks that have different rows, and how many these are; by default among all.
    """
    tables = [
        [keys_of(kind, index, problem) for index, problem in enumerate(problems)]
        for kind, problems in (("t", trusted), ("c", candidates))
    ]
    responses: dict[str, TokenRow] = {}
    for table, problems in zip(tables, (trusted, candidates), strict=True):
        for named, problem in zip(table, problems, strict=True):
            responses.update(zip(named.keys, problem, strict=True))
    rank, world_size = place or (dist.get_rank(), dist.get_world_size())
    owners: list[list[int | None]] = [[None] * len(trusted)]
    owners.append(owners_of(tables[1], estimator, budget, world_size, oversized))
    assigned = [keys_by_rank(*pair, world_size)[rank] for pair in zip(tables, owners, strict=True)]
    spare = min(responses, key=lambda key: responses[key].num_tokens)
    keys = [key for mine in assigned for keys in mine.values() for key in keys if key != spare] + [spare]
    positions = {key: position for position, key in enumerate(keys)}
    trusted_shares, candidate_shares = (build_shares(*pair, positions) for pair in zip(tables, assigned, strict=True))
    return make_row_table([responses[key] for key in keys]), trusted_shares, candidate_shares


def gather(value: Any) -> list[Any]:
    """Return `value` of every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
