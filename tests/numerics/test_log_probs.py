# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of chosen tokens and their gradient against torch's log_softmax, in one piece and in chunks.

Shape legend: N positions, V vocabulary, M chosen positions, T response tokens.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from verl_gradalign.probe import objective
from verl_gradalign.probe.engine import PreparedPass
from verl_gradalign.probe.head import response_log_probs
from verl_gradalign.probe.objective import token_log_probs

TOLERANCES = {
    torch.float64: 1e-13,  # of log-probs of order 1 to 100; measured 6.9e-15
    torch.float32: 5e-5,  # measured 3.5e-6
    torch.bfloat16: 1e-2,  # the gradient is rounded to bfloat16, 2^-8; measured 2.7e-3
}
LOG_PROB_TOLERANCE = 5e-5
"""Of log-probs from bfloat16 logits, which are computed in float32; measured 6.1e-6."""


def reference(logits_NV: Tensor, position_M: Tensor, token_M: Tensor, temperature: float) -> Tensor:
    return (logits_NV.double() / temperature).log_softmax(dim=-1)[position_M, token_M]


@settings(max_examples=30, deadline=None)
@given(
    num_positions=st.integers(1, 12),
    vocabulary=st.integers(1, 9),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    chunk=st.sampled_from([1, 10, 2**26]),
    size=st.sampled_from([1.0, 30.0]),
    data=st.data(),
)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_log_probs_and_their_gradient_equal_log_softmax(
    dtype: torch.dtype,
    num_positions: int,
    vocabulary: int,
    temperature: float,
    chunk: int,
    size: float,
    data: st.DataObject,
) -> None:
    chosen = data.draw(st.lists(st.integers(0, num_positions - 1), unique=True, max_size=num_positions))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    logits_NV = (size * torch.randn(num_positions, vocabulary, generator=generator, dtype=torch.float64)).to(dtype)
    position_M = torch.tensor(chosen, dtype=torch.int64)
    token_M = torch.randint(vocabulary, (len(chosen),), generator=generator)
    weight_M = torch.randn(len(chosen), generator=generator, dtype=torch.float64)
    kept = logits_NV.clone()
    leaf_NV, exact_NV = logits_NV.clone().requires_grad_(), logits_NV.double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "CHUNK_ELEMENTS", chunk)
        actual_M = token_log_probs(leaf_NV, position_M, token_M, temperature)
        (actual_M * weight_M.to(actual_M.dtype)).sum().backward()
    expected_M = reference(exact_NV, position_M, token_M, temperature)
    (expected_M * weight_M).sum().backward()
    assert actual_M.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(leaf_NV.detach(), kept)  # the logits are not written to
    tolerance = min(TOLERANCES[dtype], LOG_PROB_TOLERANCE)
    assert ((actual_M - expected_M).abs() <= tolerance * (1.0 + expected_M.abs())).all()
    assert leaf_NV.grad is not None and exact_NV.grad is not None and leaf_NV.grad.dtype == dtype
    scale = 1.0 + weight_M.abs().max().item() / temperature if len(chosen) else 1.0
    assert ((leaf_NV.grad.double() - exact_NV.grad).abs() <= TOLERANCES[dtype] * scale).all()
    others = torch.ones(num_positions, dtype=torch.bool).index_fill(0, position_M, False)
    assert not leaf_NV.grad[others].any()


def test_the_gradient_passes_gradcheck() -> None:
    logits_NV = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    position_M, token_M = torch.tensor([3, 0]), torch.tensor([1, 4])
    assert torch.autograd.gradcheck(lambda logits: token_log_probs(logits, position_M, token_M, 0.7), logits_NV)


def test_a_token_is_predicted_by_the_position_before_it() -> None:
    logits_NV = torch.randn(10, 6, dtype=torch.float64)
    ids_N = torch.randint(6, (10,))
    spans = [(2, 3), (7, 0), (6, 4)]
    passed = PreparedPass(ids_N.view(1, -1), (0,), lambda: logits_NV.unsqueeze(0))
    actual_RT = response_log_probs(passed, spans, temperature=0.5, head=None)
    assert actual_RT.shape == (3, 4)
    log_prob_NV = (logits_NV / 0.5).log_softmax(dim=-1)
    for row, (start, length) in enumerate(spans):
        for place in range(4):
            expected = log_prob_NV[start + place - 1, ids_N[start + place]] if place < length else torch.zeros(())
            torch.testing.assert_close(actual_RT[row, place], expected.double())
