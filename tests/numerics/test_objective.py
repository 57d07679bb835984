# SPDX-License-Identifier: Apache-2.0
"""The token coefficients are the derivative of verl's own policy loss. Shapes: (R responses, T tokens)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

from verl_gradalign.probe.objective import LOSS_AGG_MODES, token_coefficients

RTOL_FLOAT64 = 1e-12  # the same few operations in another order; measured 4e-16
RTOL_TOKEN_MEAN_OF_SEQUENCE = 1.1e-8  # verl divides by the sequence's token count + 1e-8; measured 1e-8
SCALE = 7.0


def verl_coefficients(advantage_RT: torch.Tensor, mask_RT: torch.Tensor, loss_agg_mode: str) -> torch.Tensor:
    """Return the derivative of verl's vanilla loss by the log-probs at ratio 1, the problem being the whole batch."""
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_dynamic_bsz=False, loss_scale_factor=SCALE
    )
    config.global_batch_info.update(
        dp_size=1,
        batch_num_tokens=mask_RT.sum(),
        global_batch_size=(mask_RT.sum(dim=-1) > 0).sum(),
        loss_scale_factor=SCALE,
    )
    log_prob_RT = torch.full_like(advantage_RT, -1.5, requires_grad=True)
    loss, _ = get_policy_loss_fn("vanilla")(
        old_log_prob=log_prob_RT.detach().clone(),
        log_prob=log_prob_RT,
        advantages=advantage_RT,
        response_mask=mask_RT,
        loss_agg_mode=loss_agg_mode,
        config=config,
    )
    return torch.autograd.grad(loss, log_prob_RT)[0]


@pytest.mark.parametrize("loss_agg_mode", LOSS_AGG_MODES)
@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), seed=st.integers(0, 1000))
def test_coefficients_are_the_derivative_of_verls_loss(loss_agg_mode: str, lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask_RT = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(-1)).double()
    advantage_RT = torch.randn(mask_RT.shape, generator=generator, dtype=torch.float64)
    actual_RT = token_coefficients(advantage_RT, mask_RT, loss_agg_mode, loss_scale_factor=SCALE)
    expected_RT = verl_coefficients(advantage_RT, mask_RT, loss_agg_mode)
    rtol = RTOL_TOKEN_MEAN_OF_SEQUENCE if loss_agg_mode == "seq-mean-token-mean" else RTOL_FLOAT64
    torch.testing.assert_close(actual_RT, expected_RT, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("loss_agg_mode", LOSS_AGG_MODES)
def test_masked_tokens_inside_a_response_get_no_coefficient(loss_agg_mode: str) -> None:
    mask_RT = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    advantage_RT = torch.tensor([[0.5, 2.0, -0.5], [1.0, -3.0, 0.25]], dtype=torch.float64)
    actual_RT = token_coefficients(advantage_RT, mask_RT, loss_agg_mode, loss_scale_factor=SCALE)
    rtol = RTOL_TOKEN_MEAN_OF_SEQUENCE if loss_agg_mode == "seq-mean-token-mean" else RTOL_FLOAT64
    torch.testing.assert_close(actual_RT, verl_coefficients(advantage_RT, mask_RT, loss_agg_mode), rtol=rtol, atol=0.0)


@pytest.mark.parametrize("loss_agg_mode", LOSS_AGG_MODES)
def test_what_lies_under_the_padding_does_not_matter(loss_agg_mode: str) -> None:
    mask_RT = torch.tensor([[1, 1, 0], [0, 0, 0]])
    advantage_RT = torch.tensor([[1.0, -1.0, torch.nan], [torch.inf, torch.nan, torch.nan]])
    coefficient_RT = token_coefficients(advantage_RT, mask_RT, loss_agg_mode, loss_scale_factor=SCALE)
    assert coefficient_RT.isfinite().all()
    assert torch.equal(coefficient_RT != 0, mask_RT.bool())


@pytest.mark.parametrize("loss_agg_mode", LOSS_AGG_MODES)
def test_a_problem_without_response_tokens_gets_zeros(loss_agg_mode: str) -> None:
    coefficient_RT = token_coefficients(torch.ones(2, 3), torch.zeros(2, 3), loss_agg_mode, loss_scale_factor=SCALE)
    assert torch.equal(coefficient_RT, torch.zeros(2, 3))


def test_unknown_mode_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="'batch-mean'"):
        token_coefficients(torch.ones(1, 2), torch.ones(1, 2), "batch-mean")


@pytest.mark.parametrize("factor", [None, 0.0, -2.0, float("nan")])
def test_missing_or_useless_scale_factor_is_named_in_the_error(factor: float | None) -> None:
    with pytest.raises(ValueError, match=f"loss_scale_factor={factor}"):
        token_coefficients(torch.ones(1, 2), torch.ones(1, 2), "seq-mean-token-sum-norm", loss_scale_factor=factor)


def test_shapes_that_differ_are_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        token_coefficients(torch.ones(1, 2), torch.ones(1, 3), "token-mean")
