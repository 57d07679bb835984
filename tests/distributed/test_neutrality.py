# SPDX-License-Identifier: Apache-2.0
"""Scoring leaves no trace in verl's engine, also when it is interrupted, and training goes on bit for bit."""

import pytest

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("where", ["none", "loss", "backward"])
@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp1-orig", "fsdp2"])
def test_scoring_between_two_training_steps_changes_no_bit(job_results, strategy, where, world_size):
    for results in job_results(world_size):
        report = results[f"neutrality/{strategy}/{where}"]
        assert not isinstance(report, str), report
        assert report.pop("interrupted") == (where != "none")
        assert {"parameters", "optimizer", "gradients", "generators", "next step's parameters"} <= report.keys()
        assert [name for name, is_same in report.items() if not is_same] == []
