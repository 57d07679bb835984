# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of a run's memory."""

from dataclasses import replace
from types import SimpleNamespace

from verl_gradalign.cost import Setting, estimate, shape_of
from verl_gradalign.cost.memory import accumulated_bytes
from verl_gradalign.doctor.machine import Machine
from verl_gradalign.doctor.model import _memory
from verl_gradalign.findings import Finding, Findings

SETTING = Setting(shape_of("14b"), num_gpus=8)


def finding_of(setting: Setting, gb: float) -> Finding:
    """Return what is said of a run on GPUs of so many GB."""
    findings, trainer = Findings(), SimpleNamespace(device="cuda", n_gpus_per_node=8)
    _memory(estimate(setting), SimpleNamespace(trainer=trainer), Machine(8, gb, 1e3), findings)
    (finding,) = findings.all
    return finding


def test_a_model_that_does_not_fit_is_a_warning_with_what_helps():
    for gb, level in ((70, "warning"), (140, "ok")):
        finding = finding_of(SETTING, gb)
        assert finding.level == level and "making the direction" in finding.message
    unreduced = finding_of(replace(SETTING, unreduced_bytes=4), 70)
    assert "fsdp_config.use_no_sync_for_gradient_accumulation=False (51.7 GB)" in unreduced.remedy


def test_gradients_that_are_added_up_may_be_estimated_instead():
    """Of 16 responses of 4,000 tokens, which no micro-batch of 16,384 holds."""
    setting = replace(SETTING, rollout_n=16, response_tokens=4000.0, max_tokens_per_rank=16384)
    added_up, estimated = (finding_of(replace(setting, adds_gradients_up=each), 80) for each in (True, False))
    assert "(scoring)" in added_up.message and "gradalign.probe.oversized=sketch" in added_up.remedy
    assert "oversized" not in estimated.remedy
    kept = [accumulated_bytes(replace(setting, adds_gradients_up=each)) for each in (True, False)]
    assert kept == [4 * SETTING.shape.num_parameters, 0]
