# SPDX-License-Identifier: Apache-2.0
"""What candidates' advantages need before a selection that training computes only after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size


def add_values(batch: KVBatchMeta, compute_values: Callable[..., Any], workers: Any, eos_token_id: int) -> None:
    """Have the critic value all rows of the batch, by verl's own function, and store the values beside them.

    Rows are dealt to ranks in equal shares, so the batch is filled up with rows that are cleared afterwards.
    """
    keys = set(batch.keys)
    num_ranks = max(workers._query_dispatch_info("actor")) + 1
    whole = KVBatchMeta(
        keys=list(batch.keys), tags=list(batch.tags), partition_id=batch.partition_id, fields=batch.fields
    )
    whole = upsample_batch_to_divisible_size(whole, num_ranks, eos_token_id)
    compute_values(whole, metrics={})
    padding = [key for key in whole.keys if key not in keys]
    if padding:
        tq.kv_clear(keys=padding, partition_id=batch.partition_id)
