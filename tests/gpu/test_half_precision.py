# SPDX-License-Identifier: Apache-2.0
"""On a GPU, in bf16 under FSDP2: scores against float32 backward passes, and memory against the update.

Speed is measured by tests/benchmarks (`--sweeps gpu`), not tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from verl_gradalign.bench.cases import QWEN_05B
from verl_gradalign.bench.device import one_rank, peak_of
from verl_gradalign.bench.plain import PlainBench
from verl_gradalign.probe.audit import spearman

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

DEVICE = torch.device("cuda", 0)
# The weights of Qwen2.5-0.5B, random; fewer layers and shorter groups, so that float32 takes seconds.
CASE = replace(QWEN_05B, num_layers=6, num_problems=32, tokens_per_row=256)
MIN_SPEARMAN = 0.99
MAX_RELATIVE_RMS = 0.02
LAYER_BYTES = 4 * CASE.vocabulary * CASE.hidden_size  # the largest layer's gradient in float32


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_rank(DEVICE):
        yield


@pytest.fixture(scope="module")
def half(process_group: None) -> PlainBench:
    return PlainBench(CASE, DEVICE)


@pytest.fixture(scope="module")
def single(process_group: None) -> PlainBench:
    return PlainBench(replace(CASE, dtype="float32"), DEVICE)


def test_ghost_in_bf16_ranks_as_float32_backward_passes_do(half: PlainBench, single: PlainBench) -> None:
    scores, reference = half.score("ghost"), single.score("backward")
    assert scores.norm_P is not None and reference.norm_P is not None
    assert spearman(scores.dot_P, reference.dot_P) >= MIN_SPEARMAN
    error_P = (scores.dot_P - reference.dot_P) / reference.norm_P
    assert error_P.square().mean().sqrt() <= MAX_RELATIVE_RMS
    assert ((scores.norm_P / reference.norm_P - 1).square().mean().sqrt()) <= MAX_RELATIVE_RMS


def test_scoring_needs_no_more_memory_than_the_update(half: PlainBench) -> None:
    update = peak_of(half.update, DEVICE).beyond
    shard_bytes = 4 * half.num_parameters
    assert peak_of(lambda: half.score("ghost"), DEVICE).beyond <= update + shard_bytes + LAYER_BYTES


@pytest.mark.parametrize("estimator", ["ghost", "finite_difference"])
def test_scoring_on_the_gpu_changes_no_parameter(half: PlainBench, estimator: str) -> None:
    before = [parameter.to_local().clone() for parameter in half.module.parameters()]
    half.score(estimator)
    after = [parameter.to_local() for parameter in half.module.parameters()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
