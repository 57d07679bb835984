# SPDX-License-Identifier: Apache-2.0
"""What is noted of a step: compositions, costs, texts, and how sure a dot product is."""

import numpy as np
import pytest
import torch

from verl_gradalign.log.columns import MAX_VALUES, OTHER, Composition, StepSeconds, cost_metrics
from verl_gradalign.log.samples import choose_samples
from verl_gradalign.metrics import CATALOGUE, metric_of, named
from verl_gradalign.types import Measurements

NAN = float("nan")


def made_up(contribution_PR, half_dot_P2):
    """Measurements of which only the parts of the dot products are known."""
    num_problems = len(contribution_PR)
    zeros_PR = torch.zeros_like(contribution_PR)
    return Measurements(
        problem_id_P=torch.arange(num_problems),
        success_PR=zeros_PR,
        advantage_PR=zeros_PR,
        half_PR=zeros_PR.long(),
        num_candidates=num_problems,
        dot_P=contribution_PR.nansum(dim=1),
        norm_P=torch.ones(num_problems),
        derivative_PR=zeros_PR,
        contribution_PR=contribution_PR,
        half_dot_P2=half_dot_P2,
        direction_norm=1.0,
    )


def test_the_standard_error_is_how_much_the_dot_varies_with_the_responses():
    """20,000 problems whose 8 responses contribute independent draws: the dots' own spread is the truth."""
    draws_PR = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.3 + 0.1
    halves_P2 = torch.stack([draws_PR[:, :4].sum(1), draws_PR[:, 4:].sum(1)], dim=1)
    truth = draws_PR.sum(1).std().item()
    by_response = made_up(draws_PR, halves_P2).dot_error_P
    by_half = made_up(torch.full_like(draws_PR, NAN), halves_P2).dot_error_P
    for error_P in (by_response, by_half):
        assert error_P.square().mean().sqrt().item() == pytest.approx(truth, rel=0.02)
    assert by_response.std() < by_half.std() / 2
    assert made_up(draws_PR, halves_P2).error_freedom_P.unique().tolist() == [7]
    assert made_up(torch.full_like(draws_PR, NAN), halves_P2).error_freedom_P.unique().tolist() == [1]


def test_the_standard_error_is_unknown_where_nothing_was_measured():
    unknown = made_up(torch.full((2, 4), NAN, dtype=torch.float64), torch.full((2, 2), NAN, dtype=torch.float64))
    assert unknown.dot_error_P.isnan().all() and unknown.error_freedom_P.eq(0).all()


def test_composition_gives_each_values_share_of_pool_and_kept():
    kept = np.array([True, False, True, False])
    metrics = Composition({"level": ["hard", "hard", "easy"]}).metrics("level", ["easy", "hard", "hard", "hard"], kept)
    assert metrics == {
        "composition/level/easy/pool": 0.25,
        "composition/level/easy/kept": 0.5,
        "composition/level/hard/pool": 0.75,
        "composition/level/hard/kept": 0.5,
    }
    assert named(metrics)


def test_the_most_frequent_values_of_the_files_are_named_in_every_step_and_the_others_together():
    frequent = [f"f{i}" for i in range(MAX_VALUES)]
    composition = Composition({"source": [*frequent, *frequent, *(f"rare{i}" for i in range(40))]})
    metrics = composition.metrics("source", ["f0", "rare1", "rare2", "never seen"], np.array([False, True, True, True]))
    assert len(metrics) == 2 * (MAX_VALUES + 1)
    assert (metrics["composition/source/f0/pool"], metrics["composition/source/f1/pool"]) == (0.25, 0)
    assert metrics[f"composition/source/{OTHER}/pool"] == 0.75
    assert metrics[f"composition/source/{OTHER}/kept"] == 1
    assert composition.metrics("source", ["f3"], np.array([True])).keys() == metrics.keys()


def test_the_cost_of_selection_counts_rollouts_that_are_not_trained_on():
    metrics = {"gradalign/tokens/generated": 1000.0, "gradalign/tokens/trained": 250.0}
    costs = cost_metrics(metrics, StepSeconds(step=100.0, rollout=40.0, selection=10.0, update=30.0))
    assert costs == {
        "seconds/rollout": 40.0,
        "seconds/share_of_step": 0.1,
        "seconds/update": 30.0,
        "cost/unused_rollouts": 0.75,
        "cost/share_of_step": pytest.approx((10 + 0.75 * 40) / 100),
    }
    assert named(costs)


def test_texts_are_kept_of_the_least_trustworthy_then_of_the_best_and_the_most_uncertain():
    dot = np.array([5.0, -4.0, 0.1, 3.0, NAN, 2.0])
    error = np.array([1.0, 1.0, 1.0, 9.0, NAN, 1.0])
    norm = np.ones(6)
    assert choose_samples(4, dot, dot, norm, error) == [1, 2, 3, 0]
    assert choose_samples(99, dot, dot, norm, error) == [1, 2, 3, 5, 0]  # all that have a score, once each
    assert choose_samples(0, dot, dot, norm, error) == []
    assert choose_samples(3, np.full(6, NAN), dot, norm, error) == []
    assert choose_samples(4, dot, dot, norm, np.full(6, NAN))[:3] == [1, 2, 5]  # by score where no error is known


def test_a_name_that_is_not_in_the_catalogue_is_refused():
    with pytest.raises(KeyError, match="CATALOGUE"):
        named({"score/median": 1.0})


def test_the_catalogue_has_every_name_once_with_unit_and_formula():
    assert len({metric.name for metric in CATALOGUE}) == len(CATALOGUE)
    assert all(metric.unit and metric.formula for metric in CATALOGUE)
    for metric in CATALOGUE:
        # mlflow's file store keeps `a` in a file and `a/b` in a folder, and loses the whole step if it cannot.
        assert not [other.name for other in CATALOGUE if other.name.startswith(f"{metric.name}/")]
    for name in ("kept_by/top", "composition/a/b/c/pool", "direction/amc/norm"):
        assert metric_of(name) is not None
    assert metric_of("direction/norm").name == "direction/norm"
