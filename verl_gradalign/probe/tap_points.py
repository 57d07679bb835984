# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model are tapped, by which rules; models whose gradient taps would not see are refused.

points = tap_points(module)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from verl_gradalign.probe.expert_rules import is_router
from verl_gradalign.probe.fsdp import Placement, trainable_placements
from verl_gradalign.probe.gradient import trainable_parameters
from verl_gradalign.probe.layer_rules import BY_OUTPUTS, COVERED, OUTPUTS, LayerRule, rule_of

OWN_HOOKS = ("torch.distributed.", "transformers.", "peft.", "verl.")
"""Whose forward hooks on a layer leave its output's value as it is: FSDP2's, and those that open the graph."""
REMEDY = "Remedy: set gradalign.estimator=backward (exact) or finite_difference"


@dataclass(frozen=True)
class TapPoint:
    """A layer with trainable parameters, and the rule for it."""

    name: str
    module: nn.Module
    rule: LayerRule
    placements: tuple[Placement, ...]
    by_outputs: bool = False
    """Whether the rule may be called once for each block of the layer's outputs; taps add up what it returns."""

    is_given_all: bool = False
    """Whether the rule needs all that the layer was called with, and not its first argument alone."""
    is_inside: bool = False
    """Whether the linear product in the layer is tapped, and not what the layer puts out: a router's logits."""

    @property
    def gives_gradient(self) -> bool:
        """Whether the rule can add the layer's gradient to a sum: of micro-batches, or of slices of rows."""
        return self.rule in COVERED

    @property
    def has_matrix(self) -> bool:
        return any(len(placement.shape) > 1 for placement in self.placements)


def tap_points(root: nn.Module) -> list[TapPoint]:
    """Return the layers to tap: all that have trainable parameters, each parameter covered exactly once.

    Raises: ValueError that names the layers without a rule, and what to do. Call it while sharded.
    """
    by_module: dict[nn.Module, list[Placement]] = defaultdict(list)
    for placement in trainable_placements(root):
        by_module[placement.module].append(placement)
    if not by_module:
        raise ValueError("the model has no trainable parameter; there is no gradient to score")
    require_rows_of_tokens(by_module, root)
    points, uncovered = [], []
    for module, placements in by_module.items():
        rule, kind = rule_of(module), type(module).__name__
        if rule is None:
            uncovered += [f"{placement.name} ({kind})" for placement in placements]
        elif missed := [p for p in placements if p.attribute not in COVERED.get(rule, (p.attribute,))]:
            uncovered += [f"{placement.name} ({kind})" for placement in missed]
        else:
            name = placements[0].name.rpartition(".")[0] or kind
            flags = rule in BY_OUTPUTS, rule in OUTPUTS, is_router(module)
            points.append(TapPoint(name, module, rule, tuple(placements), *flags))
    if uncovered:
        first = ", ".join(uncovered[:5]) + (" and more" if len(uncovered) > 5 else "")
        remedy = f"{REMEDY}, or register a rule (probe.layer_rules.register_layer_rule)."
        raise ValueError(f"no layer rule covers {first}: the scores would miss their gradient. {remedy}")
    require_no_hooks(root, points)
    return points


def distinct_uses(points: Iterable[TapPoint]) -> list[Placement]:
    """Return one use of each tapped parameter."""
    return list({use.identity: use for point in points for use in point.placements}.values())


def require_gradients(points: Sequence[TapPoint], why: str, remedy: str) -> None:
    """Raise ValueError, naming the first layer, if a rule of a user's own gives norms of whole problems only."""
    for point in points:
        if not point.gives_gradient:
            rule = f"the layer rule of {point.name} ({type(point.module).__name__}) gives norms of whole problems only"
            raise ValueError(f"{rule}, and {why}. Remedy: {remedy}.")


def require_rows_of_tokens(by_module: Mapping[nn.Module, Sequence[Placement]], root: nn.Module) -> None:
    """Raise ValueError that names trained layers of an encoder of images, video or sound, or of its projector.

    Their positions are patches and not the tokens of the pass, so that taps cannot tell which row each belongs to.
    """
    inside = token_modules(root)
    if inside is None:
        return
    outside = [p.name for module, placements in by_module.items() if module not in inside for p in placements]
    if outside:
        first = ", ".join(outside[:3]) + (f" and {len(outside) - 3} more" if len(outside) > 3 else "")
        trouble = "lie outside the text model, whose positions alone can be told apart by row"
        remedy = "or train adapters of the text model only (LoRA with model.exclude_modules='.*visual.*')"
        raise ValueError(f"{first} {trouble}. {REMEDY}, {remedy}.")


def token_modules(root: nn.Module) -> set[nn.Module] | None:
    """Return the modules of a multi-modal model that run over rows of tokens; None if the whole model does."""
    model: Any = next((m for m in root.modules() if hasattr(getattr(m, "config", None), "get_text_config")), None)
    text = None if model is None else model.config.get_text_config()
    if model is None or text is model.config:
        return None
    parts = [m for m in root.modules() if type(getattr(m, "config", None)) is type(text)]
    head = model.get_output_embeddings()
    return {module for part in (*parts, head) if part is not None for module in part.modules()}


def is_own_hook(hook: Any) -> bool:
    """Return whether a forward hook is one of those that leave the output's value as it is."""
    return str(getattr(hook, "__module__", "")).startswith(OWN_HOOKS)


def require_no_hooks(root: nn.Module, points: Sequence[TapPoint]) -> None:
    """Raise ValueError, naming the parameter or layer, if a hook of it may change a gradient out of the taps' sight."""
    for name, parameter in trainable_parameters(root):
        if parameter._backward_hooks:
            trouble = "has a gradient hook (register_hook): training takes what it returns, taps would not see it"
            raise ValueError(f"{name} {trouble}. Remedy: remove the hook, or set gradalign.estimator=backward (exact).")
    # Between a layer that is an FSDP2 unit and its tap; elsewhere taps are the first hooks (`Taps.register`).
    units = [point for point in points if isinstance(point.module, FSDPModule)]
    for point, hook in ((unit, hook) for unit in units for hook in unit.module._forward_hooks.values()):
        if not is_own_hook(hook):
            trouble = f"has a forward hook ({getattr(hook, '__qualname__', hook)}), which may change its output"
            raise ValueError(f"{point.name} {trouble}. Remedy: remove the hook, or set gradalign.estimator=backward.")
