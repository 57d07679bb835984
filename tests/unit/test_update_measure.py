# SPDX-License-Identifier: Apache-2.0
"""What the driver and verl's batches need of measured updates, without a model's pass."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from verl.single_controller.base.decorator import MAGIC_ATTR
from verl.utils import tensordict_utils as tu
from verl.workers.engine_workers import ActorRolloutRefWorker

from tests.numerics.models import make_model
from verl_gradalign.config import ProbeConfig
from verl_gradalign.integration.update_measure import (
    MEASURE,
    UpdateReply,
    UpdateRequest,
    check,
    in_batch_order,
    require_agreement,
    response_tokens,
)
from verl_gradalign.integration.worker import GradAlignWorker


def reply(*contributions: float, error: float | None = None) -> UpdateReply:
    contribution_R = torch.tensor(contributions, dtype=torch.float64)
    return UpdateReply(contribution_R, -contribution_R, {}, error)


def test_models_without_rules_and_estimators_that_need_more_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"no layer rule covers .* set gradalign.measure=before"):
        check(nn.Conv1d(3, 3, 1), "ghost", ProbeConfig())
    with pytest.raises(ValueError, match=r"gradalign.estimator=backward: .* Remedy: set gradalign.estimator=ghost"):
        check(make_model("qwen2-tied"), "backward", ProbeConfig())
    with pytest.raises(ValueError, match=r"dropout is active"):
        check(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "ghost", ProbeConfig())
    for estimator in ("ghost", "low_rank"):
        check(make_model("qwen2-tied"), estimator, ProbeConfig())


def test_rows_come_back_in_the_order_of_the_batch_once_for_each_data_parallel_rank() -> None:
    # Workers 0 and 1 share their rows, and so do 2 and 3.
    replies = [reply(3.0, 4.0), reply(3.0, 4.0), reply(1.0), reply(1.0)]
    contribution_R, derivative_R = in_batch_order(replies, [1, 1, 0, 0])
    assert contribution_R.tolist() == [1.0, 3.0, 4.0] and derivative_R.tolist() == [-1.0, -3.0, -4.0]


@pytest.mark.parametrize("error", [None, 0.0, 0.05])
def test_sums_that_agree_or_were_not_compared_do_not_stop_the_run(error: float | None) -> None:
    require_agreement(reply(1.0, error=error), ProbeConfig())


@pytest.mark.parametrize("error", [0.051, float("nan"), float("inf")])
def test_sums_that_disagree_stop_the_run_with_the_remedy(error: float) -> None:
    with pytest.raises(RuntimeError, match=r"probe.canary_threshold=0.05. Remedy: set gradalign.measure=before"):
        require_agreement(reply(1.0, error=error), ProbeConfig())


def test_counted_log_probs_are_those_of_the_tokens_before_the_responses() -> None:
    def nest(*parts: list[int]) -> torch.Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(part) for part in parts], layout=torch.jagged)

    columns = {
        "input_ids": nest([1, 2, 3, 4], [5, 6, 7]),
        "prompts": nest([1, 2], [5]),
        "responses": nest([3, 4], [6, 7]),
        "response_mask": nest([1, 1], [0, 1]),
    }
    tokens = response_tokens(TensorDict(columns, batch_size=2))
    assert tokens["row_N"].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert tokens["is_counted_N"].tolist() == [False, True, True, False, False, True, False]


def test_a_request_survives_the_batchs_way_to_a_worker() -> None:
    request = UpdateRequest("low_rank", ProbeConfig(rank=3), is_audited=True)
    # As verl's bridge does with what is in extra_info.
    data = TensorDict({"x": torch.zeros(2)}, batch_size=2)
    tu.assign_non_tensor_data(data, MEASURE, copy.deepcopy(request))
    assert tu.pop(data, MEASURE) == request
    assert MEASURE not in data.keys() and tu.pop(data, MEASURE, None) is None


def test_the_workers_update_is_dealt_as_verls_own() -> None:
    own, verls = (getattr(kind.update_actor, MAGIC_ATTR) for kind in (GradAlignWorker, ActorRolloutRefWorker))
    assert own.keys() == verls.keys() and own["blocking"] == verls["blocking"]
    for name in ("dispatch_fn", "collect_fn"):
        mine, wanted = own["dispatch_mode"][name], verls["dispatch_mode"][name]
        assert (mine.func, mine.args) == (wanted.func, wanted.args)
