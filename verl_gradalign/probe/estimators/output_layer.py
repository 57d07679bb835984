# SPDX-License-Identifier: Apache-2.0
"""Scores from the output layer's gradient alone: exact for that layer, one forward pass, blind to all others.

The graph opens at the output layer, so nothing behind it is kept or differentiated. Of a tied weight only its use as
output layer is seen.

    scores = OutputLayerEstimator().score(engine, candidates, direction)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from verl_gradalign.probe.direction import Direction
from verl_gradalign.probe.direction_gather import DirectionGather
from verl_gradalign.probe.engine import GradientEngine
from verl_gradalign.probe.estimators.ghost import tapped_scores
from verl_gradalign.probe.estimators.score_estimator import ScoreEstimator
from verl_gradalign.probe.fsdp import trainable_placements
from verl_gradalign.probe.gradient import in_eval_mode
from verl_gradalign.probe.gradient_sum import gradient_sum
from verl_gradalign.probe.head import output_layer_of
from verl_gradalign.probe.layer_rules import BY_OUTPUTS, rule_of
from verl_gradalign.probe.tap_points import TapPoint, require_no_hooks
from verl_gradalign.types import ProblemRows, ProblemScores


class OutputLayerEstimator(ScoreEstimator):
    """A tap on the output layer only. The norm is that of the output layer's gradient."""

    gives_norm = True

    def check(self, module: nn.Module) -> None:
        """Raise ValueError if the model has no output layer, or a frozen one."""
        output_layer(module)

    def score(self, engine: GradientEngine, problems: Sequence[ProblemRows], direction: Direction) -> ProblemScores:
        """Return the output layer's part of the scores. Collective; see `ghost.tapped_scores`."""
        point, gather = output_layer(engine.module), DirectionGather(engine.module, direction, engine.device)
        per_response = self._config.response_derivatives
        with in_eval_mode(engine.module), _graph_at_head_alone(engine.module, point.module):
            total = gradient_sum(self._config)
            return tapped_scores(engine, problems, direction.norm, [point], gather, per_response, gradient=total)


@contextmanager
def _graph_at_head_alone(root: nn.Module, head: nn.Module) -> Iterator[None]:
    """Have nothing kept or differentiated behind the head.

    Where transformers is to checkpoint, it opens the graph at the embedding.
    """
    cuts = [head.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(), *inputs[1:]))]
    embedding = root.get_input_embeddings()  # type: ignore[operator]
    if isinstance(embedding, nn.Module):
        cuts.append(embedding.register_forward_hook(lambda _, __, output: output.detach()))
    try:
        yield
    finally:
        for cut in cuts:
            cut.remove()


def output_layer(root: nn.Module) -> TapPoint:
    """Return the tap of the model's output layer.

    Raises: ValueError, with the remedy, if the model does not name one, if it is frozen, as under LoRA, or has no rule.
    """
    head = output_layer_of(root)
    placements = tuple(p for p in trainable_placements(root) if p.module is head)
    rule = None if head is None else rule_of(head)
    name = next((name for name, module in root.named_modules() if module is head), "the output layer")
    if head is None:
        problem = f"{type(root).__name__} does not name an output layer (get_output_embeddings)"
    elif rule is None:
        problem = f"{name} ({type(head).__name__}) has no layer rule"
    elif not placements:
        problem = f"{name} is frozen, so it has no gradient to score (LoRA trains adapters only)"
    else:
        point = TapPoint(placements[0].name.rpartition(".")[0], head, rule, placements, rule in BY_OUTPUTS)
        require_no_hooks(root, [point])
        return point
    raise ValueError(f"{problem}. Remedy: set gradalign.estimator=ghost (exact) or finite_difference.")
