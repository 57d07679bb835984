# SPDX-License-Identifier: Apache-2.0
"""What every estimator must agree with: each problem's gradient by plain autograd in float64.

One response at a time, unpadded, unpacked, unsharded, with the log-softmax written out: slow, and with nothing in
common with the code it checks but the model.

    grads = problem_gradients_float64(model, [[TokenRow(prompt, response, coefficient)]], temperature=1.0)

Shape legend: S tokens of prompt and response, T response tokens, V vocabulary, G all trainable numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from verl_gradalign.types import TokenRow


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
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in parameters:
        if parameter.dtype != torch.float64:
            raise ValueError(f"{name} is {parameter.dtype}; the oracle needs float64, call model.double() on a copy")
    leaves = [parameter for _, parameter in parameters]
    gradients = []
    for responses in problems:
        total_G = torch.zeros(sum(leaf.numel() for leaf in leaves), dtype=torch.float64, device=leaves[0].device)
        for response in responses:
            if response.response.numel():
                loss = (response.coefficient.double() * log_probs(model, response, temperature)).sum()
                grads = torch.autograd.grad(loss, leaves, allow_unused=True)
                total_G += torch.cat([_flat(grad, leaf) for grad, leaf in zip(grads, leaves, strict=True)])
        gradients.append(total_G)
    return gradients


def _flat(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf).flatten() if grad is None else grad.flatten()


def log_probs(model: nn.Module, response: TokenRow, temperature: float) -> Tensor:
    """Return log pi(y_t) of a response's tokens, differentiable."""
    ids_S = torch.cat([response.prompt, response.response]).to(next(model.parameters()).device)
    logits_SV = model(input_ids=ids_S.unsqueeze(0), use_cache=False).logits[0] / temperature
    # The logits at position s predict the token at s + 1.
    first = response.prompt.numel() - 1
    logits_TV = logits_SV[first : first + response.response.numel()]
    peak_T1 = logits_TV.max(dim=-1, keepdim=True).values.detach()
    log_total_T = (logits_TV - peak_T1).exp().sum(dim=-1).log() + peak_T1.squeeze(-1)
    chosen_T = logits_TV.gather(-1, ids_S[response.prompt.numel() :].unsqueeze(-1)).squeeze(-1)
    return chosen_T - log_total_T
