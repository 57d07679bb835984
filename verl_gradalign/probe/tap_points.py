# SPDX-License-Identifier: Apache-2.0
"""Which layers are tapped: all that have trainable parameters, each with the rule for its kind.

points = tap_points(module)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import nn

from verl_gradalign.probe.fsdp import Placement, trainable_placements
from verl_gradalign.probe.layer_rules import LayerRule, rule_of

__all__ = ["TapPoint", "tap_points"]


@dataclass(frozen=True)
class TapPoint:
    """A layer with trainable parameters, and the rule for it."""

    name: str
    module: nn.Module
    rule: LayerRule
    placements: tuple[Placement, ...]


def tap_points(root: nn.Module) -> list[TapPoint]:
    """Return the layers to tap: all that have trainable parameters, each parameter covered exactly once.

    Raises: ValueError that names the layers without a rule, and what to do. Call it while sharded.
    """
    by_module: dict[int, list[Placement]] = defaultdict(list)
    for placement in trainable_placements(root):
        by_module[id(placement.module)].append(placement)
    points, uncovered = [], []
    for placements in by_module.values():
        module = placements[0].module
        rule = rule_of(module)
        if rule is None:
            uncovered += [f"{p.name} ({type(module).__name__})" for p in placements]
            continue
        name = placements[0].name.rpartition(".")[0] or type(module).__name__
        points.append(TapPoint(name, module, rule, tuple(placements)))
    if uncovered:
        raise ValueError(
            f"no layer rule covers {', '.join(uncovered[:5])}{' and more' if len(uncovered) > 5 else ''}: the scores "
            "would miss their gradient. Remedy: set gradalign.estimator=backward (exact) or finite_difference, or "
            "register a rule (probe.layer_rules.register_layer_rule)."
        )
    if not points:
        raise ValueError("the model has no trainable parameter; there is no gradient to score")
    return points
