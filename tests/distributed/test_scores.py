# SPDX-License-Identifier: Apache-2.0
"""Scores on verl's FSDP engine equal the float64 oracle's, however the engine is configured."""

import functools

import pytest
import torch

from tests.distributed.problems import MODELS, oracle_scores

pytestmark = pytest.mark.dist

# Measured: at most 2e-15 in every configuration. A lost factor or token gives 1e-2 and more.
RTOL_FLOAT64 = 1e-10
STRATEGIES = ("fsdp1", "fsdp1-orig", "fsdp2")
CONFIGURATIONS = (
    "checkpointing",
    "no-checkpointing",
    "large-budget",
    "fixed-1",
    "fixed-3",
    "packed",
    "no-reshard",
    "sync-each",
    "offload",
    "qwen3-untied",
)
CASES = [f"{s}/{c}" for s in STRATEGIES for c in CONFIGURATIONS] + ["fsdp2/hsdp", "fsdp2/reversed"]

expected_scores = functools.cache(oracle_scores)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_scores_match_the_oracle_on_every_rank(job_results, case, world_size):
    architecture, tied = MODELS[1] if "qwen3" in case else MODELS[0]
    expected = expected_scores(architecture, tied)
    for found in (results[f"score/{case}"] for results in job_results(world_size)):
        assert not isinstance(found, str), found
        for quantity, values in expected.items():
            # Relative to the largest entry: a dot product may cancel to any small number.
            limit = RTOL_FLOAT64 * values.abs().max().item()
            torch.testing.assert_close(found[quantity], values, rtol=0, atol=limit, msg=f"{quantity} of {case}")


def test_the_trusted_problems_do_not_cancel():
    for architecture, tied in MODELS:
        expected = expected_scores(architecture, tied)
        assert expected["cosine"].abs().max() > 0.1 and (expected["norm"] > 0).all()


@pytest.mark.parametrize("world_size", [1, 2])
def test_dropout_is_refused_by_name(job_results, world_size):
    for results in job_results(world_size):
        assert "model.layers.1.self_attn (p=0.1)" in results["refusals"]["dropout"]
