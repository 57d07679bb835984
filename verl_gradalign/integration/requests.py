# SPDX-License-Identifier: Apache-2.0
"""Which rows go to which rank in a scoring call. Runs on the driver, on keys and lengths only.

Trusted problems, and candidates for an estimator that works on all ranks together, are spread row by row. Other
candidates stay whole on one rank, unless they are larger than a micro-batch and are to be scored by `backward`.
"""

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

from omegaconf import DictConfig, OmegaConf
from transfer_queue import KVBatchMeta

from verl_gradalign.config import GradAlignConfig, ProbeConfig
from verl_gradalign.probe.audit import goes_to_backward
from verl_gradalign.probe.call import DirectionRequest, ScoringRequest
from verl_gradalign.probe.engine import TokenBudget
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.passes import assign
from verl_gradalign.selection.groups import Group
from verl_gradalign.selection.scores import score_of
from verl_gradalign.types import ProblemRows

OVERSIZED = {
    "accumulate": "run in several of them",
    "sketch": "run in several of them, and their norms are estimated (gradalign/probe/oversized_norm_error)",
    "backward": "are scored one at a time, slowly",
    "stop": "will stop the run",
}
"""What problems larger than a micro-batch do."""
IN_SEVERAL = ("accumulate", "sketch")
"""Where each of their responses must fit."""


@dataclass(frozen=True)
class RowUse:
    """How rows run through the model, as far as not every model can be scored so."""

    sharing_key: str
    num_sharing: int
    """Ranks that have slices of the same rows, and the key that says so."""
    is_fused: bool
    """Whether verl replaces the model's forward by one with fused kernels."""
    cuts_problems: str
    """How `probe.oversized` adds a gradient up over several micro-batches for its norm; "" where no norm may be so."""


@dataclass(frozen=True)
class ProblemKeys:
    """A problem as the driver knows it."""

    uid: str
    keys: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of each key's row, prompt included."""
    halves: tuple[int, ...] = ()
    """The half that each key's row counts to, half 0 first."""
    coefficients: tuple[float, ...] = ()
    """Of each key's row; nan where its tokens have different ones."""

    @property
    def is_split(self) -> bool:
        return len(set(self.halves)) == 2

    @property
    def size(self) -> ProblemRows:
        """The problem as a rank without any of its rows sees it."""
        return ProblemRows(self.uid, (), len(self.keys), sum(self.lengths), max(self.lengths, default=0))


def sequence_parallel(verl_config: DictConfig) -> tuple[str, int]:
    """Return how many ranks of the actor have slices of the same rows, and the key that says so."""
    keys = [f"actor_rollout_ref.actor.{part}ulysses_sequence_parallel_size" for part in ("", "fsdp_config.")]
    sizes = {key: int(OmegaConf.select(verl_config, key) or 1) for key in keys}
    # As verl's own configuration: the actor's key goes before its engine's, unless it is 1.
    return next(((key, size) for key, size in sizes.items() if size > 1), (keys[0], 1))


def takes_sketch(config: GradAlignConfig) -> bool:
    """Return whether dot products with the candidates' own gradient are taken of sketches."""
    return score_of(config.score).is_of_candidates and config.probe.pool_dots == "sketch"


def fate_of_oversized(config: GradAlignConfig) -> str:
    """Return the key of `OVERSIZED` that is true of this configuration."""
    if takes_sketch(config):
        return "stop"
    estimator, oversized = ESTIMATORS[config.estimator], config.probe.oversized
    has_sum = estimator.needs_whole_problems and estimator.gives_norm
    return oversized if has_sum or oversized == "stop" else "accumulate"


def token_budget(probe: ProbeConfig, verl_config: DictConfig) -> TokenBudget:
    """Return what a micro-batch of the actor may hold: as configured, else as for its update.

    Where several ranks have slices of the same rows, it is what these hold together.
    """
    actor = verl_config.actor_rollout_ref.actor
    max_tokens = probe.max_tokens_per_rank
    if max_tokens is None and actor.use_dynamic_bsz:
        max_tokens = actor.ppo_max_token_len_per_gpu
    if max_tokens is not None:
        max_tokens *= sequence_parallel(verl_config)[1]
    else:
        longest = verl_config.data.max_prompt_length + verl_config.data.max_response_length
        max_tokens = (actor.ppo_micro_batch_size_per_gpu or 1) * longest
    return TokenBudget(int(max_tokens), is_padded=not verl_config.actor_rollout_ref.model.use_remove_padding)


def longest_problem(config: GradAlignConfig, verl_config: DictConfig) -> tuple[int, int]:
    """Return the positions that a candidate may take, and one response of it alone."""
    data = verl_config.data
    row = data.max_prompt_length + data.max_response_length
    return (config.curriculum.n or verl_config.actor_rollout_ref.rollout.n) * row, row


def row_use(config: GradAlignConfig, verl_config: DictConfig) -> RowUse:
    """Return how rows run through the model."""
    is_cut = longest_problem(config, verl_config)[0] > token_budget(config.probe, verl_config).max_tokens
    fate = fate_of_oversized(config) if is_cut and not config.measures_in_update else ""
    is_fused = bool(verl_config.actor_rollout_ref.model.get("use_fused_kernels"))
    return RowUse(*sequence_parallel(verl_config), is_fused, fate if fate in IN_SEVERAL else "")


def owners_of(
    problems: Sequence[ProblemKeys], estimator: str, budget: TokenBudget, dp_size: int, oversized: str
) -> list[int | None]:
    """Return the rank that scores each candidate whole, None where its rows are spread over all ranks."""
    if not ESTIMATORS[estimator].needs_whole_problems:
        return [None] * len(problems)
    is_spread = goes_to_backward(ESTIMATORS[estimator], oversized)
    fits = [index for index, problem in enumerate(problems) if not is_spread or budget.holds([problem.size])]
    owners: list[int | None] = [None] * len(problems)
    for index, rank in zip(fits, assign([problems[i].size.num_tokens for i in fits], dp_size), strict=True):
        owners[index] = rank
    return owners


def keys_by_rank(
    problems: Sequence[ProblemKeys], owners: Sequence[int | None], dp_size: int
) -> list[dict[int, list[str]]]:
    """Return, for every data-parallel rank, the keys of the rows that it computes, by their problem's position.

    Spread rows go to the ranks in turn, each problem starting one rank further on: no rank always has the most rows.
    """
    dealt: list[dict[int, list[str]]] = [{} for _ in range(dp_size)]
    for i, (problem, owner) in enumerate(zip(problems, owners, strict=True)):
        for k, key in enumerate(problem.keys):
            rank = owner if owner is not None else (k + i) % dp_size
            dealt[rank].setdefault(i, []).append(key)
    return dealt


class Shares(Sequence[ProblemRows]):
    """Problems as one rank sees them: all of them, and of each the rows that are the rank's.

    What all ranks know is sent as columns: objects for thousands of problems and dozens of ranks would take seconds.
    """

    def __init__(self, problems: Sequence[ProblemKeys], mine: Mapping[int, ProblemRows]) -> None:
        self._uid = [problem.uid for problem in problems]
        self._counts = [array("q", column) for column in zip(*map(_counts_of, problems), strict=True)]
        self._mine = mine

    def of_rank(self, mine: Mapping[int, ProblemRows]) -> "Shares":
        """Return the same problems as another rank sees them."""
        other = Shares((), mine)
        other._uid, other._counts = self._uid, self._counts
        return other

    def __len__(self) -> int:
        return len(self._uid)

    @overload
    def __getitem__(self, index: int) -> ProblemRows: ...
    @overload
    def __getitem__(self, index: slice) -> list[ProblemRows]: ...
    def __getitem__(self, index: int | slice) -> ProblemRows | list[ProblemRows]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        if place in self._mine:
            return self._mine[place]
        num_rows, num_tokens, longest_row, is_split = (column[place] for column in self._counts)
        return ProblemRows(self._uid[place], (), num_rows, num_tokens, longest_row, bool(is_split))


def _counts_of(problem: ProblemKeys) -> tuple[int, int, int, int]:
    size = problem.size
    return size.num_rows, size.num_tokens, size.longest_row, int(problem.is_split)


def rows_of_rank(
    problems: Sequence[ProblemKeys], mine: Mapping[int, Sequence[str]], positions: Mapping[str, int]
) -> dict[int, ProblemRows]:
    """Return one rank's part of problems, given its keys and the position of each key in its row table."""
    rows = {}
    for i, keys in mine.items():
        problem = problems[i]
        half_of = dict(zip(problem.keys, problem.halves, strict=True)) if problem.is_split else {}
        rows[i] = replace(
            problem.size,
            rows=tuple(positions[key] for key in keys),
            is_split=problem.is_split,
            halves=tuple(half_of[key] for key in keys) if half_of else (),
        )
    return rows


def build_shares(
    problems: Sequence[ProblemKeys], mine: Mapping[int, Sequence[str]], positions: Mapping[str, int]
) -> Shares:
    """Return problems as the rank sees them that has these keys, at these positions of its row table."""
    return Shares(problems, rows_of_rank(problems, mine, positions))


def audited_problems(config: GradAlignConfig, num_problems: int, step: int, num_scorings: int) -> tuple[int, ...]:
    """Return which candidates are scored exactly too, drawn at random: the canary's, or the fidelity meter's.

    `num_scorings` counts the scoring calls before this one.
    """
    probe = config.probe
    if config.estimator == "backward":
        return ()
    if ESTIMATORS[config.estimator].is_exact:
        due = probe.canary_interval > 0 and num_scorings % probe.canary_interval == 0
        wanted = probe.canary_problems if due else 0
    else:
        wanted = probe.fidelity_problems
    return drawn(f"{config.seed} {step} audit", wanted, num_problems)


def drawn(seed: str, wanted: int, num_problems: int) -> tuple[int, ...]:
    """Return so many of the problems' positions at random, ascending; all of them if there are not more."""
    return tuple(sorted(random.Random(seed).sample(range(num_problems), min(wanted, num_problems))))


def build_requests(
    batch: KVBatchMeta,
    trusted: Mapping[str, Sequence[Group]],
    candidates: Sequence[Group],
    dp_rank_of: Sequence[int],
    request: ScoringRequest,
) -> tuple[list[KVBatchMeta], list[ScoringRequest]]:
    """Return what each worker receives: the keys of its rows, and `request` with its share of the problems.

    `trusted` holds each trusted set's groups by the set's name; `request.set_weights` says which sets are measured. Of
    all groups only the live ones are: the others' gradients are zero.
    """
    length = {key: tag["seq_len"] for key, tag in zip(batch.keys, batch.tags, strict=True)}
    names = list(request.set_weights)
    tables = [_table(groups, length) for groups in (*(trusted.get(name, ()) for name in names), candidates)]
    owners: list[list[int | None]] = [[None] * len(table) for table in tables[:-1]]
    dp_size, oversized = max(dp_rank_of) + 1, request.probe.oversized
    owners.append(owners_of(tables[-1], request.estimator, request.budget, dp_size, oversized))
    dealt = _deal(batch.partition_id, tables, owners, length, dp_rank_of)
    return [meta for meta, _, _ in dealt], [
        replace(request, trusted=dict(zip(names, mine[:-1], strict=True)), candidates=mine[-1], coefficients=of_rows)
        for _, mine, of_rows in dealt
    ]


def build_direction_requests(
    batch: KVBatchMeta,
    trusted: Mapping[str, Sequence[Group]],
    dp_rank_of: Sequence[int],
    request: DirectionRequest,
) -> tuple[list[KVBatchMeta], list[DirectionRequest]]:
    """Return what each worker receives to make the direction; as `build_requests`, without candidates.

    At least one group must be live.
    """
    length = {key: tag["seq_len"] for key, tag in zip(batch.keys, batch.tags, strict=True)}
    names = list(request.set_weights)
    tables = [_table(trusted.get(name, ()), length) for name in names]
    owners: list[list[int | None]] = [[None] * len(table) for table in tables]
    dealt = _deal(batch.partition_id, tables, owners, length, dp_rank_of)
    return [meta for meta, _, _ in dealt], [
        replace(request, trusted=dict(zip(names, mine, strict=True)), coefficients=of_rows)
        for _, mine, of_rows in dealt
    ]


def _deal(
    partition_id: str,
    tables: Sequence[Sequence[ProblemKeys]],
    owners: Sequence[Sequence[int | None]],
    length: Mapping[str, int],
    dp_rank_of: Sequence[int],
) -> list[tuple[KVBatchMeta, list[Shares], tuple[float, ...]]]:
    """Return each worker's keys, the shortest row last, its shares of every table's problems, its rows' coefficients.

    There are no coefficients where that of some row is not known.
    """
    dp_size = max(dp_rank_of) + 1
    assigned = [keys_by_rank(table, owner, dp_size) for table, owner in zip(tables, owners, strict=True)]
    spare = min((key for table in tables for problem in table for key in problem.keys), key=length.__getitem__)
    known = [Shares(table, {}) for table in tables]
    coefficient_of = {
        key: coefficient
        for table in tables
        for problem in table
        for key, coefficient in zip(problem.keys, problem.coefficients, strict=False)
    }
    is_known = all(len(problem.coefficients) == len(problem.keys) for table in tables for problem in table)
    dealt = []
    for dp_rank in range(dp_size):
        mine = [table[dp_rank] for table in assigned]
        keys = [key for of_table in mine for keys in of_table.values() for key in keys if key != spare] + [spare]
        positions = {key: i for i, key in enumerate(keys)}
        # Every column, as in verl's update: a choice of them would be another pass than training's.
        meta = KVBatchMeta(keys=keys, tags=[{} for _ in keys], partition_id=partition_id)
        coefficients = tuple(coefficient_of[key] for key in keys) if is_known else ()
        parts = (rows_of_rank(table, of_table, positions) for table, of_table in zip(tables, mine, strict=True))
        shares = [whole.of_rank(part) for whole, part in zip(known, parts, strict=True)]
        dealt.append((meta, shares, coefficients))
    return [dealt[dp_rank] for dp_rank in dp_rank_of]


def _table(groups: Sequence[Group], length: Mapping[str, int]) -> list[ProblemKeys]:
    live = [g for g in groups if g.is_live]
    return [
        ProblemKeys(g.problem.uid, g.keys, tuple(length[key] for key in g.keys), g.halves, g.coefficients) for g in live
    ]
