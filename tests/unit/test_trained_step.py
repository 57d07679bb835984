# SPDX-License-Identifier: Apache-2.0
"""What several updates of a step have measured, put together as one measurement of the step."""

import pytest
import torch

from verl_gradalign.integration.trained_step import TrainedStep
from verl_gradalign.probe.call import DirectionReply, ScoringReply
from verl_gradalign.selection.groups import Group, Problem


def group(uid, is_live=True):
    coefficients = (-0.5, 0.5) if is_live else (0.0, 0.0)
    return Group(Problem(uid, ord(uid), "tasks"), (f"{uid}_0_0", f"{uid}_1_0"), 10, (1.0, 0.0), False, is_live,
                 (1.0, -1.0), coefficients)  # fmt: skip


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def measured(direction=None):
    trained = TrainedStep(3, "train", direction)
    trained.add([group("a"), group("d", is_live=False)], {"trusted": [group("t")]})
    trained.add_update(["d_0_0", "a_1_0", "a_0_0", "d_1_0"], numbers(0, 2, 1, 0), numbers(0, 4, 5, 0),
                       {"update/sum_error": 0.1, "update/fidelity": 0.5})  # fmt: skip
    trained.add([group("b")], {"trusted": [group("u")], "other": []})
    trained.add_update(["b_0_0", "b_1_0"], numbers(3, -1), numbers(6, 7), {"update/sum_error": 0.3})
    return trained


def test_groups_of_all_updates_are_one_measurement_in_the_order_in_which_they_were_taken():
    trained = measured()
    reply = trained.reply(direction_norm=2.0)
    assert [g.problem.uid for g in trained.groups] == ["a", "d", "b"]
    assert [g.problem.uid for g in trained.trusted["trusted"]] == ["t", "u"] and trained.trusted["other"] == []
    assert reply.scores.uid == ("a", "b"), "scores are of live groups"
    assert reply.scores.dot_P.tolist() == [3.0, 2.0] and reply.scores.direction_norm == 2.0
    assert reply.scores.response_derivative_PR.tolist() == [[5.0, 4.0], [6.0, 7.0]]


def test_diagnostics_are_means_over_the_updates_that_have_them():
    assert measured().reply(1.0).scores.diagnostics == pytest.approx({"update/sum_error": 0.2, "update/fidelity": 0.5})


def test_the_reply_says_whether_the_direction_was_made_for_the_step():
    assert not measured().reply(1.0).is_fresh
    made = measured(DirectionReply(True, {}, 1.5)).reply(1.0)
    assert made.is_fresh and made.direction_s == 1.5 and made.scores.dot_P.tolist() == [3.0, 2.0]


def test_without_an_update_that_measured_the_reply_is_that_of_the_pass_before_if_there_was_one():
    before = ScoringReply(None, False, {}, 0.0, 0.0)
    assert TrainedStep(1, "train", measured_before=before).reply(1.0) is before
    assert TrainedStep(1, "train", DirectionReply(False, {}, 0.0)).reply(1.0) is None
