# SPDX-License-Identifier: Apache-2.0
"""What a machine and a configuration are found to be: findings, and the environment. It knows neither verl nor Hydra.

    findings = Findings()
    machine = examine_environment(findings)
    findings.has_errors

`verl_gradalign.integration.doctor` examines a composed configuration.
"""

from verl_gradalign.doctor.environment import Machine, examine_environment
from verl_gradalign.doctor.findings import LEVELS, Finding, Findings

__all__ = ["LEVELS", "Finding", "Findings", "Machine", "examine_environment"]
