# SPDX-License-Identifier: Apache-2.0
"""The configuration: one frozen dataclass tree, mirrored by configs/gradalign/base.yaml key for key.

Every field is followed by its meaning, range, default and reason. What can be checked without data or a model is
checked here, once, with messages that name the key, the value and the remedy; `integration/checks.py` checks the rest.
"""

from verl_gradalign.config.choosing import CurriculumConfig, ReliabilityConfig, ScoreOptions
from verl_gradalign.config.measuring import DirectionConfig, ProbeConfig, TrustedSetConfig, ValidationConfig
from verl_gradalign.config.root import GradAlignConfig, LogConfig
from verl_gradalign.errors import require, require_choice

__all__ = [
    "CurriculumConfig",
    "DirectionConfig",
    "GradAlignConfig",
    "LogConfig",
    "ProbeConfig",
    "ReliabilityConfig",
    "ScoreOptions",
    "TrustedSetConfig",
    "ValidationConfig",
    "require",
    "require_choice",
]
