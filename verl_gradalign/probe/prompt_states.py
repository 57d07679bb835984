# SPDX-License-Identifier: Apache-2.0
"""The policy's hidden states over prompts, from one forward pass without generation, gradient or logits.

    state_P2H = prompt_states(engine, num_prompts)

The states are the output layer's inputs. FSDP does not allow a part of the model to be called alone, so the whole model
runs, and a hook hands the output layer one position of each line: logits over the vocabulary are never formed.

Shape legend: P prompts, H hidden size, N flattened positions.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.head import output_layer_of
from verl_gradalign.probe.passes import pack
from verl_gradalign.probe.ranks import largest
from verl_gradalign.types import ProblemRows

REMEDY = "Remedy: take prompt out, e.g. gradalign.forecast.features=[source,text]"


@torch.no_grad()
def prompt_states(engine: GradientEngine, num_prompts: int) -> Tensor:
    """Return each prompt's last hidden state at its last position, and its mean over the prompt. Collective.

    The prompts are this rank's first `num_prompts` rows, which may be none; ranks may hold different numbers. A prompt
    larger than the budget runs alone.

    Shapes: (prompts, 2 x hidden), float32 on the CPU.
    Raises: ValueError if the model names no output layer, RuntimeError if it does not call it.
    """
    lengths = [engine.row_length(row) for row in range(num_prompts)]
    rows = [ProblemRows(f"prompt {row}", (row,), 1, length, length) for row, length in enumerate(lengths)]
    budget = replace(engine.budget, max_tokens=max(engine.budget.max_tokens, *lengths, 0))
    batches = pack(rows, budget)
    # Every pass gathers parameters: a rank that ran fewer would leave the others waiting. One at least, so that all
    # know the width.
    num_batches = largest(max(1, len(batches)), engine.data_group, engine.device)
    found: dict[int, Tensor] = {}
    with _states_of(engine.module) as seen:
        for batch in batches + [[]] * (num_batches - len(batches)):
            states = _run(engine, batch or [engine.spare_row], seen)
            found |= zip(batch, states, strict=False)
    return torch.stack([found[row] for row in range(num_prompts)]) if num_prompts else states[:0]


def _run(engine: GradientEngine, rows: Sequence[int], seen: list[Tensor]) -> Tensor:
    """Return the rows' last states beside their means, (rows, 2 x hidden)."""
    seen.clear()
    passed = engine.prepare(rows)
    passed.run()
    if len(seen) != 1 or seen[0].shape[:2] != passed.ids.shape:
        shapes = [tuple(states.shape) for states in seen]
        trouble = f"the output layer was given {shapes} for positions {tuple(passed.ids.shape)}, not one state for each"
        raise RuntimeError(f"gradalign.forecast.features: {trouble}. {REMEDY}.")
    state_NH = seen.pop().flatten(0, 1)
    # Means over long prompts would drown in half precision.
    state_NH = state_NH.to(torch.promote_types(state_NH.dtype, torch.float32))
    spans = [state_NH[start : start + engine.row_length(row)] for start, row in zip(passed.starts, rows, strict=True)]
    return torch.stack([torch.cat([span_TH[-1], span_TH.mean(dim=0)]) for span_TH in spans]).float().cpu()


@contextmanager
def _states_of(root: nn.Module) -> Iterator[list[Tensor]]:
    """Yield the list that the output layer's inputs are put into, one for each pass."""
    head = output_layer_of(root)
    if head is None:
        trouble = f"prompt needs the output layer, which {type(root).__name__} does not name (get_output_embeddings)"
        raise ValueError(f"gradalign.forecast.features: {trouble}. {REMEDY}.")
    seen: list[Tensor] = []

    def take(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(inputs[0])
        return (inputs[0][:, :1], *inputs[1:])

    hook = head.register_forward_pre_hook(take)
    try:
        yield seen
    finally:
        hook.remove()
