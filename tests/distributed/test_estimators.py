# SPDX-License-Identifier: Apache-2.0
"""On verl's FSDP engine: approximate estimators, half precision, collectives, oversized problems, Adam's metric.

And `score_problems` without verl, under torch's own FSDP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.comparison import case_of, largest_errors
from tests.distributed.conftest import LARGE_GROUPS, Oracle, RunGroup, RunPart
from tests.distributed.setups import (
    ADVANTAGES,
    CANDIDATES,
    LEARNING_RATE,
    STRATEGIES,
    TRAINED,
    TRUSTED,
    numbers_of_large,
    oracle_scores,
    reference_model,
)
from tests.numerics.models import mixture_of_experts
from tests.numerics.oracle import problem_gradients_float64
from tests.numerics.problems import TEMPERATURE, with_coefficients
from verl_gradalign.probe.audit import spearman

pytestmark = pytest.mark.dist

RTOL_FLOAT64 = 1e-10  # measured 1e-13; 1e-12 for responses' derivatives
RTOL_ROUTER = 1e-7  # routers compute in float32; in float64 tests/numerics/test_experts.py
RTOL_FUSED = 1e-5  # of the gradient's norm; measured 3e-7
RTOL_SVD = 1e-8  # measured 1e-13: a decomposition and its product
MAX_STEP_ERROR = 1e-2  # of |g| |v|, at a step of 1e-3 |theta|
# Where the training gradient vanishes, v is divided by eps, and so is the rounding of both: measured 1e-12 to 2e-10,
# depending on the processor.
RTOL_ADAM = 1e-8
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
SHARDINGS = ("fsdp", "fsdp-orig", "fsdp2")


def values(scores: dict[str, Any], key: str = "dot") -> torch.Tensor:
    return torch.tensor(scores[key], dtype=torch.float64)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_low_rank_with_full_rank_has_exact_dots(results: dict[str, Any], oracle: Oracle, strategy: str) -> None:
    scores = case_of(results, f"approximate-{strategy}")["low_rank"]
    errors = largest_errors(scores, oracle("qwen3"))
    assert max(errors.values()) <= RTOL_SVD, errors
    assert scores["norm"] is None
    assert scores["diagnostics"]["energy_kept"] == pytest.approx(1.0)
    assert scores["ranks_agree"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_finite_differences_err_with_the_square_of_the_step(
    results: dict[str, Any], oracle: Oracle, strategy: str
) -> None:
    case, expected = case_of(results, f"approximate-{strategy}"), oracle("qwen3")
    errors_P, halved_P = ((values(case[name]) - values(expected)).abs() for name in ("step", "half_step"))
    assert (errors_P <= MAX_STEP_ERROR * values(expected, "norm")).all()
    # Over all problems together: at one of them the leading term happens to be small.
    assert (errors_P.sum() / halved_P.sum()).item() == pytest.approx(4.0, rel=0.05)
    assert case["step"]["norm"] is None
    assert case["step"]["ranks_agree"]
    assert case["half_step"]["diagnostics"]["step"] == pytest.approx(case["step"]["diagnostics"]["step"] / 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_output_layer_gives_that_layers_part_of_the_oracle(
    results: dict[str, Any], oracle: Oracle, strategy: str
) -> None:
    scores = case_of(results, f"approximate-{strategy}")["output_layer"]
    share, whole = oracle("qwen3", part="lm_head.weight"), oracle("qwen3")
    errors = largest_errors(scores, share)
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert max(largest_errors(scores, whole).values()) > 0.1
    assert scores["ranks_agree"]


SLICED = [("fsdp2", "qwen2"), ("fsdp", "qwen3")]


@pytest.mark.parametrize(("strategy", "model"), SLICED)
def test_ranks_that_have_slices_of_rows_find_the_scores_of_whole_ones(
    run_group: RunGroup, oracle: Oracle, strategy: str, model: str
) -> None:
    check_sliced(case_of(run_group(2), f"ulysses-{strategy}"), oracle(model), oracle, model)


@pytest.mark.nightly
@pytest.mark.parametrize(("strategy", "model"), SLICED)
def test_pairs_of_ranks_with_slices_find_them_too(run_part: RunPart, oracle: Oracle, strategy: str, model: str) -> None:
    """Four ranks, of which two have the slices of the same rows."""
    check_sliced(case_of(run_part(4, "ulysses-"), f"ulysses-{strategy}"), oracle(model), oracle, model)


def check_sliced(case: dict[str, Any], expected: dict[str, Any], oracle: Oracle, model: str) -> None:
    """Scores are those of autograd, in whatever batches and blocks."""
    names = [name for name in case if name.startswith("ghost")]
    assert len(names) == 4 and case["exchange"] == "verl.utils.ulysses"
    for name in (*names, "backward"):
        errors = largest_errors(case[name], {**expected, "derivative": None} if name == "backward" else expected)
        assert max(errors.values()) <= RTOL_FLOAT64, (name, errors)
        assert case[name]["ranks_agree"]
    check_estimated(case["estimated norms"], expected)
    assert "(Linear) gives norms of whole problems only" in case["own rule"]
    step = case["finite_difference"]
    assert ((values(step) - values(expected)).abs() <= MAX_STEP_ERROR * values(expected, "norm")).all()
    if model == "qwen3":
        errors = largest_errors(case["output_layer"], oracle(model, part="lm_head.weight"))
        assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert spearman(values(case["low_rank"]), values(expected)) > 0.9


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_with_verls_fused_kernels_scores_are_those_of_the_model(
    results: dict[str, Any], oracle: Oracle, strategy: str, is_packed: bool
) -> None:
    """Their log-probs, which the direction is made of, are in float32."""
    case = case_of(results, f"fused-{strategy}")
    expected = oracle(case["model"])
    for estimator in ("ghost", "backward"):
        scores = case[f"{estimator} {is_packed}"]
        for key in ("dot", "norm"):
            error_P = (values(scores, key) - values(expected, key)).abs()
            assert (error_P <= RTOL_FUSED * values(expected, "norm")).all(), (estimator, key, error_P)
        assert scores["ranks_agree"]
    step = case[f"finite_difference {is_packed}"]
    assert ((values(step) - values(expected)).abs() <= MAX_STEP_ERROR * values(expected, "norm")).all()
    torch.testing.assert_close(values(case, f"states {is_packed}"), values(case, "states"), rtol=1e-6, atol=1e-6)
    head = case[f"output_layer {is_packed}"]
    assert all(0 < part <= whole for part, whole in zip(head["norm"], expected["norm"], strict=True) if whole)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_half_precision_ranks_problems_as_float32_does(results: dict[str, Any], strategy: str, dtype: str) -> None:
    half, single = (case_of(results, f"precision-{strategy}-{name}") for name in (dtype, "fp32"))
    assert len(half["dot"]) >= 24
    assert half["dot"] != single["dot"]
    for key in ("dot", "norm"):
        assert spearman(values(half, key), values(single, key)) >= 0.99


@pytest.mark.parametrize("strategy", SHARDINGS)
def test_taps_and_finite_differences_never_reduce_gradients(run_group: RunGroup, strategy: str) -> None:
    counts = case_of(run_group(2), f"collectives-{strategy}")
    for estimator in ("ghost", "finite_difference", "backward"):
        reductions = sum(count for name, count in counts[estimator].items() if "reduce_scatter" in name)
        assert (reductions > 0) == (estimator == "backward"), counts[estimator]
    # One for the number of micro-batches, one for the sums, one for whether v fits. And once, for what the model does
    # with its logits.
    assert counts["ghost"]["allreduce_"] == 4
    # One for the sums, one for |theta|. And at each step one for the number of rows, one of verl's for their tokens,
    # and three of verl's for its micro-batches.
    assert counts["finite_difference"]["allreduce_"] == 2 + 2 * 5


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("oversized", ["accumulate", "backward"])
def test_oversized_problems_are_scored_exactly_and_the_canary_finds_nothing(
    results: dict[str, Any], oracle: Oracle, strategy: str, oversized: str
) -> None:
    case, expected = case_of(results, f"audit-{strategy}"), oracle("qwen2")
    scores, sizes = case[oversized], [len(p) * max(row.num_tokens for row in p) for p in CANDIDATES]
    too_large = [index for index, size in enumerate(sizes) if size > case["budget"]]
    assert scores["diagnostics"]["oversized"] == len(too_large) == 3
    if oversized == "backward":
        # It cannot tell responses apart.
        known = [
            [float("nan")] * len(row) if index in too_large else row for index, row in enumerate(expected["derivative"])
        ]
        width = max(len(p) for index, p in enumerate(CANDIDATES) if index not in too_large)
        expected = {**expected, "derivative": [row[:width] for row in known]}
    errors = largest_errors(scores, expected)
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    assert 0 <= scores["diagnostics"]["canary/relative_error"] < RTOL_FLOAT64
    assert scores["ranks_agree"]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_norms_of_oversized_problems_may_be_estimated_and_all_else_is_exact(
    results: dict[str, Any], oracle: Oracle, strategy: str
) -> None:
    scores = case_of(results, f"audit-{strategy}")["sketch"]
    check_estimated(scores, oracle("qwen2"))
    assert 0 <= scores["diagnostics"]["canary/relative_error"] < RTOL_FLOAT64


def check_estimated(scores: dict[str, Any], expected: dict[str, Any]) -> None:
    """Some norms are off, but not by more than four of the standard errors that are reported."""
    errors = largest_errors({**scores, "norm": None}, {**expected, "norm": None})
    assert max(errors.values()) <= RTOL_FLOAT64, errors
    error_P = (values(scores, "norm") / values(expected, "norm") - 1).abs().nan_to_num()
    assert RTOL_FLOAT64 < error_P.max() <= 4 * scores["diagnostics"]["oversized_norm_error"] < 0.5, error_P
    assert scores["ranks_agree"]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_problems_of_many_micro_batches_are_shared_by_the_ranks_whole(
    results: dict[str, Any], world_size: int, strategy: str
) -> None:
    check_large(case_of(results, f"large-{strategy}"), world_size)


@pytest.mark.nightly  # a group of eight takes minutes to start on a small machine
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("world_size", LARGE_GROUPS, ids=str)
def test_more_ranks_share_them_too(run_part: RunPart, world_size: int, strategy: str) -> None:
    check_large(case_of(run_part(world_size, "large-"), f"large-{strategy}"), world_size)


def check_large(case: dict[str, Any], world_size: int) -> None:
    """Scores are those of `backward`, by no more passes and collectives than there must be."""
    numbers = numbers_of_large(world_size)
    for number in numbers:
        assert case[f"passes {number}"] == 10 * number / world_size
        scores = case[f"{number}"]
        for key in ("dot", "norm"):
            error_P = (values(scores, key) - values(case["backward"], key)[:number]).abs()
            assert (error_P <= RTOL_FLOAT64 * values(case["backward"], "norm")[:number]).all(), error_P
        assert scores["ranks_agree"] and not values(scores, "derivative").isnan().any()
    per_pass = [case[f"collectives {number}"] / case[f"passes {number}"] for number in numbers]
    assert per_pass[1] <= per_pass[0]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_an_oversized_problem_stops_every_rank_by_name(results: dict[str, Any], world_size: int, strategy: str) -> None:
    messages = case_of(results, f"audit-{strategy}")["messages"]
    assert len(messages) == world_size
    assert all(message.startswith("problem c0 takes 40 positions") for message in messages), messages


def test_a_direction_that_does_not_fit_is_gathered_by_unit_and_not_by_parameter(run_group: RunGroup) -> None:
    """Beside the units' own parameters, which FSDP gathers either way."""
    counts = case_of(run_group(2), "collectives-fsdp2")
    together, by_unit = (
        sum(number for kind, number in counts[name].items() if "gather" in kind) for name in ("together", "by unit")
    )
    of_direction = by_unit - (together - 1)  # where it fits, by one exchange
    assert counts["passes"] > 1
    # The root's is needed by the output layer and by the embedding.
    assert counts["units"] * counts["passes"] <= of_direction <= (counts["units"] + 1) * counts["passes"], counts


@pytest.mark.parametrize(("strategy", "bytes_each"), [("fsdp", 2), ("fsdp2", 4)])
def test_gradients_that_are_reduced_late_take_what_the_calculator_says(
    run_group: RunGroup, strategy: str, bytes_each: int
) -> None:
    """In bf16, over micro-batches of one direction: whole gradients in place of shards, but not beside them."""
    case = case_of(run_group(2), f"memory-{strategy}")
    whole, shard = bytes_each * case["numbers"], 4 * case["numbers"] / 2
    found, said = case["deferred"] - case["at once"], max(shard, whole) - shard
    # Reduced at once, the gradients of one unit, a layer, are whole for a moment too.
    assert abs(found - said) <= 0.1 * 4 * case["numbers"], (found, said)


@pytest.fixture(scope="module")
def scores_in_adams_metric(root: Path) -> dict[str, Any]:
    """The oracle's, after the training step that the cases take."""
    model = reference_model(root, "qwen3", has_adapters=False)
    parameters = list(model.parameters())
    gradient_G = problem_gradients_float64(model, [TRAINED[0]], TEMPERATURE)[0]
    for parameter, part in zip(parameters, gradient_G.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    torch.optim.AdamW(parameters, lr=LEARNING_RATE, **ADAM).step()
    # After one step the bias-corrected second moment is the square of the gradient.
    return oracle_scores(model, metric_G=gradient_G.abs() + ADAM["eps"])


@pytest.mark.parametrize("estimator", ["ghost", "backward"])
@pytest.mark.parametrize("strategy", SHARDINGS)
def test_adams_metric_is_the_oracles_on_any_number_of_ranks(
    results: dict[str, Any], scores_in_adams_metric: dict[str, Any], strategy: str, estimator: str
) -> None:
    scores = case_of(results, f"adam-{strategy}")[estimator]
    errors = largest_errors(scores, scores_in_adams_metric)
    assert max(errors.values()) <= RTOL_ADAM, errors
    assert scores["ranks_agree"]


@pytest.mark.parametrize("estimator", ["ghost", "backward", "finite_difference"])
@pytest.mark.parametrize("strategy", SHARDINGS)
def test_an_offloaded_direction_gives_identical_scores(results: dict[str, Any], strategy: str, estimator: str) -> None:
    case = case_of(results, f"adam-{strategy}")
    assert str(case[estimator]) == str(case[f"{estimator}-on-cpu"])


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_kernels_bound_to_norms_and_a_wrapped_head_are_scored_exactly(
    results: dict[str, Any], oracle: Oracle, strategy: str
) -> None:
    case = case_of(results, f"kernels-{strategy}")
    for estimator, expected in (("ghost", oracle("qwen3")), ("output_layer", oracle("qwen3", part="lm_head.weight"))):
        errors = largest_errors(case[estimator], expected)
        assert max(errors.values()) <= RTOL_FLOAT64, errors
        assert case[estimator]["ranks_agree"]


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_hook_between_a_tap_and_a_layer_that_fsdp_shards_by_itself_is_refused(
    results: dict[str, Any], world_size: int, strategy: str
) -> None:
    case = case_of(results, f"kernels-{strategy}")
    # FSDP2's hooks are on the layer itself; FSDP1's are on a wrapper around it.
    assert case["is_unit"] == (strategy == "fsdp2")
    words = "lm_head has a forward hook (measure_kernels.<locals>.<lambda>), which may change its output"
    assert [message.startswith(words) for message in case["messages"]] == [strategy == "fsdp2"] * world_size


@pytest.mark.parametrize("foreign", ["fsdp", "wide"])
@pytest.mark.parametrize("estimator", ["ghost", "backward", "finite_difference", "low_rank", "output_layer"])
def test_a_direction_of_another_sharding_or_model_is_refused_by_name(
    results: dict[str, Any], world_size: int, estimator: str, foreign: str
) -> None:
    case = case_of(results, "refusals")
    messages = case[f"{estimator}-{foreign}"]
    assert len(messages) == world_size
    assert all(any(name in message for name in case["parameters"]) for message in messages), messages


@pytest.fixture(scope="module")
def public_oracle(root: Path) -> dict[str, dict[str, Any]]:
    weighted = [
        [with_coefficients(p[0].prompt, [r.response for r in p], ADVANTAGES[: len(p)], "token-mean") for p in problems]
        for problems in (TRUSTED, CANDIDATES)
    ]
    models = {name: reference_model(root, name, False) for name in ("qwen2", "qwen3")}
    models["experts"] = mixture_of_experts()
    return {name: oracle_scores(model, *weighted) for name, model in models.items()}


@pytest.mark.parametrize("wrapping", ["plain", "fsdp", "fsdp-orig", "fsdp2"])
@pytest.mark.parametrize("model", ["qwen2", "qwen3", "experts"])
def test_score_problems_without_verl_equals_the_oracle_under_any_sharding(
    results: dict[str, Any], public_oracle: dict[str, Any], model: str, wrapping: str
) -> None:
    scores = case_of(results, f"public-{model}")[wrapping]
    errors = largest_errors(scores, public_oracle[model])
    assert max(errors.values()) <= (RTOL_ROUTER if model == "experts" else RTOL_FLOAT64), errors
    assert scores["ranks_agree"]
