# SPDX-License-Identifier: Apache-2.0
"""Rows packed into one line, as verl packs them, with flash attention where it is installed.

Responses have different lengths, so that padding costs something. Without a GPU the packing alone is tried, on SDPA,
which knows rows by their positions too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available

from verl_gradalign.bench.agreement import agreement, is_faithful
from verl_gradalign.bench.cases import QWEN_05B, build_model, tiny
from verl_gradalign.bench.device import chosen_device, one_rank, peak_of
from verl_gradalign.bench.options import Options, Record, Skipped
from verl_gradalign.bench.plain import PlainBench, built, with_checkpointing
from verl_gradalign.bench.reference import reference_scores
from verl_gradalign.bench.timing import side_by_side
from verl_gradalign.probe.engine import PreparedPass, TokenBudget
from verl_gradalign.probe.layout import Layout, packed_layout
from verl_gradalign.probe.plain_engine import PlainEngine
from verl_gradalign.types import TokenRow

FLASH = "flash_attention_2"
REPEATS = 3


class PackedEngine(PlainEngine):
    """A plain engine whose rows stand one behind the other, without padding."""

    def __init__(self, module: nn.Module, rows: Any, temperature: float = 1.0, max_tokens: int = 16384) -> None:
        super().__init__(module, rows, temperature, max_tokens)
        self.budget = TokenBudget(max_tokens, is_padded=False)

    def _layout(self, chosen: Sequence[TokenRow], width: int, rows_per_problem: Sequence[int]) -> Layout:
        return packed_layout([row.num_tokens for row in chosen], width, rows_per_problem)

    def prepare(self, rows: Sequence[int]) -> PreparedPass:
        """Return a pass over the rows; each begins where its positions begin at 0."""
        chosen = [self._rows[row] for row in rows]
        lengths = [row.num_tokens for row in chosen]
        ids_1N = torch.cat([torch.cat([row.prompt, row.response]) for row in chosen]).unsqueeze(0).to(self.device)
        position_1N = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(self.device)

        def run() -> Tensor:
            logits: Tensor = self.module(input_ids=ids_1N, position_ids=position_1N, use_cache=False).logits
            return logits

        return PreparedPass(ids_1N, tuple(accumulate(lengths[:-1], initial=0)), run)


def run(options: Options) -> Iterator[Record]:
    """Yield packed and padded scores against the reference, and what both take."""
    if not options.is_dry_run and not is_flash_attn_2_available():
        raise Skipped("flash_attn is not installed: pip install flash-attn --no-build-isolation")
    device = chosen_device(options.is_dry_run)
    case = replace(tiny(QWEN_05B) if options.is_dry_run else QWEN_05B, is_uneven=True)
    attention = "sdpa" if options.is_dry_run else FLASH
    single = with_checkpointing(build_model(case), case).to(device)
    padded = PlainBench(replace(case, dtype="float32"), device, single)
    reference = reference_scores(single, padded.trusted, padded.candidates)
    del padded, single
    with one_rank(device):
        benches = {
            f"packed, {attention}": PlainBench(case, device, built(case, device, attention), PackedEngine),
            "padded, sdpa": PlainBench(case, device, built(case, device)),
        }
        methods = {name: partial(bench.score, "ghost") for name, bench in benches.items()}
        timings = side_by_side(methods, REPEATS, device)
        for name, method in methods.items():
            found = agreement(method(), reference)
            claim = f"ghost in bf16 agrees with float32: rows {name}"
            peak = peak_of(method, device).highest / 1e9
            record = {"table": "rows", "rows": name, **found, "seconds": timings[name].median, "peak_gb": peak}
            yield {**record, "claim": claim, "holds": is_faithful(found)}
