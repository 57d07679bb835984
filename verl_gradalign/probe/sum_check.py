# SPDX-License-Identifier: Apache-2.0
"""Whether the contributions of an update's rows add up to its gradient: an audit that costs no pass.

Before every optimizer step the product of the gradient that lies there with the direction is compared with the sum of
what was measured. A layer that was missed, or a factor that is wrong, shows at once; so does what a truncated direction
leaves out, as far as it matters for the sum.

    with checking_sums(optimizer, SumCheck(module, direction, meter, device, shard_group, data_group)) as check:
        ...                                            # the update
    errors_K = check.largest_errors(norms)             # |g| of each step, before it was clipped

Shape legend: K readings.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from verl_gradalign.probe.direction import Direction, local_inner
from verl_gradalign.probe.fsdp import local_part
from verl_gradalign.probe.gradient import trainable_parameters
from verl_gradalign.probe.ranks import summed
from verl_gradalign.probe.update import UpdateMeter


@dataclass
class SumCheck:
    """Compares sums with gradients, mini-batch by mini-batch. Steps that the optimizer does not take are not known."""

    module: nn.Module
    direction: Direction
    meter: UpdateMeter
    device: torch.device
    shard_group: ProcessGroup | None
    data_group: ProcessGroup | None
    mini_batch: int = 0
    """Which one of the update runs now: to be counted by the caller."""
    _found: dict[int, tuple[list[float], float]] = field(default_factory=dict)
    """Of each mini-batch: the readings' sums, and the cosine of its (clipped) gradient with the direction."""

    def before_step(self, *_: Any) -> None:
        """Note the sums and the gradient of the mini-batch: an optimizer's step-pre-hook. Collective."""
        sum_K = self.meter.take_sum()
        if sum_K is None:
            return
        sum_K = summed(sum_K.clone(), self.data_group)
        grads = [parameter.grad for _, parameter in trainable_parameters(self.module)]
        shards = tuple(None if grad is None else local_part(grad).detach() for grad in grads)
        products = [local_inner(shards, other, self.device) for other in (self.direction.shards, shards)]
        product, squared_norm = summed(torch.stack(products), self.shard_group).tolist()
        cosine = product / math.sqrt(squared_norm) if squared_norm > 0 else 0.0
        self._found[self.mini_batch] = sum_K.tolist(), cosine

    def largest_errors(self, norms: Sequence[float]) -> list[float]:
        """Return each reading's largest |sum - <g, v / |v|>| / |g| of the mini-batches; none if none was compared.

        `norms` are the gradients' norms before clipping, by mini-batch: clipping scales both sides of the comparison.
        """
        errors = [
            [_error(total, norms[index], cosine) for total in sums]
            for index, (sums, cosine) in self._found.items()
            if index < len(norms)
        ]
        # nan, if any is: a gradient without agreement.
        return torch.tensor(errors).amax(dim=0).tolist() if errors else []


def _error(total: float, norm: float, cosine: float) -> float:
    return abs(total / norm - cosine) if norm > 0 else (0.0 if total == 0 else math.inf)


@contextmanager
def checking_sums(optimizer: torch.optim.Optimizer, check: SumCheck) -> Iterator[SumCheck]:
    """Have the check look at every gradient that the optimizer is about to take; leave no hook."""
    handle = optimizer.register_step_pre_hook(check.before_step)
    try:
        yield check
    finally:
        handle.remove()
