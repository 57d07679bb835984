# SPDX-License-Identifier: Apache-2.0
"""Log-probs from the output layer (the head) without logits: of response tokens, some of the vocabulary at a time.

Logits over a vocabulary of 150,000 and their gradient take more memory than all else in a pass. Here the head, while it
is called by the model, gives the tokens' log-probs in place of logits: blocks of the vocabulary give the sum of
exponentials, and once more, in the backward pass, the gradient. A norm needs each problem's gradient of a weight whole
in its positions, but not in its outputs; so blocks are of outputs, and taps add up what a layer rule gives of each.

    log_prob_RT = response_log_probs(passed, spans, temperature, plain_head(engine), on_block)

Shape legend: N positions of a pass, M response tokens, H hidden features, V vocabulary, B a block of it, T tokens of a
response, R rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _global_forward_hooks

from verl_gradalign.probe import sizes
from verl_gradalign.probe.engine import GradientEngine, HeadBlock, OnBlock, PreparedPass
from verl_gradalign.probe.fsdp import reshard
from verl_gradalign.probe.gradient import in_eval_mode
from verl_gradalign.probe.objective import token_log_probs
from verl_gradalign.probe.ranks import largest
from verl_gradalign.probe.tap_points import is_own_hook

Spans = Sequence[tuple[int, int]]
"""Of each row its response's first position in the flattened pass, and its number of tokens."""


def output_layer_of(root: nn.Module) -> nn.Module | None:
    """Return the model's output layer, None if it names none."""
    # FSDP wrappers pass attributes on to the model; transformers and PEFT models answer this call.
    get: Any = getattr(root, "get_output_embeddings", lambda: None)
    head: nn.Module | None = get()
    return head


_found: WeakKeyDictionary[nn.Module, tuple[Any, bool]] = WeakKeyDictionary()
"""By model, whether what it puts out is its head's output as it is, and the hooks that it had when that was found."""


def plain_head(engine: GradientEngine) -> nn.Linear | None:
    """Return the output layer if it is a linear layer whose output the model puts out unchanged, else None.

    Found by a short pass, once for each model while it has the same hooks: some models scale their logits, or cap them.
    Collective where they have changed.
    """
    root = engine.module
    head = output_layer_of(root)
    # With a forward of its own (a kernel's, a wrapper's) it does something else than is done in its place here.
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return None
    # One that reads the output would be given log-probs.
    if any(not is_own_hook(hook) for hook in head._forward_hooks.values()):
        return None
    hooks = *(tuple(module._forward_hooks) for module in _down_to(head, root)), tuple(_global_forward_hooks)
    known_hooks, is_plain = _found.get(root, (None, False))
    if hooks != known_hooks:
        is_plain = _puts_out_logits_of(head, engine)
        # Of all ranks: rows differ, and so may what rounding makes of them.
        is_plain = not largest(int(not is_plain), engine.data_group, engine.device)
        _found[root] = hooks, is_plain
    return head if is_plain else None


def _down_to(head: nn.Module, root: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules from the root to the head that it is a part of: wrappers, and the model itself."""
    name = next((name for name, module in root.named_modules() if module is head), "")
    parts = name.split(".")
    yield from (root.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1))


@torch.no_grad()
def _puts_out_logits_of(head: nn.Linear, engine: GradientEngine) -> bool:
    seen: list[Tensor] = []

    def compute(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        seen.append(nn.functional.linear(inputs[0], head.weight, head.bias))

    # First of all hooks: FSDP's takes the parameters apart again.
    hook = head.register_forward_hook(compute, prepend=True)
    try:
        with in_eval_mode(engine.module):
            logits = engine.prepare([engine.spare_row]).run()
    finally:
        hook.remove()
        # A backward pass would have done it.
        reshard(engine.module)
    return len(seen) == 1 and seen[0].dtype == logits.dtype and torch.equal(seen[0], logits)


def response_log_probs(
    passed: PreparedPass, spans: Spans, temperature: float, head: nn.Linear | None, on_block: OnBlock | None = None
) -> Tensor:
    """Run the pass; return log softmax(logits / temperature) of the spans' tokens, as far as the pass has them.

    Zero beyond a span's end.

    Without a head (`plain_head`) from whole logits; with one `on_block` is called in the backward pass, with each block
    of its outputs.

    Shapes: (spans, longest).
    Units: natural logarithm; float32, or float64 if the model computes in it.
    """
    ids_N, window = passed.ids.flatten(), passed.window or slice(0, passed.ids.numel())
    # The logits one position before predict a token.
    position_M = torch.cat([torch.arange(start, start + length) for start, length in spans]) - 1
    width = max(length for _, length in spans)
    place_M = torch.cat([torch.arange(length) + index * width for index, (_, length) in enumerate(spans)])
    is_here_M = (position_M >= window.start) & (position_M < window.stop)
    num_tokens, position_M, place_M = len(position_M), position_M[is_here_M], place_M[is_here_M]
    lengths = torch.bincount(place_M // max(width, 1), minlength=len(spans)).tolist()
    token_M, position_M = ids_N[position_M.to(ids_N.device) + 1], (position_M - window.start).to(ids_N.device)
    if head is None:
        log_prob_M = token_log_probs(passed.run().flatten(0, 1), position_M, token_M, temperature)
    else:
        tokens = _Tokens(window.stop - window.start, position_M, token_M, num_tokens, tuple(lengths))
        with _log_probs_of(head, tokens, temperature, on_block):
            log_prob_M = passed.run().flatten()
    flat = log_prob_M.new_zeros(len(spans) * width)
    return flat.index_put((place_M.to(ids_N.device),), log_prob_M).view(len(spans), width)


@dataclass(frozen=True)
class _Tokens:
    """Which log-probs a pass gives."""

    num_positions: int
    """That the head is given."""
    position_M: Tensor
    token_M: Tensor
    num_tokens: int
    """On all ranks that have slices of the same rows: they must cut the vocabulary into the same blocks."""
    lengths: tuple[int, ...]
    """Of each row's response."""


@contextmanager
def _log_probs_of(head: nn.Linear, tokens: _Tokens, temperature: float, on_block: OnBlock | None) -> Iterator[None]:
    """Have the head give the tokens' log-probs, (1, tokens, 1), in place of logits.

    They are the head's output for FSDP too, which gathers parameters again for the backward pass of what it has seen.
    """

    def forward(hidden: Tensor) -> Tensor:
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])
        if len(hidden_NH) != tokens.num_positions:
            shapes = f"{len(hidden_NH)} positions in a pass over {tokens.num_positions}"
            raise RuntimeError(f"the output layer was given {shapes}, so that its tokens are not known")
        anchor = torch.empty(0, device=hidden.device, requires_grad=on_block is not None)
        log_prob_1M1: Tensor = _HeadLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden_NH.index_select(0, tokens.position_M),
            head.weight,
            head.bias,
            tokens,
            temperature,
            anchor,
            on_block,
        )
        return log_prob_1M1

    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        del head.forward


class _HeadLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        tokens: _Tokens,
        temperature: float,
        anchor: Tensor,
        on_block: OnBlock | None,
    ) -> Tensor:
        blocks, token_M = _blocks(tokens.num_tokens, len(weight_VH)), tokens.token_M
        ctx.blocks, ctx.tokens, ctx.temperature, ctx.on_block = blocks, tokens, temperature, on_block
        ctx.dtype = _compute_dtype(hidden_MH, weight_VH)
        input_MH = hidden_MH.to(ctx.dtype)
        # Float32 or better: half precision would round the log-probs whose differences estimators take.
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        log_total_M = torch.full(token_M.shape, -torch.inf, dtype=dtype, device=hidden_MH.device)
        target_M, kept = torch.zeros_like(log_total_M), []
        for block in blocks:
            logits_MB = _logits(input_MH, weight_VH, bias_V, block)
            if len(blocks) == 1 and any(ctx.needs_input_grad):
                kept = [logits_MB]  # as large as a block may be; of several, each is computed twice
            scaled_MB = logits_MB.to(dtype, copy=bool(kept)).div_(temperature)
            place_M1, is_inside_M = _places(token_M, block)
            target_M = torch.where(is_inside_M, scaled_MB.gather(-1, place_M1).squeeze(-1), target_M)
            log_total_M = torch.logaddexp(log_total_M, _log_sum_exp_(scaled_MB))
            del logits_MB, scaled_MB  # before the next block's are made
        ctx.save_for_backward(hidden_MH, weight_VH, bias_V, log_total_M, *kept)
        # Not a view, which a hook of FSDP2's on it could not hold on to.
        return (target_M - log_total_M)[None, :, None].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, bias_V, log_total_M, *kept = ctx.saved_tensors
        tokens: _Tokens = ctx.tokens
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        input_MH, factor_M1 = hidden_MH.to(ctx.dtype), (grads[0] / ctx.temperature).view(-1, 1)
        grad_MH = torch.zeros_like(hidden_MH, dtype=log_total_M.dtype) if needs_hidden else None
        grad_VH = torch.zeros_like(weight_VH) if needs_weight else None
        grad_V = torch.zeros_like(bias_V) if needs_bias else None
        for block in ctx.blocks:
            logits_MB = kept[0] if kept else _logits(input_MH, weight_VH, bias_V, block)
            delta_MB = _delta(logits_MB, log_total_M, tokens.token_M, block, ctx.temperature, not kept)
            delta_MB = delta_MB.mul_(factor_M1).to(ctx.dtype)
            if grad_MH is not None:
                grad_MH += _product(delta_MB, weight_VH[block].to(ctx.dtype), grad_MH.dtype)
            if grad_VH is not None:
                grad_VH[block] = delta_MB.T @ input_MH
            if grad_V is not None:
                grad_V[block] = delta_MB.sum(dim=0)
            if ctx.on_block is not None:
                is_last = block.stop == len(weight_VH)
                ctx.on_block(HeadBlock(input_MH, delta_MB, block, is_last, tokens.lengths))
            del logits_MB, delta_MB
        grad_MH = None if grad_MH is None else grad_MH.to(hidden_MH.dtype)
        return grad_MH, grad_VH, grad_V, None, None, None, None


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return what a linear layer called with these would compute in."""
    device = hidden.device.type
    # Autocast leaves float64 alone.
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _blocks(num_tokens: int, num_outputs: int) -> list[slice]:
    """Return blocks of outputs whose logits fit a chunk."""
    size = max(1, sizes.CHUNK_ELEMENTS // max(1, num_tokens))
    return [slice(start, min(start + size, num_outputs)) for start in range(0, num_outputs, size)]


def _logits(input_MH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, block: slice) -> Tensor:
    bias = None if bias_V is None else bias_V[block].to(input_MH.dtype)
    return nn.functional.linear(input_MH, weight_VH[block].to(input_MH.dtype), bias)


def _log_sum_exp_(values_MB: Tensor) -> Tensor:
    """Return the logarithm of each row's sum of exponentials, computed in place: torch's takes a second chunk."""
    largest_M1 = values_MB.amax(dim=-1, keepdim=True)
    # A row of -inf, or with inf in it, keeps it.
    largest_M1 = largest_M1.masked_fill_(largest_M1.isinf(), 0.0)
    return values_MB.sub_(largest_M1).exp_().sum(dim=-1).log_().add_(largest_M1.squeeze(-1))


def _product(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix product; on a GPU not rounded before it is added up, as one product over all blocks is not."""
    is_rounded = first.is_cuda and first.dtype != dtype
    return torch.mm(first, second, out_dtype=dtype) if is_rounded else first @ second


def _delta(
    logits_MB: Tensor, log_total_M: Tensor, token_M: Tensor, block: slice, temperature: float, is_free: bool
) -> Tensor:
    """Return the gradient of each token's log-prob by its logits / temperature: one-hot less softmax.

    `is_free`: whether the logits may be overwritten.
    """
    scaled_MB = logits_MB.to(log_total_M.dtype, copy=not is_free).div_(temperature)
    delta_MB = scaled_MB.sub_(log_total_M.unsqueeze(-1)).exp_().neg_()
    place_M1, is_inside_M = _places(token_M, block)
    return delta_MB.scatter_add_(-1, place_M1, is_inside_M.unsqueeze(-1).to(delta_MB.dtype))


def _places(token_M: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Return each token's place in the block, any where it is outside, and whether it is inside."""
    is_inside_M = (token_M >= block.start) & (token_M < block.stop)
    return (token_M - block.start).clamp(0, block.stop - block.start - 1).unsqueeze(-1), is_inside_M
