# SPDX-License-Identifier: Apache-2.0
"""The oracle: per-problem gradients by autograd, written independently of the estimators.

One unpadded response at a time, log-softmax by hand, on a plain unsharded model. Slow, and only as precise as the
model it is given: hand it a float64 copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def problem_gradient(
    model: torch.nn.Module,
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Return the gradient of sum_t c_t log pi(y_t) over the responses of one problem, by parameter name.

    Shapes: one 1-D tensor of token ids, and one of as many coefficients, per response. Empty responses add nothing.
    Units: the loss's own; log-probs at `temperature`.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for prompt, response, coefficient in zip(prompts, responses, coefficients, strict=True):
        if len(response) == 0:
            continue
        tokens = torch.cat([prompt, response]).unsqueeze(0)
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
        log_probs = logits.gather(1, response.unsqueeze(1)).squeeze(1) - torch.logsumexp(logits, dim=1)
        loss = (coefficient.to(log_probs.dtype) * log_probs).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
    return total


def flatten(gradient: dict[str, Tensor]) -> Tensor:
    """Return the gradient as one vector, parameters in their order."""
    return torch.cat([part.reshape(-1) for part in gradient.values()])
