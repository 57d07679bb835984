# SPDX-License-Identifier: Apache-2.0
"""What every estimator must agree with: each problem's gradient by plain autograd in float64.

The gradient itself is that of `verl_gradalign.bench.reference`, which has nothing in common with the code it checks but
the model.

    grads = problem_gradients_float64(model, [[TokenRow(prompt, response, coefficient)]], temperature=1.0)

Shape legend: G all trainable numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from verl_gradalign.bench.reference import log_probs, response_gradient
from verl_gradalign.types import TokenRow

__all__ = ["log_probs", "problem_gradients_float64"]


def problem_gradients_float64(
    model: nn.Module, problems: Sequence[Sequence[TokenRow]], temperature: float
) -> list[Tensor]:
    """Return, for each problem, the gradient of sum_t c_t log pi(y_t), flattened in the order of the parameters.

    `model` is an unsharded Hugging Face causal language model whose parameters are float64. Neither its gradients nor
    its parameters are touched. A problem without responses gets zeros.

    Shapes: each result (trainable numbers,), float64; tied parameters once.
    Units: as the coefficients; logits are divided by the temperature before the softmax.
    Raises: ValueError if a trainable parameter is not float64.
    """
    leaves = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in leaves:
        if parameter.dtype != torch.float64:
            raise ValueError(f"{name} is {parameter.dtype}; the oracle needs float64, call model.double() on a copy")
    size, device = sum(parameter.numel() for _, parameter in leaves), leaves[0][1].device
    gradients = []
    for responses in problems:
        total_G = torch.zeros(size, dtype=torch.float64, device=device)
        for response in responses:
            if response.response.numel():
                grads = response_gradient(model, response, temperature)
                total_G += torch.cat([grad.flatten() for grad in grads])
        gradients.append(total_G)
    return gradients
