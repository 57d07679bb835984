# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of passes over tokens: matrix products and attention, nothing elementwise.

A forward pass takes 2 operations per token and matrix element, a backward pass the same again for activation gradients
and once more for weight gradients; recomputing activations adds a forward pass (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1; Korthikanti et al. 2022, arXiv 2205.05198). Attention adds 2 x row length x features per layer and token,
half of the full square, twice that backwards; it has no weights.
"""

from __future__ import annotations

from verl_gradalign.cost.setting import ModelShape, Setting

__all__ = ["BALANCE_POSITIONS", "forward", "score", "update"]

BALANCE_POSITIONS = {"cpu": 20, "cuda": 1024}
"""As in probe.matrix_scores, whose choice of form is followed here (tests/unit/test_cost.py compares the two)."""
PRODUCT_COST = 1.5


def matmul_parameters(shape: ModelShape) -> int:
    """Return the elements of all matrices that every token is multiplied with: the output layer's, no embedding's."""
    return sum(o * i for o, i in shape.layer_matrices) * shape.num_layers + shape.head_parameters


def forward(shape: ModelShape, tokens_per_row: float) -> float:
    """Return the operations of a forward pass, per token."""
    return 2.0 * matmul_parameters(shape) + attention(shape, tokens_per_row)


def attention(shape: ModelShape, tokens_per_row: float) -> float:
    """Return the operations of causal attention in a forward pass, per token."""
    return 2.0 * tokens_per_row * shape.attention_features * shape.num_layers


def activation_gradients(shape: ModelShape, tokens_per_row: float) -> float:
    return forward(shape, tokens_per_row) + attention(shape, tokens_per_row)


def weight_gradients(shape: ModelShape) -> float:
    return 2.0 * matmul_parameters(shape)


def update(setting: Setting) -> float:
    """Return the operations of a forward and backward pass of the update, per token: 3, with recomputing 4 forwards."""
    shape, length = setting.shape, setting.tokens_per_row
    passes = 2 if setting.has_checkpointing else 1
    gradients = activation_gradients(shape, length) + weight_gradients(shape)
    return passes * forward(shape, length) + gradients


def score(setting: Setting, device: str = "cuda") -> float:
    """Return the operations of scoring a candidate, per token of it. Raises: ValueError without an estimator."""
    shape, length = setting.shape, setting.tokens_per_row
    once = forward(shape, length)
    backward = activation_gradients(shape, length) + (once if setting.has_checkpointing else 0.0)
    if setting.estimator == "backward":
        return update(setting)
    if setting.estimator == "finite_difference":
        return 2 * once
    if setting.estimator == "output_layer":
        # The graph opens at the output layer: one product back is cut off, its gradient is formed.
        return once + ghost_products(setting, shape.vocabulary, shape.hidden, device)
    if setting.estimator == "low_rank":
        return once + backward + _low_rank_products(setting)
    if setting.estimator == "ghost":
        layers = sum(ghost_products(setting, o, i, device) for o, i in shape.layer_matrices) * shape.num_layers
        return once + backward + layers + ghost_products(setting, shape.vocabulary, shape.hidden, device)
    raise ValueError(f"estimator={setting.estimator}: scores nothing")


def ghost_products(setting: Setting, outputs: int, inputs: int, device: str) -> float:
    """Return the operations, per token, of one matrix's products with the direction and of its squared norm.

    Three exact forms, the cheapest in time is taken. Per row: each row's gradient is formed, 2 O I, as in an update.
    Per problem: the same once, and delta V: 4 O I. Gram: delta V, and delta delta^T and input input^T over the
    problem's T tokens: 2 O I + 2 T (O + I). Without response derivatives a problem counts as two rows, its halves.
    Source: ghost dot product, Wang et al. 2024 (arXiv 2406.11011); Gram form, Li et al. 2022 (arXiv 2110.05679).
    """
    num_tokens = setting.responses_per_candidate * setting.tokens_per_row
    num_rows = setting.responses_per_candidate if setting.has_response_derivatives else 2
    weight = 2.0 * outputs * inputs
    time_and_operations = {
        "per_row": (num_tokens + num_rows * BALANCE_POSITIONS[device], weight),
        "per_problem": ((1 + PRODUCT_COST) * num_tokens + BALANCE_POSITIONS[device], 2 * weight),
        "gram": (
            PRODUCT_COST * num_tokens * (1 + num_tokens * (1 / outputs + 1 / inputs)),
            weight + 2.0 * num_tokens * (outputs + inputs),
        ),
    }
    return min(time_and_operations.values())[1]


def _low_rank_products(setting: Setting) -> float:
    shape = setting.shape
    features = sum(o + i for o, i in shape.layer_matrices) * shape.num_layers + shape.vocabulary + shape.hidden
    return 2.0 * setting.low_rank * features
