# SPDX-License-Identifier: Apache-2.0
"""What candidates are ranked by. A score is a pure function of `Measurements`; higher is better, dead groups are 0.

Your own, in a file of yours, named by `gradalign.score=path/to/my_scores.py:promising`:

    from verl_gradalign import Measurements, Score

    def promising(m: Measurements):
        return m.cosine_P * (m.success_rate_P < 0.5)

A plain function is given a trusted direction and norms. What else it needs it says as a `Score`:

    promising = Score(lambda m, options: ..., direction="trusted", needs_norm=True, needs_response_derivatives=True)

Formulas: s_i = <g_i, v> / (|g_i| |v|); p_i = success rate; rho_i: `correlation`.

Shape legend: P problems, R responses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from verl_gradalign.config import ScoreOptions
from verl_gradalign.errors import require
from verl_gradalign.selection.own_scores import held_to_form, load, require_arguments, try_out
from verl_gradalign.types import Measurements, ratio

DIRECTIONS = (None, "trusted", "pool", "learnability")
"""What `Score.direction` may be."""


@dataclass(frozen=True)
class Score:
    """A named ranking, and what it needs to be measured."""

    rank: Callable[[Measurements, ScoreOptions], Tensor] | None
    """Gives each problem's score, one number each, (problems,). None: no ranking; kept problems are drawn at random."""
    direction: str | None = None
    """What v is made of: `trusted` (the trusted set), `pool` (all candidates' gradients), `learnability` (their unit
    gradients weighted by p(1-p)); None: gradients are not compared with anything."""
    needs_norm: bool = False
    needs_response_derivatives: bool = False
    is_split: bool = True
    """Whether the score of half a group is an estimate of the whole's that the other half does not enter."""

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            known = ", ".join(map(repr, DIRECTIONS))
            raise ValueError(f"Score(direction={self.direction!r}): unknown. Remedy: give one of {known}.")

    @property
    def needs_direction(self) -> bool:
        """Whether a trusted set must be there."""
        return self.direction == "trusted"

    @property
    def is_of_candidates(self) -> bool:
        """Whether v is made of the gradients of those that are scored."""
        return self.direction in ("pool", "learnability")

    @property
    def needs_gradients(self) -> bool:
        """Whether the actor measures anything at all."""
        return self.direction is not None or self.needs_norm


def learnalign(m: Measurements, _: ScoreOptions) -> Tensor:
    """Return mean_j V_i V_j cos(g_i, g_j) over all candidates, self included, with V = p (1 - p).

    It equals V_i <g_i, u> / (|g_i| n) with u = sum_j V_j g_j / |g_j|, which is the direction here; a dead group's V
    is 0. Source: LearnAlign (arXiv 2506.11480) section 3.
    """
    return learnability(m) * m.cosine_P * m.direction_norm / m.num_candidates


def accuracy_band(m: Measurements, options: ScoreOptions) -> Tensor:
    """Return 1 inside the band of success rates, else 0; ties are broken at random, so the choice is uniform inside."""
    p_P = m.success_rate_P
    return ((p_P >= options.band_low) & (p_P <= options.band_high)).double()


def correlation(m: Measurements, _: ScoreOptions) -> Tensor:
    """Return rho_i, the correlation within the group of advantages A_ij with -d_ij; 0 where either has no spread.

    -d_ij is how much a step along the trusted set's descent raises the response's log-probability.
    """
    is_there_PR = m.half_PR >= 0
    advantage_PR = centred(m.advantage_PR, is_there_PR)
    derivative_PR = centred(-m.derivative_PR, is_there_PR)
    spread_P = (advantage_PR.square().sum(1) * derivative_PR.square().sum(1)).sqrt()
    return ratio((advantage_PR * derivative_PR).sum(1), spread_P)


def lower_bound(m: Measurements, options: ScoreOptions) -> Tensor:
    """Return (dot_i - z times its standard error) / |g_i|, from the spread of the responses' contributions.

    Of n contributions x_ij that add up to the dot product, the sum's standard error is sqrt(n) std(x). z = 0 is cosine.
    A group of one response has an unknown error, so its score is nan.
    """
    is_there_PR = m.half_PR >= 0
    num_P = is_there_PR.sum(1)
    variance_P = centred(m.contribution_PR, is_there_PR).square().sum(1) / (num_P - 1)
    error_P = (num_P * variance_P).sqrt()
    return ratio(m.dot_P - options.z * error_P, m.norm_P.masked_fill(error_P.isnan(), torch.nan))


def learnability(m: Measurements) -> Tensor:
    """Return p_i (1 - p_i)."""
    p_P = m.success_rate_P
    return p_P * (1 - p_P)


def centred(values_PR: Tensor, is_there_PR: Tensor) -> Tensor:
    """Return the values minus their row's mean, 0 where there is no response; nan values make their row nan."""
    kept_PR = torch.where(is_there_PR, values_PR, torch.zeros_like(values_PR))
    mean_P1 = kept_PR.sum(1, keepdim=True) / is_there_PR.sum(1, keepdim=True)
    return torch.where(is_there_PR, kept_PR - mean_P1, torch.zeros_like(kept_PR))


SCORES: dict[str, Score] = {
    # s_i. Source: GradAlign (arXiv 2602.21492), its default score.
    "cosine": Score(lambda m, _: m.cosine_P, "trusted", needs_norm=True),
    # <g_i, v / |v|>. Source: GradAlign's `dot` variant.
    "dot": Score(lambda m, _: m.dot_P, "trusted"),
    # s_i max(rho_i, 0): aligned, and by more than the noise of the responses along v explains.
    "confident_cosine": Score(
        lambda m, options: m.cosine_P * correlation(m, options).clamp(min=0),
        "trusted",
        needs_norm=True,
        needs_response_derivatives=True,
    ),
    "correlation": Score(correlation, "trusted", needs_response_derivatives=True),
    "lower_bound": Score(lower_bound, "trusted", needs_norm=True, needs_response_derivatives=True),
    # 4 p_i (1 - p_i) s_i. Source: `simacc` of GradAlign's reference code.
    "cosine_learnability": Score(lambda m, _: 4 * learnability(m) * m.cosine_P, "trusted", needs_norm=True),
    # The control that keeps what points away.
    "negative_cosine": Score(lambda m, _: -m.cosine_P, "trusted", needs_norm=True),
    "learnalign": Score(learnalign, "learnability", needs_norm=True, is_split=False),
    "pool_cosine": Score(lambda m, _: m.cosine_P, "pool", needs_norm=True, is_split=False),
    # |g_i|: the control that keeps what moves most.
    "norm": Score(lambda m, _: m.norm_P, needs_norm=True, is_split=False),
    # 0 for problems always or never solved. Source: AccGreedy, GradAlign's baseline.
    "accuracy_greedy": Score(lambda m, _: 0.5 - (m.success_rate_P - 0.5).abs()),
    "accuracy_band": Score(accuracy_band),
    "random": Score(None),
}


@lru_cache
def score_of(name: str) -> Score:
    """Return the score of that name, or the user's own (`module:attribute` or `file.py:attribute`).

    The user's own has been tried on made-up measurements, and gives a float64 tensor (problems,) or raises.

    Raises: ValueError that says what is wrong with the name, the module, the attribute, or what the function returns.
    """
    if name in SCORES:
        return SCORES[name]
    remedy = "use one of them, or name your own function as my_package.my_module:function or path/to/file.py:function"
    require(":" in name, "score", name, f"unknown; known are {', '.join(SCORES)}", remedy)
    found = load(name)
    if not isinstance(found, Score):
        require(callable(found), "score", name, f"is a {type(found).__name__}", "name a function or a Score")
        require_arguments(name, found, "m")
        function = found
        found = Score(lambda m, _: function(m), "trusted", needs_norm=True)
    elif found.rank is not None:
        require(callable(found.rank), "score", name, "is a Score of no function", "give its function first, or None")
        require_arguments(name, found.rank, "m", "options")
    if found.rank is None:
        return found
    held = held_to_form(name, found.rank)
    try_out(name, held, found.direction, found.needs_norm, found.needs_response_derivatives)
    return replace(found, rank=held)
