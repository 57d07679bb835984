# SPDX-License-Identifier: Apache-2.0
"""Sums and maxima over the ranks of a process group, or over the one there is where there is no group."""

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp


def summed(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add the ranks' values up, in place, and return them. Collective.

    They lie on the device that the group reduces on: NCCL reduces nothing that lies in CPU memory.
    """
    if group is not None:
        torch.distributed.all_reduce(values, group=group)
    return values


def largest(value: int, group: ProcessGroup | None, device: torch.device | int) -> int:
    """Return the largest `value` of the ranks; every rank must run as many passes as any other. Collective."""
    if group is None:
        return value
    of_all = torch.tensor(value, device=device)
    torch.distributed.all_reduce(of_all, op=ReduceOp.MAX, group=group)
    return int(of_all.item())
