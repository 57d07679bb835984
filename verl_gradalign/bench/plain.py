# SPDX-License-Identifier: Apache-2.0
"""The update, the estimators and measuring in the update, on a transformers model without verl.

In half precision, on several ranks, or with parameters in CPU memory under FSDP2, as verl's actor is; else plain.

    bench = PlainBench(case, device)
    bench.update(), bench.score("ghost")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from verl_gradalign.bench.cases import NUM_TRUSTED, Case, build_model, draw_problems
from verl_gradalign.config import ProbeConfig
from verl_gradalign.probe.direction import compute_direction
from verl_gradalign.probe.direction_gather import DirectionGather
from verl_gradalign.probe.estimators import ESTIMATORS
from verl_gradalign.probe.gradient import leave_no_trace
from verl_gradalign.probe.layout import Layout
from verl_gradalign.probe.passes import assign
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.probe.products import product_points
from verl_gradalign.probe.replica import Replica, cut_replica, whole_replica
from verl_gradalign.probe.update import UNIFORM_HALF, measuring
from verl_gradalign.types import ProblemRows, ProblemScores, TokenRow


def with_checkpointing(module: Any, case: Case) -> Any:
    """Return the module in train mode, recomputing activations if the case asks for it."""
    if case.has_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return module.train()


def sharded(
    module: nn.Module, layers: Sequence[nn.Module], dtype: str, device: torch.device, is_offloaded: bool = False
) -> nn.Module:
    """Return the module under FSDP2 over all ranks: it computes in `dtype` and reduces in float32, as verl has it."""
    # Said, as torch would take the accelerator where there is one, in a dry run too.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()) if is_offloaded else OffloadPolicy()
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
    fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload)
    return module


def built(case: Case, device: torch.device, attention: str = "sdpa") -> nn.Module:
    """Return the case's model on the device, under FSDP2 where it computes in half precision or on several ranks."""
    module = with_checkpointing(build_model(case, attention), case).to(device)
    is_whole = case.num_ranks == 1 and case.dtype == "float32"
    return module if is_whole else sharded(module, list(module.model.layers), case.dtype, device)


class PlainBench:
    """A model, its optimizer, and the rows of a case.

    `module`: one that is there already; `engine_class` gives its passes another form.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        module: nn.Module | None = None,
        engine_class: type[PlainEngine] = PlainEngine,
    ) -> None:
        self.module = module = built(case, device) if module is None else module
        self.num_parameters = sum(parameter.numel() for parameter in module.parameters())
        self.problems = draw_problems(case)
        self.optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)
        rows = [row for problem in self.problems for row in problem]
        self.engine = engine_class(module, rows, 1.0, case.max_tokens)
        shares = shares_of(self.problems)
        owners = assign([share.num_tokens for share in shares], case.num_ranks)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.whole = [
            share if owner == rank else replace(share, rows=()) for share, owner in zip(shares, owners, strict=True)
        ][NUM_TRUSTED:]
        self.spread = [replace(share, rows=share.rows[rank :: case.num_ranks]) for share in shares]
        with leave_no_trace(module):
            self.direction = compute_direction(self.engine, self.spread[:NUM_TRUSTED])

    @property
    def trusted(self) -> list[list[TokenRow]]:
        return self.problems[:NUM_TRUSTED]

    @property
    def candidates(self) -> list[list[TokenRow]]:
        return self.problems[NUM_TRUSTED:]

    @property
    def num_tokens(self) -> int:
        """Return the tokens of all candidates."""
        return sum(row.num_tokens for problem in self.candidates for row in problem)

    def update(self) -> None:
        """Take one training step on all candidates."""
        self.engine.backward(self.spread[NUM_TRUSTED:])
        self.step()

    def update_with_logits(self) -> None:
        """The same by passes that form logits, as verl's do."""
        self.gradient_with_logits()
        self.step()

    def measured_update(self, rank: int | None = None) -> Tensor:
        """The same, measured in passing; return each row's part of <g, v>, of this rank.

        `rank`: along the direction cut to it, which is made first; None: along the whole.
        """
        contribution_R = self.measured_gradient(rank)
        self.step()
        return contribution_R

    def gradient_with_logits(self) -> None:
        """Add the candidates' gradient to `.grad`, by passes that form logits."""
        self.engine.backward(self.spread[NUM_TRUSTED:], lambda rows, layout: None)

    def measured_gradient(self, rank: int | None = None) -> Tensor:
        """Add the candidates' gradient to `.grad`, measured in passing; see `measured_update`."""
        candidates = self.spread[NUM_TRUSTED:]
        with leave_no_trace(self.module):
            reading = self._replica(rank).reading
        place = {row: index for index, row in enumerate(row for problem in candidates for row in problem.rows)}
        device = self.engine.device
        with measuring(self.module, [reading], len(place), device, UNIFORM_HALF) as meter:

            def note(rows: Sequence[int], layout: Layout) -> None:
                # The loss is counted once for each rank, as gradients are averaged over them.
                units = self.engine.gradient_scale / (1 if self.engine.data_group is None else dist.get_world_size())
                meter.begin([place[row] for row in rows], layout, units, torch.float32)

            self.engine.backward(candidates, note)
            meter.end()
        return meter.contribution_KR[0]

    def _replica(self, rank: int | None) -> Replica:
        gather, dtype = DirectionGather(self.module, self.direction, self.engine.device), self._compute_dtype
        if rank is None:
            return whole_replica(gather, product_points(self.module), dtype)
        points = product_points(self.module, are_factored=True)
        return cut_replica(gather, points, rank, self.engine.data_group, dtype)

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        policy = getattr(self.module, "_get_fsdp_state", None)
        return None if policy is None else policy()._mp_policy.param_dtype

    def step(self) -> None:
        """Take the optimizer's step with the gradient there is."""
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def score(self, estimator: str, config: ProbeConfig | None = None) -> ProblemScores:
        """Score all candidates."""
        method = ESTIMATORS[estimator](config)
        problems = self.whole if method.needs_whole_problems else self.spread[NUM_TRUSTED:]
        with leave_no_trace(self.module):
            return method.score(self.engine, problems, self.direction)


def shares_of(problems: Sequence[Sequence[TokenRow]]) -> list[ProblemRows]:
    """Return each problem's rows, which follow one another in one table."""
    shares, first = list[ProblemRows](), 0
    for index, problem in enumerate(problems):
        lengths = [row.num_tokens for row in problem]
        rows = tuple(range(first, first + len(problem)))
        shares.append(ProblemRows(str(index), rows, len(problem), sum(lengths), max(lengths)))
        first += len(problem)
    return shares
