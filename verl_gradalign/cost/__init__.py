# SPDX-License-Identifier: Apache-2.0
"""Plan what selection costs before it is run: pure functions of sizes, without torch or verl.

from verl_gradalign.cost import Setting, estimate, shape_of

estimate(Setting(shape_of("7b"), num_gpus=8, oversample=4)).ratios["flops"]
"""

from verl_gradalign.cost.estimate import Cost, alternatives, estimate
from verl_gradalign.cost.setting import PRESETS, ModelShape, Setting, shape_of

__all__ = ["PRESETS", "Cost", "ModelShape", "Setting", "alternatives", "estimate", "shape_of"]
